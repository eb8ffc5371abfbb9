"""Plots of plans as SVG or PNG: steps broken down, what varies, predicted against measured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

from autoparallel.analysis.timeline import timeline
from autoparallel.analysis.training_step import COMPUTE
from autoparallel.errors import PlanError
from autoparallel.plan import Plan
from autoparallel.support.units import bytes_text, parse_bytes
from autoparallel.support.written_files import write_file

__all__ = ["plot_measured", "plot_steps", "plot_variants"]

# Okabe and Ito's colours, which are told apart by all readers.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#E69F00", "#009E73", "#999999"
_ENDINGS = (".svg", ".png")


def plot_steps(plans: Sequence[Plan], names: Sequence[str], path: str | PathLike[str]) -> None:
    """Draw the predicted steps of plans side by side, broken down, as one file.

    plans: with their graphs where a timeline is to be drawn; of others, the sum of seconds by kind.
    names: of the plans. path: ends in .svg or .png. The same plans give the same file. Raises
    PlanError for another ending.

    Example: `plot_steps([plan, other], ["planned", "Megatron's"], "steps.svg")`
    """
    figure, axes = _figure(path, len(plans))
    parts = [_broken_down(plan) for plan in plans]
    bottom = [0.0] * len(plans)
    for kind, colour in zip(("computing", "waiting for links"), (_BLUE, _ORANGE), strict=True):
        heights = [1e3 * part[kind] for part in parts]
        axes.bar(list(names), heights, 0.6, bottom=bottom, label=kind, color=colour)
        bottom = [base + height for base, height in zip(bottom, heights, strict=True)]
    for place, total in enumerate(bottom):
        axes.annotate(f"{total:.3g} ms", (place, total), ha="center", va="bottom")
    axes.set_ylabel("predicted step (ms)")
    axes.margins(y=0.15)
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    _write(figure, path)


def plot_variants(
    base: Plan,
    plans: Sequence[Plan | None],
    labels: Sequence[str],
    varied: str,
    path: str | PathLike[str],
) -> None:
    """Draw what a step takes as one option varies: scaling over ranks, time against memory.

    base: the plan as it is. plans: one for each label, None where there is none. labels: values of
    the option. varied: its name; over "world_size" and "nodes" the throughput is drawn, with the
    ideal beside it. path: ends in .svg or .png. Raises PlanError for another ending, and where
    nothing is to be drawn.

    Example: `plot_variants(plan, plans, ["8", "16"], "world_size", "scaling.svg")`
    """
    from matplotlib.ticker import EngFormatter

    rows = [(label, plan) for label, plan in zip(labels, plans, strict=True) if plan is not None]
    if not rows:
        raise PlanError("there is no plan to be drawn", fix="vary it otherwise")
    figure, axes = _figure(path, 4)
    if varied in ("world_size", "nodes"):
        both = sorted({plan.world_size: plan for plan in (base, *(p for _, p in rows))}.items())
        ranks = [size for size, _ in both]
        rates = [_rate(plan) for _, plan in both]
        axes.plot(ranks, rates, "o-", color=_BLUE, label="planned")
        ideal = [rates[0] * size / ranks[0] for size in ranks]
        axes.plot(ranks, ideal, "--", color=_GREY, label="ideal")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(ranks, [str(size) for size in ranks])
        axes.yaxis.set_major_formatter(EngFormatter())
        axes.set_xlabel("ranks")
        axes.set_ylabel("predicted tokens a second")
    else:
        seconds = [1e3 * _seconds(plan) for _, plan in rows]
        names = [label for label, _ in rows]
        if varied == "memory_limit":
            limits = [parse_bytes(name) / 2**30 for name in names]
            axes.plot(limits, seconds, "o-", color=_BLUE, label="least step that fits")
            axes.set_xlabel("memory that a rank may use (GiB)")
            for label, limit in zip(labels, map(parse_bytes, labels), strict=True):
                if label not in names:
                    axes.axvspan(0, limit / 2**30, color=_GREY, alpha=0.2, lw=0)
                    axes.annotate(f"nothing fits {bytes_text(limit)}", (limit / 2**30, seconds[0]))
        else:
            axes.plot(names, seconds, "o-", color=_BLUE, label=varied.replace("_", " "))
            axes.set_xlabel(varied.replace("_", " "))
        axes.axhline(1e3 * _seconds(base), ls="--", color=_GREY, label="as it is")
        axes.set_ylabel("predicted step (ms)")
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    _write(figure, path)


def plot_measured(rows: Sequence[tuple[str, float, float]], path: str | PathLike[str]) -> None:
    """Draw predicted against measured seconds, both on logarithmic scales.

    rows: (what, predicted, measured); positive. path: ends in .svg or .png. The shaded band is a
    factor of 1.25 to either side. Raises PlanError for another ending, and without rows.

    Example: `plot_measured([("gpt2", 0.081, 0.090)], "predicted.svg")`
    """
    if not rows:
        raise PlanError("nothing was measured", fix="give rows (what, predicted, measured)")
    figure, axes = _figure(path, 4)
    times = [seconds for _, *both in rows for seconds in both]
    ends = [0.8 * min(times), 1.25 * max(times)]
    axes.fill_between(ends, [0.8 * e for e in ends], [1.25 * e for e in ends], color=_GREY,
                      alpha=0.25, lw=0, label="within a quarter")  # fmt: skip
    axes.plot(ends, ends, color=_GREY)
    axes.plot([m for _, _, m in rows], [p for _, p, _ in rows], "o", color=_GREEN)
    for what, predicted, measured in rows:
        axes.annotate(f" {what}", (measured, predicted), fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("measured (s)")
    axes.set_ylabel("predicted (s)")
    axes.legend(frameon=False)
    _write(figure, path)


def _broken_down(plan: Plan) -> dict[str, float]:
    """Return the seconds of a step in which a rank computes, and in which it waits."""
    if plan.is_traced and not plan.breaks:
        step = timeline(plan)
        waiting = step.exposed_seconds
        return {"computing": step.busy(COMPUTE), "waiting for links": waiting}
    sent = sum(conversion.seconds for conversion in plan.conversions)
    return {"computing": plan.seconds - sent, "waiting for links": sent}


def _seconds(plan: Plan) -> float:
    """Return the predicted seconds of a step."""
    return timeline(plan).seconds if plan.is_traced and not plan.breaks else plan.seconds


def _rate(plan: Plan) -> float:
    """Return the tokens per second, or steps per second where tokens are not known."""
    if plan.is_traced and not plan.breaks:
        step = timeline(plan)
        return step.tokens_per_second or 1 / step.seconds
    return 1 / plan.seconds


def _figure(path: str | PathLike[str], width: int) -> tuple[Any, Any]:
    """Return a figure and its axes. Raises PlanError for a path that ends otherwise."""
    if Path(os.fspath(path)).suffix not in _ENDINGS:
        raise PlanError(
            f"{path} has no ending that is known", fix=f"end in {' or '.join(_ENDINGS)}"
        )
    # No window is wanted, and pyplot would keep the figure.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.0, 1.5 * width), 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _write(figure: Any, path: str | PathLike[str]) -> None:
    """Write a figure, the same bytes for the same figure."""
    import matplotlib

    content = BytesIO()
    suffix = Path(os.fspath(path)).suffix
    with matplotlib.rc_context({"svg.hashsalt": "autoparallel"}):
        metadata = {"Date": None} if suffix == ".svg" else {"Software": None}
        figure.savefig(content, format=suffix[1:], dpi=160, metadata=metadata)
    write_file(path, content.getvalue())
