"""`edgeopt emulator`: the phone in a box."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgeopt.cli.console import JsonFlag, facts, print_json, size, stdout, table, work
from edgeopt.errors import MissingError

if TYPE_CHECKING:
    from edgeopt.emulator.diagnosis import Diagnosis

OutdatedFlag = Annotated[
    bool, typer.Option("--outdated", help="Only what other versions of edgeopt have left; downloads are kept.")
]

emulator = typer.Typer(
    name="emulator",
    help="Install the emulated phone, try it, remove it: Arm kernels of all three runtimes on this machine.",
    no_args_is_help=True,
)


@emulator.command()
def setup(context: typer.Context, json: JsonFlag = False) -> None:
    """Install the emulated phone: 163 MB to download, then about a minute; 258 MB on disk. Needs no root.

    Everything is pinned by its hash. It goes to ~/.cache/edgeopt/emulator, or below $EDGEOPT_HOME.

    Example: edgeopt emulator setup
    """
    with work(context) as progress:
        from edgeopt.emulator import home
        from edgeopt.emulator import setup as install

        installed = install(progress)
        used, outdated = home.size(installed.directory), home.others()
    if json:
        print_json({"directory": str(installed.directory), "versions": installed.manifest.versions, "size_bytes": used})
        return
    console = stdout()
    console.print(f"The emulated phone works: {installed.directory} ({size(used)})")
    console.print("Next:   edgeopt export ... --verify-on phone:cortex-a76")
    if outdated:
        console.print(f"Left by other versions: {len(outdated)}. Remove them: edgeopt emulator remove --outdated")


@emulator.command()
def doctor(context: typer.Context, json: JsonFlag = False) -> None:
    """Run small models on the emulated phone with every runtime; list versions, sizes and cores.

    Example: edgeopt emulator doctor

    The exit code is 3 when the phone can't be used.
    """
    with work(context) as progress:
        from edgeopt.emulator.diagnosis import diagnose

        diagnosis = diagnose(progress)
    if json:
        print_json({"works": diagnosis.works, "diagnosis": diagnosis})
    else:
        _show(diagnosis)
    if diagnosis.problem is not None:
        raise MissingError(diagnosis.problem)
    broken = [trial for trial in diagnosis.trials if trial.problem is not None]
    if broken:
        raise MissingError(
            f"the emulated phone does not work: {broken[0].name} {broken[0].problem}",
            fix="edgeopt emulator remove, then edgeopt emulator setup",
        )


@emulator.command()
def remove(context: typer.Context, outdated: OutdatedFlag = False, json: JsonFlag = False) -> None:
    """Delete the emulated phone and its downloads.

    Example: edgeopt emulator remove --outdated
    """
    with work(context):
        from edgeopt.emulator import remove as delete

        freed = delete(outdated_only=outdated)
    if json:
        print_json({"freed_bytes": freed})
    else:
        stdout().print(f"Freed {size(freed)}." if freed else "There is nothing to remove.")


def _show(diagnosis: Diagnosis) -> None:
    console = stdout()
    version = {name: f"version {value}" for name, value in diagnosis.versions.items()}
    for name in diagnosis.unpinned:
        if name in version:
            version[name] += ", as this machine has it; edgeopt was tested with another"
    console.print(
        facts(
            {
                "Directory": diagnosis.directory,
                "On disk": f"{size(diagnosis.size_bytes)}, and {size(diagnosis.downloads_bytes)} of downloads",
                **version,
                "llvm-mca": diagnosis.llvm_mca or "not installed: instructions are counted, cycles not estimated",
                "Outdated": "\n".join(diagnosis.outdated),
            }
        )
    )
    if diagnosis.trials:
        rows = table("Trial", "Works", "Detail", fold=("Detail",))
        for trial in diagnosis.trials:
            rows.add_row(trial.name, "no" if trial.problem else "yes", trial.problem or "")
        console.print()
        console.print(rows)
    rows = table("Instruction sets", "phone:NAME", fold=("Instruction sets", "phone:NAME"))
    for features in dict.fromkeys(core.features for core in diagnosis.cores):
        names = [core.name + ("*" if core.stand_in else "") for core in diagnosis.cores if core.features == features]
        rows.add_row(", ".join(features), ", ".join(names))
    console.print()
    console.print(rows)
    console.print("* QEMU has no model of it: another CPU with the same instruction sets stands in.")
    console.print("A device profile does, too: phone:pixel-4, or phone:pixel-4:cortex-a55 for another of its cores.")
