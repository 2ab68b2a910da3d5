"""`edgeopt doctor`: what works on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from edgeopt.cli.console import JsonFlag, facts, print_json, stdout, table, work
from edgeopt.errors import MissingError

if TYPE_CHECKING:
    from rich.console import Console

    from edgeopt.doctor import Diagnosis


def doctor(context: typer.Context, json: JsonFlag = False) -> None:
    """Try every exporter, runtime and extra on this machine; say what is missing and how to get it.

    Example: edgeopt doctor

    The exit code is 3 when a part of the core does not work; missing extras are fine.
    """
    with work(context) as progress:
        from edgeopt.doctor import OPTIONAL, diagnose

        diagnosis = diagnose(progress)
    if json:
        print_json({"machine": diagnosis.machine, "parts": diagnosis.parts, "core_works": diagnosis.core_works})
    else:
        _show(diagnosis, stdout())
    broken = [f"{part.kind} {part.name!r}" for part in diagnosis.parts if part.kind not in OPTIONAL and not part.works]
    if broken:
        raise MissingError(f"the core does not work here: {', '.join(broken)}", fix="the output says how to mend each")


def _show(diagnosis: Diagnosis, console: Console) -> None:
    machine = diagnosis.machine
    console.print(
        facts(
            {
                "edgeopt": machine.edgeopt,
                "Python": machine.python,
                "System": machine.system,
                "CPU": f"{machine.cpu}, {machine.cores} cores, {machine.memory_mb / 1024:.1f} GiB memory",
                "CPU features": ", ".join(machine.cpu_features) or "unknown",
                "int8 kernels": "fast (dot-product instructions)"
                if machine.fast_int8
                else "slow here: no dot-product instructions, so speed-ups measured here are low",
            }
        )
    )
    rows = table("Part", "Works", "Detail", fold=("Part", "Detail"))
    for part in diagnosis.parts:
        rows.add_row(f"{part.kind} {part.name}", "yes" if part.works else "no", part.detail)
    console.print()
    console.print(rows)
    console.print()
    for part in diagnosis.parts:
        if part.fix is not None:
            purpose = f" ({part.purpose})" if part.purpose else ""
            console.print(f"To get {part.kind} {part.name}{purpose}:\n  {part.fix}", soft_wrap=True)
