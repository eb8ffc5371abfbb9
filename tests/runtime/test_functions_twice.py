"""Every autograd Function of the runtime is differentiated twice as if one rank were all."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoparallel import runtime
from autoparallel.mesh import Mesh
from autoparallel.placement import Invariant, Partial, Placement, Replicate, Shard, gradient
from autoparallel.runtime import kernels, overlap
from autoparallel.runtime.collectives import convert, pending_sum
from autoparallel.runtime.grouped_products import _WithContiguousGradient
from autoparallel.runtime.groups import Group, SingleGroup
from autoparallel.runtime.ranks import run_ranks, thread_ranks
from autoparallel.runtime.recompute import recomputed
from autoparallel.runtime.routed_experts import routed_experts
from autoparallel.runtime.stand_ins import silenced, stand_ins_for, without_stand_ins

I, R, P = Invariant(), Replicate(), Partial()  # noqa: E741
S = Shard
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """A Case is what a rank computes. run: of its group and its parts of `shapes`, which lie as
    `layouts`. result: the placement of what it returns, `size` along the split dim.
    """

    run: Callable[..., torch.Tensor]
    shapes: tuple[tuple[int, ...], ...]
    layouts: tuple[Placement, ...]
    result: Placement = I
    size: int = 0


def _joined(group: Group, x: Any, up: Any, down: Any, other: Any) -> torch.Tensor:
    """Conversions and products in one node each, with a gap that a third product fills."""
    ends = (group, S(1), R, 6)
    (wide, gap) = overlap.convert_then_linear(x, *ends, [(up, None), (other, None)])
    result, _ = overlap.linear_then_convert(
        wide.tanh(), down, group, P, S(1), 6, [], gap=None, place=0
    )
    whole = convert(x, *ends)
    late = overlap.linear(whole, other, None, gap=gap, place=1)
    return result + convert(late, group, R, S(1)).sum(-1, keepdim=True)


def _columns(group: Group, x: Any, up: Any, down: Any) -> torch.Tensor:
    """Column- then row-parallel, where nothing is moved forward but the sum."""
    (wide, _) = overlap.convert_then_linear(x, group, I, R, 0, [(up, None)])
    return overlap.linear_then_convert(wide.tanh(), down, group, P, I, 0, [], gap=None, place=0)[0]


def _filled(group: Group, x: Any, up: Any, down: Any) -> torch.Tensor:
    moved, gap = overlap.convert_filled(x, group, I, R, 0, [(up, None)])
    wide = overlap.linear(moved, up, None, gap=gap, place=0)
    return convert(pending_sum(functional.linear(wide.tanh(), down), group), group, P, I)


def _halves(group: Group, x: Any, up: Any, down: Any) -> torch.Tensor:
    moved = overlap.convert(x, group, I, R, 0, 1)
    wide = overlap.linear(moved, up, None, gap=1)
    return overlap.linear(wide.tanh(), down, None, gap=1, group=group)


def _experts(group: Group, rows: Any, one: Any, two: Any) -> torch.Tensor:
    text = "a = product(row0, table0); b = aten.tanh.default(a); c = product(b, table1); c"
    chosen = torch.tensor([[0], [2], [3], [0], [1], [2]])
    if group.world_size == 1:
        return routed_experts([rows], chosen, [], [one, two], [], text)
    mine = chosen[group.rank * 3 : group.rank * 3 + 3]
    return kernels.experts_exchanged(
        *([rows], mine, [], [one, two], [], text), group=group, size=6, count=4, extent=6
    )


def _ring(group: Group, query: Any, key: Any, value: Any) -> torch.Tensor:
    if group.world_size == 1:
        with sdpa_kernel(SDPBackend.MATH):
            return functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return kernels.attention_ring(
        *(query, key, value), is_causal=True, group=group, size=6, dim=2, extent=6
    )


def _little(group: Group, x: Any) -> torch.Tensor:
    """One row for two ranks, of which the last has nothing."""
    (some,) = stand_ins_for([x], [[0]])
    rows = without_stand_ins(some.sin(), [x.size(0)], [{0: x.size(0)}])
    return silenced(rows * 2, torch.tensor(False))


def _normalized(group: Group, x: Any) -> torch.Tensor:
    return kernels.batch_norm_split(
        *(x, None, None, None, None, True, 0.1, 1e-5), group=group, size=6
    )[0]


def _classes(group: Group, logits: Any) -> torch.Tensor:
    labels = torch.tensor([0, 5, 3])
    return kernels.cross_entropy_classes(logits, labels, group=group, size=6)


def _extremes(group: Group, x: Any) -> torch.Tensor:
    highest = kernels.amax_split(x, [1], group=group, size=6)
    return highest + kernels.max_split(x * 2, 1, group=group, size=6)[0].sin()


def _softmax(group: Group, x: Any) -> torch.Tensor:
    whole = kernels.logsumexp_split(x, [1], True, group=group, size=6)
    return kernels.softmax_split(x, 1, group=group, size=6) + convert(whole, group, I, R)


def _again(group: Group, x: Any) -> torch.Tensor:
    (result,) = recomputed(lambda x: [convert(x, group, S(1), R, 6).tanh()], x)
    return convert(_WithContiguousGradient.apply(result), group, R, S(1))


CASES = {
    "joined": Case(*(_joined, ((2, 6, 4), (6, 4), (3, 6), (2, 4)), (S(1), S(0), S(1), R), S(1), 6)),
    "columns": Case(_columns, ((5, 4), (6, 4), (3, 6)), (I, S(0), S(1))),
    "filled": Case(_filled, ((5, 4), (6, 4), (3, 6)), (I, S(0), S(1))),
    "halves": Case(_halves, ((5, 4), (6, 4), (3, 6)), (I, S(0), S(1))),
    "experts": Case(_experts, ((6, 3), (4, 3, 5), (4, 5, 3)), (S(0), S(0), S(0)), S(0), 6),
    "ring": Case(_ring, ((2, 2, 6, 3),) * 3, (S(2),) * 3, S(2), 6),
    "little": Case(_little, ((1, 4),), (S(0),), S(0), 1),
    "normalized": Case(_normalized, ((6, 2, 3),), (S(0),), S(0), 6),
    "classes": Case(_classes, ((3, 6),), (S(1),)),
    "extremes": Case(_extremes, ((3, 6),), (S(1),)),
    "softmax": Case(_softmax, ((3, 6),), (S(1),), S(1), 6),
    "again": Case(_again, ((3, 6),), (S(1),), S(1), 6),
}


def twice(case: Case, group: Group) -> list[torch.Tensor]:
    """Return a loss, a penalty on its gradients, and the penalty's gradients, all whole."""
    generator = torch.Generator().manual_seed(0)
    wholes = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in case.shapes]
    parts = [
        convert(whole, group, I, layout).detach().requires_grad_()
        for whole, layout in zip(wholes, case.layouts, strict=True)
    ]

    def whole(gradients: Any) -> list[torch.Tensor]:
        return [
            convert(
                *(grad, group, gradient(layout), I),
                case.shapes[at][layout.dim] if isinstance(layout, Shard) else 0,
            )
            for at, (grad, layout) in enumerate(zip(gradients, case.layouts, strict=True))
        ]

    loss = convert(case.run(group, *parts), group, case.result, I, case.size).sin().sum()
    firsts = whole(torch.autograd.grad(loss, parts, create_graph=True))
    penalty = sum((first.sin() * (2 + at)).sum() for at, first in enumerate(firsts))
    seconds = torch.autograd.grad(penalty, parts)  # type: ignore[arg-type]
    return [tensor.detach() for tensor in (loss, penalty, *whole(seconds))]  # type: ignore


def functions() -> set[type]:
    """Return the Functions of all modules of the runtime."""
    for module in pkgutil.walk_packages(runtime.__path__, f"{runtime.__name__}."):
        importlib.import_module(module.name)
    found, left = set(), [torch.autograd.Function]
    while left:
        for kind in left.pop().__subclasses__():
            left.append(kind)
            if kind.__module__.startswith(f"{runtime.__name__}."):
                found.add(kind)
    return found


def test_every_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """On two ranks, as on one; and each Function's backward pass was differentiated in turn."""
    differentiated = set()

    def noting(kind: Any, backward: Any) -> Any:
        def noted(ctx: Any, *grads: Any) -> Any:
            if torch.is_grad_enabled():
                differentiated.add(kind)
            return backward(ctx, *grads)

        return staticmethod(noted)

    known = functions()
    for kind in known:
        monkeypatch.setattr(kind, "backward", noting(kind, kind.backward))
    for name, case in CASES.items():
        alone = twice(case, SingleGroup())
        every = run_ranks(
            thread_ranks(Mesh(tp=2)), lambda ranks, case=case: twice(case, ranks.world)
        )
        for found in every:
            torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-11, msg=name)
    assert {kind.__name__ for kind in known - differentiated} == set()
