"""`edgeopt devices`: where models can be aimed at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgeopt.cli.console import JsonFlag, facts, print_json, stdout, table

if TYPE_CHECKING:
    from edgeopt.device_profiles.schema import DeviceProfile


def devices(
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
