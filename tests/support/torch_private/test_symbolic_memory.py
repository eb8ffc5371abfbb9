"""Arithmetic with symbolic sizes is remembered, and its results are the same."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from exported_programs import exported

from autoparallel.support import torch_private


def test_arithmetic_with_sizes_is_remembered(monkeypatch) -> None:
    """Within, each result is computed once; the program, with all that is known, is the same."""
    from torch.fx.experimental.sym_node import SymNode

    computed: list[tuple[Any, Any]] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = (x.reshape(-1, x.shape[-1]) * 2).view(x.shape)
        return x.reshape(x.shape[0] * 2, -1) if x.shape[1] % 2 == 0 else x

    plain = exported(forward, torch.ones(3, 4, 5))
    original = SymNode.maybe_as_int

    def noted(number: Any) -> Any:
        computed.append((number.shape_env, number._expr))
        return original(number)

    monkeypatch.setattr(SymNode, "maybe_as_int", noted)
    monkeypatch.setattr(SymNode, "_mul", SymNode._mul)
    method = SymNode._mul
    with torch_private.remembering_arithmetic():
        with torch_private.remembering_arithmetic():
            memory = exported(forward, torch.ones(3, 4, 5))
        with ThreadPoolExecutor(1) as pool:
            elsewhere = pool.submit(exported, forward, torch.ones(3, 4, 5)).result()
        here = [key for key in computed if key[0] is not size_of(elsewhere).node.shape_env]
    assert len(computed) - len(here) > 4 * len(here) > 0
    assert SymNode._mul is method
    assert SymNode.maybe_as_int is noted
    for program in (memory, elsewhere):
        assert str(program) == str(plain)
        guards = map(torch_private.guards_of, map(size_of, (program, plain)))
        assert len({str(each) for each in guards}) == 1


def test_remembered_sizes_follow_what_becomes_known() -> None:
    """A size that was symbolic is a number as soon as a tracer knows it, and in no other trace."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        before = x.reshape(-1, 2)
        assert x.shape[0] == 6  # it is fixed here
        return before * x.reshape(-1, 2)[: x.shape[0]].shape[0]

    with torch_private.remembering_arithmetic():
        fixed = exported(forward, torch.ones(6, 4))
        free = exported(lambda x: x.reshape(-1, 2) * 2, torch.ones(6, 4))
    assert size_of(fixed, 0) == 6
    assert torch_private.expression_of(size_of(free)).is_Symbol


def size_of(program: Any, dim: int | None = None) -> Any:
    """Return a size of a program's input: the one of a dim, or the first symbolic one."""
    (node,) = (node for node in program.graph.nodes if node.op == "placeholder")
    sizes = node.meta["val"].shape
    if dim is not None:
        return sizes[dim]
    return next(size for size in sizes if isinstance(size, torch.SymInt))
