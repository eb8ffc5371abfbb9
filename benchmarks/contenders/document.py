"""Writes docs/benchmarks.md and its plot from the figures of `benchmarks/steps.py`."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from contenders.workloads import SMALLEST, WORKLOADS

__all__ = ["geometric_mean", "quartile", "ratio", "write_document"]

GPU_RESULTS = Path(__file__).parents[1] / "gpu"
# What each contender is compared with, where that ran; else with the next.
REFERENCES = {
    "ours-1": ("plain",),
    "ours-1-compiled": ("plain-compiled", "plain"),
    "plain-compiled": ("plain",),
    "ours-tp": ("hand-tp",),
    "ours-tp-compiled": ("hand-tp",),
    "core-tp": ("hand-tp",),
    "dtensor-tp": ("hand-tp",),
    "ours-sp": ("hand-sp",),
    "ours-sp-compiled": ("hand-sp",),
    "core-sp": ("hand-sp",),
    "dtensor-sp": ("hand-sp",),
}
# Lines of the summary: a title, and pairs of contenders whose ratios it is the mean of.
SUMMARY = (
    ("ours against the plain model, 1 rank", (("ours-1", "plain"),)),
    ("ours against hand-written", (("ours-tp", "hand-tp"), ("ours-sp", "hand-sp"))),
    ("ours against Megatron-Core", (("ours-tp", "core-tp"), ("ours-sp", "core-sp"))),
    ("ours against DTensor", (("ours-tp", "dtensor-tp"), ("ours-sp", "dtensor-sp"))),
    ('ours against `tp_plan="auto"`', (("ours-tp", "hf"),)),
    ("ours compiled against plain compiled", (("ours-1-compiled", "plain-compiled"),)),
    (
        "ours compiled against hand-written",
        (("ours-tp-compiled", "hand-tp"), ("ours-sp-compiled", "hand-sp")),
    ),
    (
        "ours against the build before",
        tuple((name, f"before: {name}") for name in ("ours-1", "ours-tp", "ours-sp")),
    ),
)
HEAD = """# Step times side by side

Written by `make bench` (`benchmarks/steps.py`, which says how it measures). Every contender trains
the same model from the same weights on the same batch: forward, backward, clipping and AdamW, in
float32, on two gloo processes of one thread each. All contenders of a workload are stepped in turn,
round by round. Milliseconds are those that a rank's processor computes, the slower rank's, median
of the rounds; waiting for the other rank is in none of them. The wall's clock is beside it, which
on a machine that others use too says little. ± is half the distance between the quartiles. Ratios
are those of the rounds' lower quartiles, since what a machine does besides only ever adds. Sent:
collectives of a step and the bytes of their whole tensors, on one rank. Memory: of all tensors at
the worst moment of a step, on one rank.
"""
ALONE = """## What one rank does by itself

The same contenders in one process, whose collectives return at once: what is left is computing,
and all that Python and torch do around it. It is steadier on a busy machine (`--alone`). Ratios of
the lower quartiles of processor time.
"""


def quartile(row: Mapping[str, Any]) -> float:
    """Return the lower quartile of the rounds: what the machine does besides only ever adds."""
    rounds = sorted(row["rounds"])
    return float(statistics.quantiles(rounds, n=4)[0]) if len(rounds) > 2 else float(rounds[0])


def ratio(rows: Mapping[str, Mapping[str, Any]], one: str, other: str) -> float | None:
    """Return how many times as long one contender takes as another; None where one did not run.

    rows: of one workload, by contender.
    """
    pair = [rows.get(name, {}) for name in (one, other)]
    if not all(row.get("rounds") for row in pair):
        return None
    return quartile(pair[0]) / quartile(pair[1])


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean.

    >>> geometric_mean([0.5, 2.0])
    1.0
    """
    return math.exp(statistics.fmean(map(math.log, values)))


