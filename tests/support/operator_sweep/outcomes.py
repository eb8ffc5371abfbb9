"""What came of running an op, and what is wrong where results differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

__all__ = ["FAILURES", "TOLERANCE", "Run", "Values", "differences"]

FAILURES = ("wrong", "crash", "dead", "slow")
TOLERANCE = 1e-8
Values = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Run:
    """A Run is what came of one case with one plan.

    case: its sizes and constants. way: how it was planned. status: "right"; "wrong", where
    something is not as with the unsplit model; "refused", by an error of the project; "crash", by
    any other; "dead", where the process ended; "slow", where it was ended; or "not run", where
    torch itself does not run it. why: the reason. split, whole: how many ops of its own are split
    and are not. alone: why no rule of one of them was found. python: why it stays Python.
    """

    case: str
    way: str
    status: str
    why: str = ""
    split: int = 0
    whole: int = 0
    alone: str = ""
    python: str = ""
    trace: str = field(default="", repr=False)

    @property
    def failed(self) -> bool:
        """Whether it is a failure of the project."""
        return self.status in FAILURES


def differences(made: Values, expected: Values, undefined: bool = False) -> Iterator[str]:
    """Yield what differs, as texts. undefined: whether sizes alone are compared."""
    for name in made.keys() - expected.keys():
        if name.startswith("gradient") and bool((made[name] != 0).any()):
            yield f"{name} is not expected"
    for name, right in expected.items():
        found = made.get(name)
        if found is None:
            if not name.startswith("buffer") and bool((right != 0).any()):
                yield f"{name} is missing"
        elif (found.shape, found.dtype) != (right.shape, right.dtype):
            yield (
                f"{name} is {found.dtype} of {list(found.shape)}, not {right.dtype} of "
                f"{list(right.shape)}"
            )
        elif undefined or not right.numel():
            continue
        elif right.is_floating_point() or right.is_complex():
            precision = torch.finfo(right.dtype).eps
            bound = max(TOLERANCE, 1e3 * precision) if precision > 1e-12 else TOLERANCE
            bound *= max(1.0, float(right.abs().nan_to_num(0, 0, 0).max()))
            if not torch.allclose(found, right, rtol=0, atol=bound, equal_nan=True):
                yield f"{name} is off by {float((found - right).abs().max()):.3g}"
        elif not torch.equal(found, right):
            yield f"{name} differs"
