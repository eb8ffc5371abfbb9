"""Runs of one model by several methods, side by side: a table, a picture, a verdict."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from autoparallel.train.metrics import RunRecord, largest_difference

__all__ = ["Comparison"]

# Rounding errors grow with every step, so the curves are held to a tolerance only at first.
COMPARED_STEPS = 20
TOLERANCE = 1e-4  # The largest difference of losses over the first COMPARED_STEPS, in float32.
CLEAR_FALL = 0.5  # How much the held-out loss must fall, in nats per token.


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs of one model by several methods.

    title: the name of the model, for people. records: one per method; the last one is the
    reference.
    """

    title: str
    records: tuple[RunRecord, ...]

    @property
    def reference(self) -> RunRecord:
        """The run that the others are compared with."""
        return self.records[-1]

    def difference(self, record: RunRecord, steps: int | None = None) -> float:
        """Return the largest difference of a run's losses from the reference's.

        steps: how many first steps to look at, None for all.
        """
        return largest_difference(record.losses, self.reference.losses, steps)

    def complaints(self) -> tuple[str, ...]:
        """Return what is wrong: curves that part early, held-out loss that does not fall.

        One sentence each; an empty tuple means that the methods agree and train.
        """
        complaints = []
        for record in self.records:
            early = self.difference(record, COMPARED_STEPS)
            # Written so that NaN is a complaint.
            if not early <= TOLERANCE:
                complaints.append(
                    f"{record.name}: its loss is {early:.1e} from {self.reference.name}'s within "
                    f"{COMPARED_STEPS} steps, more than {TOLERANCE:.0e}"
                )
            before, after = record.held_out[0][1], record.held_out[-1][1]
            if not after <= before - CLEAR_FALL:
                complaints.append(
                    f"{record.name}: its held-out loss went from {before:.3f} to {after:.3f}, "
                    f"and should fall by {CLEAR_FALL}"
                )
        return tuple(complaints)

    def table(self) -> Table:
        """Return a table for a terminal, one column per run."""
        table = Table(title=self.title, title_justify="left")
        table.add_column("")
        for record in self.records:
            table.add_column(record.name, justify="right")
        for label, cells in self._rows():
            table.add_row(label, *cells)
        return table

    def _rows(self) -> list[tuple[str, list[str]]]:
        """Return the rows of the table: a label, and a cell per run."""

        def row(label: str, cell: Any) -> tuple[str, list[str]]:
            return label, [cell(record) for record in self.records]

        def apart(steps: int | None) -> Any:
            return lambda record: (
                "(reference)"
                if record is self.reference
                else f"{self.difference(record, steps):.1e}"
            )

        kinds = sorted({kind for r in self.records for kind, _ in (r.forward + r.backward).calls})
        rows = [
            row("processes", lambda r: str(r.world_size)),
            row("parameters per process", lambda r: f"{r.local_parameters:,}"),
            row("held-out loss, before", lambda r: f"{r.held_out[0][1]:.4f}"),
            row(
                f"held-out loss, after {len(self.reference.losses)} steps",
                lambda r: f"{r.held_out[-1][1]:.4f}",
            ),
            row(f"loss, largest difference in {COMPARED_STEPS} steps", apart(COMPARED_STEPS)),
            row("loss, largest difference in all steps", apart(None)),
            row("collectives per step, forward", lambda r: str(r.forward.total_calls)),
            row("collectives per step, backward", lambda r: str(r.backward.total_calls)),
        ]
        rows += [
            row(
                f"  {kind}, forward + backward",
                lambda r, kind=kind: " + ".join(
                    str(dict(phase.calls).get(kind, 0)) for phase in (r.forward, r.backward)
                ),
            )
            for kind in kinds
        ]
        return [
            *rows,
            row("MB per step, forward", lambda r: f"{r.forward.total_nbytes / 1e6:.2f}"),
            row("MB per step, backward", lambda r: f"{r.backward.total_nbytes / 1e6:.2f}"),
            row("collectives per step, update", lambda r: str(r.update.total_calls)),
            row("milliseconds per step (median)", lambda r: f"{1e3 * r.median_step_seconds:.0f}"),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the comparison for json.dump: every record, the differences and the complaints."""
        return {
            "title": self.title,
            "largest_difference": {
                record.name: {
                    f"first_{COMPARED_STEPS}_steps": self.difference(record, COMPARED_STEPS),
                    "all_steps": self.difference(record),
                }
                for record in self.records[:-1]
            },
            "complaints": self.complaints(),
            "records": [json.loads(record.to_json()) for record in self.records],
        }

    def draw(self, path: Path) -> None:
        """Write a PNG: the curves, and below them their distances from the reference."""
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt

        figure, (curves, apart) = plt.subplots(
            2, 1, figsize=(8, 7), sharex=True, height_ratios=(3, 1), layout="constrained"
        )
        # The curves lie upon each other: wide and pale below, thin and dashed above.
        styles = (("-", 7.0, 0.35), ("-", 3.0, 0.8), ("--", 1.2, 1.0))
        for index, record in enumerate(self.records):
            style, width, opacity = styles[index % len(styles)]
            steps = range(1, len(record.losses) + 1)
            curves.plot(
                steps,
                record.losses,
                style,
                linewidth=width,
                alpha=opacity,
                color=f"C{index}",
                label=f"{record.name} (training)",
            )
            curves.plot(
                [step for step, _ in record.held_out],
                [loss for _, loss in record.held_out],
                "os^"[index % 3],
                markersize=11 - 3 * index,
                markerfacecolor="none",
                color=f"C{index}",
                label=f"{record.name} (held out)",
            )
            if record is not self.reference:
                pairs = zip(record.losses, self.reference.losses, strict=True)
                # A logarithmic axis has no place for 0.
                distance = [max(abs(one - other), 1e-9) for one, other in pairs]
                apart.semilogy(steps, distance, linewidth=1.0, color=f"C{index}", label=record.name)
        apart.axhline(TOLERANCE, color="gray", linewidth=0.8, linestyle=":")
        curves.set(title=self.title, ylabel="loss (nats per token)")
        curves.legend(fontsize="small")
        apart.set(xlabel="step", ylabel=f"distance from\n{self.reference.name}")
        figure.savefig(path, dpi=110)
        plt.close(figure)
