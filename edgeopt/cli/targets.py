"""`edgeopt targets`: what can be built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgeopt.cli.console import JsonFlag, facts, print_json, stdout, table

if TYPE_CHECKING:
    from edgeopt.targets.schema import Target
    from edgeopt.types import Gates

#: Field of `Gates` -> unit.
_GATE_UNITS = {
    "max_accuracy_drop": "fraction",
    "min_accuracy_kept": "fraction",
    "min_agreement": "fraction",
    "min_sqnr_db": "dB",
    "min_speedup": "x",
    "max_latency_ms": "ms",
    "max_size_bytes": "bytes",
    "max_peak_memory_bytes": "bytes",
    "max_cpu_operators": "operators",
    "min_accelerated": "fraction",
    "max_instructions": "instructions",
}


def targets(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A target, or a .toml file of your own.", show_default=False)
    ] = None,
    json: JsonFlag = False,
) -> None:
    """List the targets, or show all about one: scheme, runtimes, gates.

    Example: edgeopt targets android-int8
    """
    from edgeopt.targets import list_targets, load_target

    if name is not None:
        target = load_target(name)
        if json:
            print_json({"target": target})
        else:
            _show(target)
        return
    known = list_targets()
    if json:
        print_json({"targets": known})
        return
    rows = table("Target", "Runs on", "Weights", "Activations")
    for target in known:
        rows.add_row(target.name, target.accelerator or target.format, _weights(target), _activations(target))
    stdout().print(rows)
    stdout().print("'edgeopt targets NAME' shows the gates; a .toml file of your own works in place of a name.")


def _show(target: Target) -> None:
    console = stdout()
    scheme = target.scheme
    estimator: str = target.estimator.name
    if estimator == "percentile":
        estimator += f" ({target.estimator.percentile:g})"
    console.print(target.name, style="bold")
    console.print(target.summary)
    console.print()
    console.print(
        facts(
            {
                "Format": target.format,
                "Weights": _weights(target) + (f", {scheme.weight_granularity}" if scheme.is_quantized else ""),
                "Activations": _activations(target)
                + (", symmetric" if scheme.is_quantized and scheme.activation_symmetric else ""),
                "Inputs, outputs": scheme.io,
                "Calibration": f"{estimator}; needs sample data" if scheme.needs_calibration else "none needed",
                "Proven in": ", ".join(target.runtimes),
                **({"Else in": ", ".join(target.emulators)} if target.emulators else {}),
                **({"Accelerator": target.accelerator} if target.accelerator else {}),
                "Device": f"{target.device} ('edgeopt devices {target.device}')",
            }
        )
    )
    console.print()
    gates = table("Gate", "Limit")
    for flag, limit in _limits(target.gates):
        gates.add_row(flag, limit)
    console.print(gates)
    if target.advice:
        console.print()
        console.print("When a check fails", style="bold")
        console.print(facts(target.advice))


def _weights(target: Target) -> str:
    return {"fp32": "float32", "fp16": "float16", "w8a8": "int8", "w8a16": "int8", "w8": "int8"}.get(
        target.scheme.precision, "int4"
    )


def _activations(target: Target) -> str:
    scheme = target.scheme
    if scheme.activations == "none":
        return "float"
    bits = "int16" if scheme.precision == "w8a16" else "int8"
    return f"{bits}, calibrated" if scheme.activations == "static" else f"{bits}, at run time"


def _limits(gates: Gates) -> list[tuple[str, str]]:
    """Flag that changes the gate -> its limit in words; gates that are off say so."""
    from edgeopt.report.units import quantity

    limits = []
    for field, unit in _GATE_UNITS.items():
        value: float | int | None = getattr(gates, field)
        flag = f"--{field.replace('_bytes', '_mb').replace('_', '-')}"
        limits.append((flag, "off" if value is None else quantity(value, unit)))
    return limits
