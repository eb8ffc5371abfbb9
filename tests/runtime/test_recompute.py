"""What is dropped after the forward pass and made again: copies, and what blocks compute."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from autoparallel.mesh import Mesh
from autoparallel.placement import Invariant, Layout, Partial, Placement, Replicate, Shard
from autoparallel.runtime import overlap, rng
from autoparallel.runtime import random_ops as draws
from autoparallel.runtime.axis_parts import take_part
from autoparallel.runtime.collectives import convert
from autoparallel.runtime.ranks import Ranks, run_ranks, thread_ranks
from autoparallel.runtime.recompute import convert_again, convert_beside, dropping, recomputed
from autoparallel.runtime.tensor_parts import take_layout_part

S0, R = Shard(0), Replicate()
SEED = 3


def numbers(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


WEIGHT, X = numbers(6, 4), numbers(5, 4)


def on_each(mesh: Mesh, work: Callable[[Ranks], Any]) -> list[Any]:
    return run_ranks(thread_ranks(mesh), work)


def part(whole: torch.Tensor, layout: Layout, ranks: Ranks) -> torch.Tensor:
    own = take_layout_part(whole, layout, ranks.sizes, ranks.coordinates)
    return own.clone().requires_grad_()


def test_a_copy_is_dropped_and_made_again_once() -> None:
    """Though three ops keep it, one of them a view of it; and gradients are those without that."""

    def work(ranks: Ranks) -> None:
        group, weight, x = ranks.groups[0], part(WEIGHT, (S0,), ranks), X.clone().requires_grad_()
        copies = []

        def program(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            w_R = convert_again(w, group, S0, R, 6)
            copies.append(StorageWeakRef(w_R.untyped_storage()))
            return (
                functional.linear(x, w_R) @ w_R.t().reshape(4, 6).t() * 2 + x @ w_R.t() @ w_R
            ).sum()

        made = dropping(program)(x, weight)
        assert copies[0].expired()
        assert ranks.counts == {"all_gather": 1}
        made.backward()
        assert ranks.counts == {"all_gather": 2, "reduce_scatter": 1}
        whole, y = WEIGHT.clone().requires_grad_(), X.clone().requires_grad_()
        (functional.linear(y, whole) @ whole * 2 + y @ whole.t() @ whole).sum().backward()
        assert whole.grad is not None
        expected = take_layout_part(
            whole.grad * ranks.world_size, (S0,), ranks.sizes, ranks.coordinates
        )
        torch.testing.assert_close(weight.grad, expected)
        torch.testing.assert_close(x.grad, y.grad)

    on_each(Mesh(tp=2), work)


def test_ranks_make_the_same_copies_again() -> None:
    """Also where the first one could keep what the others replace by zeros: both copies are used,
    and what they come from is gathered equally often on all ranks."""

    def work(ranks: Ranks) -> Any:
        group, weight = ranks.groups[0], part(WEIGHT, (S0,), ranks)

        def program(w: torch.Tensor) -> torch.Tensor:
            w_R = convert_again(w, group, S0, R, 6)
            w_P = convert_again(w_R, group, R, Partial())
            pending = convert((w_P * w.detach().sum()).tanh() @ w_P.t(), group, Partial(), R)
            return (w_R * w_R).sum() + pending.sum()

        dropping(program)(weight).backward()
        return dict(ranks.counts)

    first, *others = on_each(Mesh(tp=3), work)
    assert first["all_gather"] > 1
    assert all(counts == first for counts in others)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_parts_that_are_not_alike_are_made_again_alike(dim: int, turned: bool) -> None:
    """A product keeps a copy of what has gaps, and of what lies in larger memory and not in order:
    a part that was padded on its way would be made again by the longest rank alone."""

    def work(ranks: Ranks) -> Any:
        group = ranks.groups[0]
        leaf = numbers(7, 7, 7).requires_grad_()
        weight = numbers(7, (4, 3)[group.rank] if dim == 2 else 7).requires_grad_()

        def program(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            pending = overlap.convert(x, group, R, Partial(), 0, 1)
            x_S = convert_again(pending, group, Partial(), Shard(dim))
            x_S = x_S.transpose(0, 1) if turned else x_S
            return overlap.linear(x_S, weight, gap=1).sum()

        dropping(program)(leaf, weight).backward()
        return dict(ranks.counts)

    first, second = on_each(Mesh(tp=2), work)
    assert first["reduce_scatter"] == 2
    assert first == second


def test_a_copy_of_a_view_of_a_copy() -> None:
    """Step by step, from the part that is kept."""

    def work(ranks: Ranks) -> None:
        outer, inner = ranks.groups
        weight = part(WEIGHT, (S0, Shard(1)), ranks)
        copies = []

        def program(w: torch.Tensor) -> torch.Tensor:
            first = convert_again(w, inner, Shard(1), R, 4)
            turned = first.t()
            second = convert_again(turned, outer, Shard(1), R, 6)
            copies.extend(StorageWeakRef(own.untyped_storage()) for own in (first, second))
            return (second * second * second).sum()

        made = dropping(program)(weight)
        ranks.world.all_reduce(torch.zeros(1))  # the other ranks have let go of it too
        assert all(copy.expired() for copy in copies)
        made.backward()
        whole = (3 * WEIGHT**2) * ranks.world_size
        torch.testing.assert_close(weight.grad, part(whole, (S0, Shard(1)), ranks).detach())
        assert ranks.counts["all_gather"] == 4

    on_each(Mesh(a=3, b=2), work)


class _Kept(torch.autograd.Function):
    """Keeps a tensor, and demands in the backward pass that it comes back as it was."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.expected, ctx.strides, ctx.bit = x.detach().clone(), x.stride(), x.is_conj()
        return torch.zeros((), dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        assert torch.equal(x, ctx.expected)
        assert (x.stride(), x.is_conj()) == (ctx.strides, ctx.bit)
        return torch.zeros_like(x)


Lies = Callable[[torch.Tensor], torch.Tensor]
# Ways to lie in memory, of a tensor of 2 x 7 x 4 made from one of 14 x 4 or from one of its rows.
LIES: dict[str, Lies] = {
    "in its own": lambda x: x.unflatten(0, (2, 7)),
    "behind others": lambda x: torch.cat([x + 1, x]).chunk(2)[1].unflatten(0, (2, 7)),
    "in every other place": lambda x: x.repeat_interleave(2, 0)[1::2].unflatten(0, (2, 7)),
    "turned": lambda x: x.t().contiguous().t().unflatten(0, (2, 7)),
    "backwards": lambda x: x.reshape(7, 2, 4).transpose(0, 1),
    "in one place for many": lambda x: x[:7].unsqueeze(0).expand(2, 7, 4),
    "in one place for a whole dim": lambda x: x[:, :1].expand(14, 4).unflatten(0, (2, 7)),
    "in windows that overlap": lambda x: x.flatten().as_strided((2, 7, 4), (4, 2, 1), 3),
}
KEPT: dict[str, Lies] = {
    "all": lambda x: x,
    "turned": lambda x: x.transpose(0, 2),
    "a part": lambda x: x[1:, x.size(1) // 2 :, ::2],
    "no place": lambda x: x[:, :0],
    "one row for many": lambda x: x[:, :1].expand(x.shape),
}
MOVES = [
    (R, Partial()),
    (R, Shard(1)),
    (R, Shard(2, 2)),
    (Partial(), R),
    (Partial(), Shard(1)),
    (Shard(1), R),
    (Shard(1), Partial()),
    (Shard(1), Shard(2)),
    (Shard(2), Shard(2, 2)),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("move", MOVES, ids=lambda move: " to ".join(map(str, move)))
def test_what_is_made_again_lies_as_what_was_dropped(
    move: tuple[Placement, Placement], world_size: int, dtype: torch.dtype
) -> None:
    """Whatever the source lies like, on every rank: one of them may keep what others replace."""
    source, target = move

    def work(ranks: Ranks) -> None:
        group = ranks.groups[0]
        base = numbers(14, 4).to(dtype)
        base = base * (2 + 1j) if dtype.is_complex else base

        def program(leaf: torch.Tensor, lies: Lies, again: bool) -> torch.Tensor:
            x = leaf
            if again:
                x = convert_again(x * (group.rank + 1), group, Partial(), R)
            x, size = lies(x), 0
            if isinstance(source, Shard):
                size = x.size(source.dim)
                x = take_part(x, source, world_size, group.rank)
            made = convert_again(x, group, source, target, size)
            kept = [view(made) for view in KEPT.values()]
            if dtype.is_complex:
                kept += [made.conj(), made.conj().imag, torch.view_as_real(made)[..., 1]]
            return torch.stack([_Kept.apply(view) for view in kept]).sum()

        for lies, again in itertools.product(LIES.values(), (False, True)):
            leaf = base.clone().requires_grad_()
            dropping(program)(leaf, lies, again).backward()

    on_each(Mesh(tp=world_size), work)


def test_a_copy_that_is_written_to_is_kept() -> None:
    """What lies there then is not what would be made again."""

    def work(ranks: Ranks) -> None:
        weight = part(WEIGHT, (S0,), ranks)

        def program(w: torch.Tensor) -> torch.Tensor:
            w_R = convert_again(w, ranks.groups[0], S0, R, 6)
            w_R.mul_(3)
            return (w_R * w_R).sum()

        dropping(program)(weight).backward()
        whole = 18 * WEIGHT * ranks.world_size
        torch.testing.assert_close(weight.grad, part(whole, (S0,), ranks).detach())

    on_each(Mesh(tp=2), work)


def test_writing_to_what_is_kept_is_refused() -> None:
    """To what a copy is made from, and to what autograd keeps as always."""

    def work(ranks: Ranks) -> list[str]:
        found = []
        for written in (0, 1):
            weight, x = part(WEIGHT, (S0,), ranks), X.clone().requires_grad_()
            own = (weight.detach(), x.detach())

            def program(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
                return functional.linear(x, convert_again(w, ranks.groups[0], S0, R, 6)).sum()

            made = dropping(program)(x, weight)
            own[written].add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                made.backward()
            found.append("refused")
        return found

    assert on_each(Mesh(tp=2), work) == [["refused"] * 2] * 2


def test_results_are_freed() -> None:
    """A result that its own maker keeps (that of exp) does not hold on to itself."""
    x = X.clone().requires_grad_()
    results = []

    def program(x: torch.Tensor) -> torch.Tensor:
        results.append(StorageWeakRef((y := x.exp()).untyped_storage()))
        return y.sum()

    made = dropping(program)(x)
    assert not results[0].expired()
    del made
    assert results[0].expired()


def test_somebody_else_checkpoints() -> None:
    """The whole program, copies and all, runs again; nothing is made a third time."""

    def work(ranks: Ranks) -> None:
        weight, x = part(WEIGHT, (S0,), ranks), X.clone().requires_grad_()

        def program(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return functional.linear(x.exp(), convert_again(w, ranks.groups[0], S0, R, 6)).sin()

        made = checkpoint(dropping(program), x, weight, use_reentrant=False)
        made.sum().backward()
        assert ranks.counts == {"all_gather": 2, "reduce_scatter": 1}
        y = X.clone().requires_grad_()
        functional.linear(y.exp(), WEIGHT).sin().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)

    on_each(Mesh(tp=2), work)


@pytest.mark.parametrize("mode", ["counter", "fast"])
def test_a_block_draws_again_what_it_drew(mode: str) -> None:
    """Whatever was drawn before and after it, and however often the backward pass runs."""

    def work(ranks: Ranks) -> None:
        source = rng.Generator(SEED, mode=mode)
        x = X.clone().requires_grad_()
        masks: list[torch.Tensor] = []

        def drop(y: torch.Tensor, key: int) -> torch.Tensor:
            return draws.dropout(
                y, 0.5, True, key=key, shape=(5, 4), placements=(Invariant(),), ranks=ranks
            )

        def block(y: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
            dropped = drop(y, 2)
            masks.append(dropped.detach() != 0)
            summed = convert(dropped, ranks.groups[0], Partial(), Invariant())
            return [summed.exp() * scale, summed]

        with rng.using(source):
            before = drop(x, 1)
            made, summed = recomputed(block, before, torch.full((), 2.0, requires_grad=True))
            total = drop(made, 3).sum() + summed.sum()
        assert source.step == 1
        with rng.using(source):
            drop(x, 1)
        (first,) = torch.autograd.grad(total, x, retain_graph=True)
        (second,) = torch.autograd.grad(total, x)
        assert len(masks) == 3
        assert torch.equal(first, second)
        assert all(torch.equal(masks[0], mask) for mask in masks)
        assert source.step == 2
        assert ranks.counts["all_reduce"] == 3

    on_each(Mesh(tp=2), work)


def test_a_block_keeps_its_inputs_alone() -> None:
    x = X.clone().requires_grad_()
    inside = []

    def block(y: torch.Tensor) -> list[torch.Tensor]:
        z = y.exp()
        inside.append(StorageWeakRef(z.untyped_storage()))
        return [z.sin()]

    (made,) = recomputed(block, x * 2)
    assert inside[0].expired()
    made.sum().backward()
    torch.testing.assert_close(x.grad, 2 * (2 * X).exp() * (2 * X).exp().cos())


def test_a_block_lies_as_it_did_when_it_is_run_again() -> None:
    """On the rank that keeps what others replace by zeros as on these: ops save the same of it."""

    def work(ranks: Ranks) -> Any:
        strides = []

        def block(x: torch.Tensor) -> list[torch.Tensor]:
            pending = convert_beside(x.sin().chunk(2, -1)[0], ranks.groups[0], R, Partial())
            strides.append(pending.stride())
            return [pending.cos()]

        x = numbers(3, 8).requires_grad_()
        dropping(lambda x: recomputed(block, x)[0].sum())(x).backward()
        return strides

    assert on_each(Mesh(tp=2), work) == [[(4, 1)] * 2] * 2
