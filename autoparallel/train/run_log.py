"""The log of a run: lines and a bar on stderr, metrics.jsonl, TensorBoard, a picture of losses.

Rank 0 alone tells; on the others every method does nothing.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from autoparallel.support.cache_files import write_whole
from autoparallel.support.json_text import read_other_json
from autoparallel.support.units import seconds_text
from autoparallel.train.config import TrainingError
from autoparallel.train.run_config import LogConfig

__all__ = ["RunLog"]

_POWERS = {"M": 1e6, "G": 1e9, "T": 1e12}


class RunLog:
    """The log of a run in a folder. enabled: on rank 0 alone.

    Raises TrainingError where TensorBoard is asked for and missing.
    """

    def __init__(self, config: LogConfig, folder: Path, enabled: bool) -> None:
        self.config, self.folder, self.enabled = config, folder, enabled
        self.console = Console(stderr=True, highlight=False)
        self._bar: tuple[Progress, Any] | None = None
        self._file: Any = None
        self._board: Any = None
        self._writer = _tensorboard() if enabled and config.tensorboard else None

    @property
    def metrics(self) -> Path:
        """The file with one JSON object for each step that was told."""
        return self.folder / "metrics.jsonl"

    def open(self, step: int) -> None:
        """Begin to write; rows of steps after `step`, which a run before this one did, are cut."""
        if not self.enabled:
            return
        if self.metrics.exists():
            rows = [row for row in read_metrics(self.metrics) if row["step"] <= step]
            write_whole(self.metrics, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self._file = self.metrics.open("a")
        if self._writer is not None:
            # What was written of later steps is of a run that this one takes the place of.
            self._board = self._writer(str(self.folder / "tensorboard"), purge_step=step + 1)

    def close(self) -> None:
        """Write what has not been written."""
        for each in (self._file, self._board):
            if each is not None:
                each.close()
        self._file = self._board = None

    def say(self, text: str) -> None:
        """Write a line of words, also where the log is quiet, beside a bar as well."""
        if self.enabled:
            self._print(text)

    def header(self, rows: Mapping[str, str]) -> None:
        """Write what is trained, on what, and what is expected."""
        if self.enabled and not self.config.quiet:
            for name, text in rows.items():
                for number, line in enumerate(text.splitlines() or [""]):
                    self._print(f"{name if not number else '':11}{line}")

    @contextmanager
    def bar(self, done: int, steps: int) -> Iterator[None]:
        """Show a bar with the time that is left, on a terminal."""
        if not self.enabled or self.config.quiet or not self.console.is_terminal:
            yield
            return
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            self._bar = progress, progress.add_task("train", total=steps, completed=done, text="")
            try:
                yield
            finally:
                self._bar = None

    def step(self, row: Mapping[str, Any], steps: int) -> None:
        """Tell one step: its row goes into the files, and into a line."""
        if not self.enabled:
            return
        done = row["step"]
        if self._bar is not None:
            self._bar[0].update(self._bar[1], completed=done, text=f"loss {row['loss']:.3f}")
        if done % self.config.every and done != steps:
            return
        self._write(row)
        if not self.config.quiet:
            self._print(_line(row, steps))

    def evaluated(self, row: Mapping[str, Any]) -> None:
        """Tell an evaluation."""
        if self.enabled:
            self._write(row)
            if not self.config.quiet:
                loss = row["held_out_loss"]
                perplexity = math.exp(min(loss, 700.0))
                self._print(f"{'':11}held-out loss {loss:.4f}, perplexity {perplexity:.4g}")

    def _write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                if name not in ("step", "time"):
                    self._board.add_scalar(name, value, row["step"])

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar[0].console.print(text, markup=False)
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def draw(self) -> Path | None:
        """Draw the losses of all steps that were told; return the picture's file."""
        if not self.enabled or not self.config.picture:
            return None
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt

        rows = list(read_metrics(self.metrics))
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        trained = [row for row in rows if "loss" in row]
        held = [row for row in rows if "held_out_loss" in row]
        axes.plot([r["step"] for r in trained], [r["loss"] for r in trained], label="training")
        axes.plot(
            [r["step"] for r in held], [r["held_out_loss"] for r in held], "o-", label="held out"
        )
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        axes.legend()
        file = self.folder / "loss.png"
        figure.savefig(file, dpi=110)
        plt.close(figure)
        return file


def read_metrics(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a metrics.jsonl; a last line that was cut short is passed over."""
    for line in file.read_text().splitlines():
        try:
            row = read_other_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            yield row


def _line(row: Mapping[str, Any], steps: int) -> str:
    """Return the line of a step."""
    width = len(str(steps))
    parts = [
        f"step {row['step']:>{width}}/{steps}",
        f"loss {row['loss']:.4f}",
        f"norm {row['gradient_norm']:.3f}",
        f"lr {row['learning_rate']:.2e}",
        f"{row['tokens_per_second']:,.0f} tokens/s",
        seconds_text(row["seconds"]),
        f"{row['memory_gib']:.2f} GiB",
    ]
    if "tflops_per_second" in row:
        flops = 1e12 * row["tflops_per_second"]
        power = next((p for p in ("T", "G") if flops >= _POWERS[p]), "M")
        parts.append(f"{flops / _POWERS[power]:.3g} {power}FLOP/s")
    if "mfu" in row:
        parts.append(f"MFU {row['mfu']:.1%}")
    return "  ".join(parts)


def _tensorboard() -> Any:
    """Return TensorBoard's writer of files. Raises TrainingError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter
    except ImportError as error:
        raise TrainingError(
            "log.tensorboard = true, and TensorBoard is not installed",
            why=str(error),
            fix='pip install "torch-autoparallel[tensorboard]", or leave it out',
        ) from error
