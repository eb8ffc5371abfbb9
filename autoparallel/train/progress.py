"""The progress of a run on stderr: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Report", "progress"]

Report = Callable[[int, str], None]
LINES = 6  # Off a terminal, about this many lines per run.


@contextmanager
def progress(label: str, steps: int, enabled: bool = True) -> Iterator[Report]:
    """Yield a function to call with (steps done, text) after each step.

    label: the name of the run. steps: of the whole run. enabled: False to show nothing, as on all
    ranks but the first.

    Example: `with progress("train", 100) as report: report(1, "loss 3.2")`
    """
    console = Console(stderr=True, highlight=False)
    if not enabled:
        yield lambda done, text: None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(label, total=steps, text="")
            yield lambda done, text: bar.update(task, completed=done, text=text)
    else:
        every = max(1, steps // LINES)
        start = time.monotonic()

        def say(done: int, text: str) -> None:
            """Write a line now and then: the first step, the last, and some in between."""
            if done % every == 0 or done in (1, steps):
                seconds = time.monotonic() - start
                line = f"{label:<24} {done:>5}/{steps}  {seconds:6.1f} s  {text}\n"
                sys.stderr.write(line)
                sys.stderr.flush()

        yield say
