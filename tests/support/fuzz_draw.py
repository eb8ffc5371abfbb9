"""Draw whole programs, and the ways in which they are to be split."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fuzz_containers import contained
from fuzz_layers import LAYERS, LOSSES
from fuzz_pen import Pen, SkippedError
from fuzz_programs import Program
from fuzz_samples import sampled
from fuzz_split import Split
from fuzz_steps import COMPUTE
from fuzz_views import VIEWS
from hypothesis import strategies as st

from autoparallel.runtime.value_branches import OtherBranchError

__all__ = ["containing", "divided", "programs", "splits", "written"]

Number = Callable[[int, int], int]
STEPS = (*COMPUTE, *VIEWS, *LAYERS, *VIEWS, *[sampled] * 8, contained)
MOST_LINES = 16


def written(number: Number, *first: Callable[[Pen], Any]) -> Program:
    """Return a program whose every line matters to its result. first: steps that it begins with."""
    pen = Pen(number)
    for _ in range(pen.number(1, 2)):
        sizes = [pen.size() for _ in range(pen.one((2, 3, 1, 4)))]
        pen.declare(pen.one(("input", "given", "parameter")), *sizes)
    for step in first:
        attempt(pen, step)
    while len(pen.lines) < MOST_LINES and pen.number(0, 15):
        attempt(pen, pen.one(STEPS))
    returned = []
    ends = [name for name in pen.unread() if pen.number(0, 3)] or [pen.value()]
    loss = attempt(pen, pen.one(LOSSES)) if pen.number(0, 2) else ""
    total = ""
    if loss and pen.maybe():
        terms = " + ".join(f"{name}.square().mean()" for name in ends)
        total = attempt(pen, lambda pen: pen.write(f"{loss} + {terms}"))
    returned += [total] if total else [loss, *ends] if loss else ends
    if pen.number(0, 4) == 4:
        others = [n for n, t in pen.values.items() if not t.is_floating_point()]
        returned += [pen.one(others)] if others else []
    texts = (", ".join(returned), f"{{'a': {returned[0]}, 'b': ({', '.join(returned[1:])})}}")
    return Program(pen.text(texts[pen.number(0, 3) == 3]))


def attempt(pen: Pen, step: Any) -> str:
    """Write the step where it fits."""
    try:
        return str(step(pen) or "")
    except (SkippedError, RuntimeError, IndexError, OtherBranchError):
        return ""


def divided(number: Number, on: tuple[int, ...] = (), sparing: bool = False) -> Split:
    """Draw a world size or a mesh, options, and the seed of the costs.

    on: the sizes of the mesh's axes, empty for any. sparing: whether every plan makes copies again.
    """
    sizes = ((), (), (2, 2), (2, 3), (3, 2), (2, 2, 2))[number(0, 5)]
    sizes = on or sizes
    return Split(
        math.prod(sizes) if sizes else number(2, 5),
        number(0, 999),
        (0.0, 0.3, 1.0)[number(0, 2)],
        data_parallel=number(0, 1) == 1,
        sequence_parallel=number(0, 1) == 0,
        whole=(0.0, 0.5)[number(0, 1)],
        sizes=sizes,
        sparing=number(0, 3) == 3 or sparing,
        remaking=number(0, 3) == 3,
    )


@st.composite
def programs(draw: Any) -> Program:
    return written(lambda low, high: int(draw(st.integers(low, high))))


@st.composite
def containing(draw: Any) -> Program:
    """Draw a program with equal blocks."""
    return written(lambda low, high: int(draw(st.integers(low, high))), contained)


@st.composite
def splits(draw: Any, on: tuple[int, ...] = (), sparing: bool = False) -> Split:
    return divided(lambda low, high: int(draw(st.integers(low, high))), on, sparing)