def by_workload(result: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the rows by workload and contender."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        table.setdefault(row["workload"], {})[row["contender"]] = row
    return table


def write_document(
    result: Mapping[str, Any],
    titles: Mapping[str, str],
    folder: Path,
    alone: Mapping[str, Any] | None = None,
) -> None:
    """Write benchmarks.md and benchmarks.svg.

    titles: of contenders, by name. alone: the figures of one rank by itself, if they were taken.
    """
    tables = by_workload(result)
    left_out = _left_out(result, titles)
    lines = [HEAD, *_environment(result), "", *left_out, "## Ratios", "", *_summary(tables), ""]
    if _plot(tables, titles, folder / "benchmarks.svg"):
        lines += ["![Processor time of a step against hand-written layers](benchmarks.svg)", ""]
    for name, rows in tables.items():
        lines += [*_workload(name, result["workloads"][name], rows, titles), ""]
    if alone is not None:
        lines += [ALONE, *_summary(by_workload(alone)), ""]
    lines += ["## On a GPU", "", *_gpu()]
    (folder / "benchmarks.md").write_text("\n".join(lines).rstrip() + "\n")


def _environment(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of what the figures depend on."""
    yield "| measured on | |"
    yield "|---|---|"
    for key, value in result["environment"].items():
        yield f"| {key} | {value} |"
    yield f"| rounds | {result['rounds']} |"


def _left_out(result: Mapping[str, Any], titles: Mapping[str, str]) -> Iterator[str]:
    """Yield what the command line left out of this run."""
    ran = {row["contender"].removeprefix("before: ") for row in result["rows"]}
    missing = [title for name, title in titles.items() if name not in ran]
    missing += [each for each in WORKLOADS if each not in result["workloads"] and each != SMALLEST]
    if missing:
        yield from _wrapped(f"Not part of this run: {'; '.join(missing)}.")
        yield ""


def _summary(tables: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    """Yield the table of ratios: a line for each pair, a column for each workload."""
    yield f"| less than 1: ours is quicker | {' | '.join(tables)} | geometric mean |"
    yield "|---|" + "---|" * (len(tables) + 1)
    for title, pairs in SUMMARY:
        cells, values = [], []
        for rows in tables.values():
            found = [ratio(rows, one, other) for one, other in pairs]
            there = [value for value in found if value is not None]
            values += there
            cells.append(" / ".join(f"{value:.2f}" for value in there) or "–")
        if values:
            yield f"| {title} | {' | '.join(cells)} | {geometric_mean(values):.2f} |"
    yield ""
    yield "Two figures in a cell are plain tensor parallelism and that with sequence parallelism."


def _workload(
    name: str,
    sizes: Mapping[str, Any],
    rows: Mapping[str, Mapping[str, Any]],
    titles: Mapping[str, str],
) -> Iterator[str]:
    """Yield the table of one workload, and what did not run."""
    yield f"## {name}"
    yield ""
    yield (
        f"{sizes['layers']} layers of {sizes['hidden']}, {sizes['heads']} heads, a vocabulary of "
        f"{sizes['vocabulary']}, {sizes['batch']} sequences of {sizes['sequence']}."
    )
    yield ""
    yield "| contender | ms | ± | wall ms | ratio | to | sent | MiB sent | memory, MiB |"
    yield "|---|---|---|---|---|---|---|---|---|"
    absent: dict[str, list[str]] = {}
    for contender, row in rows.items():
        title = _title(contender, titles)
        if row["absent"]:
            absent.setdefault(row["absent"], []).append(title)
            continue
        others = REFERENCES.get(contender, ("hand-sp" if "-sp" in contender else "hand-tp",))
        pairs = [(other, ratio(rows, contender, other)) for other in others if other != contender]
        other, times = next((pair for pair in pairs if pair[1] is not None), ("", None))
        counted = row["collectives"] is not None
        yield (
            f"| {title} | {row['cpu'] * 1e3:.1f} | {row['spread']:.0%} | {row['wall'] * 1e3:.1f} | "
            f"{'' if times is None else format(times, '.2f')} | {_title(other, titles)} | "
            f"{row['collectives'] if counted else ''} | "
            f"{format(row['nbytes'] / 2**20, '.2f') if counted else ''} | "
            f"{format(row['peak'] / 2**20, '.1f') if row['peak'] else ''} |"
        )
    for reason, who in absent.items():
        yield ""
        yield from _wrapped(f"Absent: {', '.join(who)}. {_tidy(reason)}")


def _title(contender: str, titles: Mapping[str, str]) -> str:
    """Return a contender's title; one of the build before says so."""
    plain = contender.removeprefix("before: ")
    return titles.get(plain, "") + (" (before)" if plain != contender else "")


def _tidy(reason: str) -> str:
    """Return a reason as part of a document: names in angle brackets and the like as code."""
    short = reason if len(reason) < 200 else reason[:197] + "..."
    return f"`{short.replace('`', chr(39))}`"


def _wrapped(text: str) -> Iterator[str]:
    """Yield a text in lines of at most 100 letters."""
    import textwrap

    yield from textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)


def _gpu() -> Iterator[str]:
    """Yield what GPUs have shown: the figures that `make gpu` has written."""
    files = sorted(GPU_RESULTS.glob("*.json")) if GPU_RESULTS.is_dir() else []
    if not files:
        yield "No GPU has run this yet. `make gpu` is the one command that tries and measures"
        yield "everything on one (`benchmarks/gpu.py`); its figures will be shown here."
        return
    for file in files:
        result = json.loads(file.read_text())
        yield f"### {result['hardware']}, torch {result['torch']}"
        yield ""
        yield "| part | what | seconds | predicted | verdict |"
        yield "|---|---|---|---|---|"
        for part, one in result["parts"].items():
            for row in one["rows"]:
                what = row.get("what") or f"{row['model']}, {row['way']}"
                reason = row.get("failed") or row.get("absent") or row.get("waits") or ""
                verdict = {True: "right", False: "wrong"}.get(row.get("right"), reason)
                seconds = format(row["seconds"], ".6f") if row.get("seconds") else ""
                guess = format(row["predicted"], ".6f") if "predicted" in row else ""
                short = " ".join(verdict.split()[:24])
                yield f"| {part} | {what} | {seconds} | {guess} | {short} |"
        yield ""


# Contenders in the plot, each with its colour; the reference is the line at 1.
PLOTTED = {
    "ours-tp": "#1f77b4",
    "ours-sp": "#6baed6",
    "ours-tp-compiled": "#31a354",
    "ours-sp-compiled": "#a1d99b",
    "core-tp": "#e6550d",
    "core-sp": "#fdae6b",
    "dtensor-tp": "#756bb1",
    "dtensor-sp": "#bcbddc",
}


def _plot(
    tables: Mapping[str, Mapping[str, Mapping[str, Any]]], titles: Mapping[str, str], file: Path
) -> bool:
    """Draw each contender's ratio to hand-written layers; return whether there is a plot.

    There is none without matplotlib, and none without figures.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("svg")
    # The same figures give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "benchmarks", "svg.fonttype": "none"})
    from matplotlib import pyplot

    bars: dict[str, dict[str, float]] = {}
    for name, rows in tables.items():
        for contender in PLOTTED:
            for other in REFERENCES[contender]:
                times = ratio(rows, contender, other)
                if times is not None:
                    bars.setdefault(name, {})[contender] = times
                    break
    if not bars:
        return False
    figure, axes = pyplot.subplots(figsize=(9, 3.6))
    shown = [each for each in PLOTTED if any(each in group for group in bars.values())]
    start, ticks = 0.0, []
    for name, group in bars.items():
        there = [each for each in shown if each in group]
        places = [start + index for index in range(len(there))]
        axes.bar(places, [group[each] for each in there], 0.9, color=[PLOTTED[e] for e in there])
        ticks.append((statistics.fmean(places), name))
        start += len(there) + 1
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set_xticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.set_ylabel("processor time of a step")
    axes.set_title("1 is hand-written layers; less is quicker", fontsize="medium")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=PLOTTED[each]) for each in shown]
    axes.legend(handles, [titles[each] for each in shown], fontsize="small", ncols=2)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
    return True
