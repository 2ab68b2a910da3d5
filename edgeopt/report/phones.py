"""What emulated phones showed, as a table: the same answers, and how many instructions for them."""

from __future__ import annotations

from rich import box
from rich.table import Table

from edgeopt.report.units import quantity
from edgeopt.types import PHONE, Report


def phones_table(report: Report) -> Table | None:
    """One row per emulated core; None where none was asked for. Cycles are estimates, and labelled so."""
    rows: dict[str, dict[tuple[str, str], float]] = {}
    for measured in (m for m in report.measurements if m.runtime.startswith(PHONE)):
        # An fp32 file is its own twin, and then the only one.
        of = "float" if measured.subject == "float" else "own"
        rows.setdefault(measured.runtime, {})[measured.name, of] = measured.value
    if not rows:
        return None
    has_twin = any(("instruction_ratio", "own") in row for row in rows.values())
    has_cycles = any(name == "cycles" for row in rows.values() for name, _ in row)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("core", overflow="fold")
    headings = ["identical", "float", "shipped", "ratio"] if has_twin else ["identical", "shipped"]
    if has_cycles:
        headings.append("ratio of cycles, estimated" if has_twin else "cycles, estimated")
    for heading in headings:
        table.add_column(heading, justify="right")
    for phone, row in rows.items():
        table.add_row(phone.removeprefix(PHONE), *_cells(row, has_twin, has_cycles))
    return table


def _cells(row: dict[tuple[str, str], float], has_twin: bool, has_cycles: bool) -> list[str]:
    own = "own" if ("instructions", "own") in row else "float"
    identical = row.get(("host_identical", own), 0.0)
    cells = [quantity(identical, "fraction") + _otherwise(row, own, identical)]
    if has_twin:
        cells.append(quantity(row.get(("instructions", "float")), "instructions"))
    cells.append(quantity(row.get(("instructions", own)), "instructions"))
    if has_twin:
        cells.append(quantity(row.get(("instruction_ratio", own)), "x"))
    if has_cycles:
        float_, shipped = row.get(("cycles", "float")), row.get(("cycles", own))
        if not has_twin:
            cells.append(quantity(shipped, "cycles") if shipped is not None else "-")
        else:
            cells.append(f"{float_ / shipped:.2f}x" if float_ and shipped else "-")
    return cells


def _otherwise(row: dict[tuple[str, str], float], own: str, identical: float) -> str:
    """How close the outputs are where not all of them are identical to this machine's."""
    if identical == 1:
        return ""
    sqnr_db, agreement = row.get(("host_sqnr_db", own)), row.get(("host_agreement", own))
    told = [f"{quantity(sqnr_db, 'dB')}"] if sqnr_db is not None else []
    told += [f"{quantity(agreement, 'fraction')} answer alike"] if agreement is not None else []
    return f" ({', '.join(told)})" if told else ""
