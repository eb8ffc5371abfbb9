"""A calibration as text: every measurement beside the time that the fitted figures predict."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from autoparallel.cost.fit import Row
from autoparallel.cost.hardware import Hardware
from autoparallel.support.units import seconds_text

__all__ = ["calibration_text"]

_WIDTH = 100  # letters in a line


def calibration_text(hardware: Hardware, rows: Sequence[Row]) -> str:
    """Return as plain text the hardware's figures, the measurements, and the errors of the fit.

    hardware: the fitted figures. rows: the measurements, each with its measured and its fitted
    seconds and the relative error of the fit. The last lines tell for each kind of measurement
    (the first word of its name) the median and the largest error.

    Example: calibration_text(hardware, rows).splitlines()[-1]
    "all_reduce: 12 measurements, error 4% in the median, 11% at most"
    """
    file = io.StringIO()
    console = Console(file=file, width=_WIDTH, color_system=None, highlight=False)
    console.print(_figures(hardware))
    table = Table("measurement", "measured", "fitted", "error", box=box.SIMPLE)
    for row in rows:
        fitted = seconds_text(row.fitted)
        table.add_row(row.what, seconds_text(row.measured), fitted, f"{row.error:+.0%}")
    console.print(table)
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row.what.split()[0], []).append(abs(row.error))
    for name, errors in groups.items():
        console.print(
            f"{name}: {len(errors)} measurements, error {statistics.median(errors):.0%} in the "
            f"median, {max(errors):.0%} at most"
        )
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def _figures(hardware: Hardware) -> Table:
    """Tell the figures of the hardware that the cost model uses most."""
    table = Table(title=hardware.name, show_header=False, box=box.SIMPLE)
    # What a product reaches is told, not the peak: that is what the planner counts with.
    rates = (
        f"{rate * hardware.matmul.efficiency / 1e9:.3g} GFLOP/s of {8 * size} bits"
        for size, rate in hardware.flops_per_second
    )
    table.add_row("products", ", ".join(rates))
    table.add_row("memory", f"{hardware.sustained_bytes_per_second / 1e9:.3g} GB/s, long arrays")
    if hardware.functions_per_second:
        table.add_row("functions", f"{hardware.functions_per_second / 1e9:.3g} billion per second")
    table.add_row("kernel", f"{seconds_text(hardware.launch_seconds)} to start")
    table.add_row("ranks differ", f"by {hardware.spread:.1%} in speed")
    table.add_row("source", hardware.source)
    return table
