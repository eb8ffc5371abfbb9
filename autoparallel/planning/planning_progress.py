"""The progress of planning on a terminal's stderr: its phase, and how long it will take."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["planning_progress"]

# What takes less long shows nothing.
_SECONDS = 1.0


@contextmanager
def planning_progress() -> Iterator[Callable[[float, str], None] | None]:
    """Yield a function to call with the share of the search that is done, and a text.

    It is None off a terminal, and on all ranks but the first. The bar appears after a second, with
    the time that is left, and is gone at the end.

    Example: `with planning_progress() as report: report and report(0.5, "8 of 16 families")`
    """
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield None
        return
    # Imported where a person looks on: a GPU's image may lack it.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("planning"),
        BarColumn(bar_width=24),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    begun = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=False) as bar:
        task = bar.add_task("", total=1.0, visible=False)

        def report(share: float, text: str) -> None:
            """Show the share and the text."""
            visible = time.monotonic() - begun >= _SECONDS
            bar.update(task, completed=share, description=text, visible=visible)

        yield report
