"""What is dropped after the forward pass and made again: copies, and what blocks compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from autoparallel.mesh import Mesh
from autoparallel.placement import Invariant, Layout, Partial, Replicate, Shard
from autoparallel.runtime import draws, rng
from autoparallel.runtime.again import convert_again, dropping, recomputed
from autoparallel.runtime.collectives import convert
from autoparallel.runtime.layouts import take_layout_part
from autoparallel.runtime.ranks import Ranks, run_ranks, thread_ranks

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
