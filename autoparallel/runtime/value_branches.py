"""Branches that a program has taken for granted: each is checked where the forward takes it.

A forward that asks for the truth of a tensor goes one way or the other. A program has one way, the
one that the example inputs take, and an op at that place which ends the program where the tensor
says otherwise. Who calls the program then runs the user's Python.
"""

from __future__ import annotations

import torch

from autoparallel.errors import AutoParallelError

__all__ = ["OtherBranchError", "branch_taken"]


class OtherBranchError(AutoParallelError):
    """A program must not go on: the values at hand lead the forward another way.

    number: of the branch in the program's trace.
    """

    def __init__(self, number: int) -> None:
        super().__init__(
            "a branch on values goes another way than in the program",
            why="the program was made for the way that the example inputs take",
            fix="run the split module itself, which computes such a call as Python; a compiled or "
            "exported program cannot",
        )
        self.number = number

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the number, which is all that differs."""
        return (OtherBranchError, (self.number,))


def branch_taken(condition: torch.Tensor, expected: bool, number: int) -> torch.Tensor:
    """Return the condition, a truth value of no dims, if it is as expected.

    It is a function, and no op, for programs that are compiled: a compiler drops ops whose results
    nobody reads, and asks for the value here as it does in the user's own branch.
    Raises OtherBranchError where it is not as expected.

    >>> branch_taken(torch.tensor(True), True, 0)
    tensor(True)
    """
    if type(condition) is not torch.Tensor:  # it has no value, as where a program is tried out
        copied: torch.Tensor = torch.ops.autoparallel.branch_taken(condition, expected, number)
        return copied
    if bool(condition) != expected:
        raise OtherBranchError(number)
    return condition


@torch.library.custom_op("autoparallel::branch_taken", mutates_args=())
def _branch_taken(condition: torch.Tensor, expected: bool, number: int) -> torch.Tensor:
    """Return a copy of the condition; see `branch_taken`."""
    return branch_taken(condition, expected, number).clone()


@_branch_taken.register_fake
def _(condition: torch.Tensor, expected: bool, number: int) -> torch.Tensor:
    return torch.empty_like(condition)
