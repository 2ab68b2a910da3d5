"""`edgeopt devices`: where models can be aimed at, and what the user has measured there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from edgeopt.cli.console import JsonFlag, facts, print_json, stdout, table, work

if TYPE_CHECKING:
    from typer._click import Context

    from edgeopt.device_profiles.schema import DeviceProfile
    from edgeopt.prediction import Calibration

_DEFAULT = "show"


class _Devices(TyperGroup):
    """What is no command is a device's name: `edgeopt devices raspberry-pi-5`. Without any, all are listed."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        first = args[0] if args else ""
        if first not in self.commands and first not in ctx.help_option_names:
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)


devices = typer.Typer(
    name="devices",
    cls=_Devices,
    help="List the device profiles, or show all about one: 'edgeopt devices [NAME]'."
    "\n\nExample: edgeopt devices raspberry-pi-5",
)


@devices.command(_DEFAULT)
def show(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A device, or a .toml file of your own.", show_default=False)
    ] = None,
    json: JsonFlag = False,
) -> None:
    """List the device profiles, or show all about one: cores, instruction sets, published latencies.

    Example: edgeopt devices raspberry-pi-5
    """
    from edgeopt.device_profiles import list_devices, load_device
    from edgeopt.report.text import WIDE

    if name is not None:
        device = load_device(name)
        if json:
            print_json({"device": device})
        else:
            _show(device)
        return
    known = list_devices()
    if json:
        print_json({"devices": known})
        return
    console = stdout()
    headings = ("Device", "SoC", "Memory", "int8 dot", "Accelerator", "Class")
    shown = headings if console.width >= WIDE else headings[:-1]
    rows = table(*shown, right=("Memory",), fold=("SoC",))
    for device in known:
        kinds = ", ".join(npu.kind for npu in device.npus) or "-"
        cells = (device.name, device.soc, _memory(device), _dot_products(device), kinds, device.device_class)
        rows.add_row(*cells[: len(shown)])
    console.print(rows)
    console.print("'edgeopt devices NAME' shows all; a .toml file of your own works in place of a name.")


@devices.command()
def calibrate(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="DEVICE", help="A device, or a .toml file of your own.")],
    reports: Annotated[
        list[Path] | None,
        typer.Argument(metavar="REPORT", help="Files device_report.json that device/check wrote.", show_default=False),
    ] = None,
    artifact: Annotated[
        Path | None,
        typer.Option("--artifact", metavar="FILE", help="The file measured, where no REPORT lies in its bundle."),
    ] = None,
    ms: Annotated[
        float | None, typer.Option("--ms", metavar="MS", help="Its median latency, warm, without a REPORT.")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", metavar="N", min=1, help="Threads behind --ms.")] = 1,
    forget: Annotated[bool, typer.Option("--forget", help="Remove what this device was calibrated with.")] = False,
    json: JsonFlag = False,
) -> None:
    """Teach 'edgeopt predict' what you measured on a device: it then uses, and names, your figures.

    Example: edgeopt devices calibrate pixel-4 dist/digits-android-int8/device_report.json
    """
    from edgeopt import prediction
    from edgeopt.device_profiles import load_device
    from edgeopt.errors import UsageError

    device = load_device(name)
    if forget:
        existed = prediction.forget(device)
        stdout().print(f"{device.name}: {'calibration removed' if existed else 'was not calibrated'}")
        return
    with work(context) as progress:
        progress.step("Reading what was measured")
        if ms is not None and artifact is not None and not reports:
            measured = [prediction.measurement(artifact, ms, threads)]
        elif reports and ms is None:
            measured = [prediction.read_device_report(report, artifact) for report in reports]
        else:
            raise UsageError("give device reports, or --artifact and --ms", where="calibrate")
        calibration = prediction.calibrate(device, measured)
    if json:
        print_json({"device": device.name, "calibration": _plain(calibration)})
        return
    _show_calibration(device, calibration)


def _plain(calibration: Calibration) -> dict[str, object]:
    return {
        "path": str(calibration.path),
        "figures": calibration.figures,
        "compute_factor": calibration.factors[0],
        "memory_factor": calibration.factors[1],
    }


def _show_calibration(device: DeviceProfile, calibration: Calibration) -> None:
    console = stdout()
    rows = table(
        "File", "Format", "Threads", "Measured ms", "Model said", right=("Threads", "Measured ms", "Model said")
    )
    for figure in calibration.figures:
        measured, predicted = figure.share.measured_ms, figure.share.predicted_ms
        rows.add_row(figure.file, figure.format, str(figure.threads), f"{measured:.3g}", f"{predicted:.3g}")
    console.print(rows)
    compute, memory = calibration.factors
    console.print(f"{device.name}: computing takes {compute:.2f}x, moving data {memory:.2f}x as long as the model said")
    console.print(f"'edgeopt predict --device {device.name}' uses this from now on: {calibration.path}", soft_wrap=True)


def _show(device: DeviceProfile) -> None:
    from edgeopt.device_profiles.channels import channel_multiple

    console = stdout()
    console.print(device.title, style="bold")
    console.print(
        facts(
            {
                "Name": device.name,
                "Class": f"{device.device_class}, {device.year}",
                "SoC": device.soc,
                "Memory": _memory(device),
                "Accelerators": ", ".join(device.accelerators) or "none",
                "Formats": ", ".join(device.formats),
                "Width step": f"{channel_multiple(device, 'w8a8')} (int8), {channel_multiple(device, 'fp32')} (fp32)",
            }
        )
    )
    console.print()
    cores = table("Cores", "MHz", "Instruction sets", right=("MHz",), fold=("Instruction sets",))
    for cluster in device.clusters:
        cores.add_row(f"{cluster.count} x {cluster.core}", str(cluster.max_mhz), ", ".join(cluster.features))
    console.print(cores)
    if device.reference_latencies:
        console.print()
        console.print("Published latencies", style="bold")
        rows = table("Model", "Precision", "Runtime", "Threads", "ms", right=("Threads", "ms"), fold=("Model",))
        for latency in device.reference_latencies:
            threads = "" if latency.threads is None else str(latency.threads)
            rows.add_row(latency.model, latency.precision, latency.runtime, threads, f"{latency.ms:g}")
        console.print(rows)
    console.print()
    console.print("Sources", style="bold")
    for source in dict.fromkeys((*device.sources, *(latency.source for latency in device.reference_latencies))):
        console.print(source, soft_wrap=True)


def _memory(device: DeviceProfile) -> str:
    return f"{device.memory_mb / 1024:g} GiB" if device.memory_mb >= 1024 else f"{device.memory_mb} MiB"


def _dot_products(device: DeviceProfile) -> str:
    """int8 is faster than float only on cores that have these; the slowest cores may lack what the fastest have."""
    able = [any(feature in ("dotprod", "i8mm") for feature in cluster.features) for cluster in device.clusters]
    return "yes" if all(able) else "some cores" if any(able) else "no"
