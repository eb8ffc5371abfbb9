"""Conversions in two halves, and late products: values, gradients of any order, and their order."""

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from noting_groups import NotedOps, NotedProducts, NotingGroup
from torch.nn import functional

from autoparallel.mesh import Mesh
from autoparallel.placement import (
    Invariant,
    Partial,
    Placement,
    Replicate,
    Shard,
    local_size,
)
from autoparallel.runtime import overlap, products
from autoparallel.runtime.collectives import convert
from autoparallel.runtime.groups import Group, SingleGroup
from autoparallel.runtime.ranks import run_ranks, thread_ranks
from autoparallel.runtime.recompute import recomputed

CONVERSIONS = [
    (Invariant(), Replicate()),
    (Partial(), Invariant()),
    (Partial(), Shard(1)),
    (Shard(0), Replicate()),
    (Shard(1), Replicate()),
    (Shard(0), Shard(1)),
]


def on_ranks(world_size: int, work: Callable[[Group], Any]) -> list[Any]:
    return run_ranks(thread_ranks(Mesh(tp=world_size)), lambda ranks: work(ranks.world))


def plain_linear(x: Any, weight: Any, bias: Any, **_: Any) -> Any:
    return functional.linear(x, weight, bias)


def both(group: Group, source: Placement, target: Placement, way: str) -> list[torch.Tensor]:
    """A conversion, two products that read it, a sum, and what comes of it up to third order.

    way: "numbered" and "filled" are late products; "plain" ones are not.
    """
    generator = torch.Generator().manual_seed(group.rank)
    leaves = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((6, 6), (5, 6), (5,), (6, 4))
    ]
    x, weight, bias, matrix = leaves
    if way == "filled":
        cut = matrix[:6]
        weights = [(weight, bias), (cut, None)]
        moved, gap = overlap.convert_filled(x.sin(), group, source, target, 6, weights)
        left = overlap.linear(moved, weight, bias, gap=gap, place=0)
        right = overlap.mm(moved[:, :6], cut, gap=gap, place=1)
    elif way == "numbered":
        moved = overlap.convert(x.sin(), group, source, target, 6, 1)
        left = overlap.linear(moved, weight, bias, gap=1)
        right = overlap.mm(moved[:, : matrix.size(0)], matrix[: moved.size(1)], gap=1)
    else:
        moved = convert(x.sin(), group, source, target, 6)
        left = functional.linear(moved, weight, bias)
        right = moved[:, : matrix.size(0)].mm(matrix[: moved.size(1)])
    loss = left.pow(3).sum() + right.pow(2).sum() + moved.sum()
    found = [loss, *torch.autograd.grad(loss, leaves, retain_graph=True)]
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    found += first
    found += torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves, retain_graph=True)
    # A second pass of the same graph, and one that wants a weight's gradient alone.
    found += torch.autograd.grad(loss, [weight], retain_graph=True)
    loss.backward()
    return [tensor.detach() for tensor in (*found, *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize("way", ["numbered", "filled"])
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("source", "target"), CONVERSIONS[:1] + CONVERSIONS[3:4], ids=str)
def test_late_products_have_the_plain_ones_derivatives(source, target, world_size, way):
    late = on_ranks(world_size, lambda group: both(group, source, target, way))
    plain = on_ranks(world_size, lambda group: both(group, source, target, "plain"))
    for ours, theirs in zip(late, plain, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def chain(
    group: Group, size: int, outermost: bool, joined: bool, inside: bool = False
) -> list[torch.Tensor]:
    """Two products between parts of a sequence, as Megatron has them, a third one, and derivatives
    up to the second order. joined: with conversions and products in one node. inside: the parts are
    between the two products, and wholes around them.
    """
    generator = torch.Generator().manual_seed(group.rank)
    split = Shard(1, outermost=outermost)
    part = local_size(size, split, group.world_size, group.rank)
    leaves = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, size if inside else part, 6), (4, 6), (4,), (6, 4), (3, 6))
    ]
    x, up, bias, down, last = leaves
    gather, scatter = (group, split, Replicate(), size), (group, Partial(), split, 0)
    if inside:
        gather, scatter = scatter, gather
    if joined:
        weights = [(up, bias), (down, None)]
        first, gap = overlap.convert_then_linear(x.sin(), *gather, weights)
        parts, gap = overlap.linear_then_convert(
            first.tanh(), down, *scatter, [(last, None)], gap=gap, place=1
        )
        result = overlap.linear(parts, last, gap=gap, place=0)
    else:
        first = functional.linear(convert(x.sin(), *gather), up, bias)
        result = functional.linear(convert(functional.linear(first.tanh(), down), *scatter), last)
    loss = result.pow(3).sum()
    found = [loss, *torch.autograd.grad(loss, leaves, retain_graph=True)]
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    found += torch.autograd.grad(sum(g.pow(2).sum() for g in grads), leaves, retain_graph=True)
    found += torch.autograd.grad(loss, [down], retain_graph=True)
    return [tensor.detach() for tensor in found]


@pytest.mark.parametrize("inside", [False, True], ids=["parts-outside", "parts-inside"])
@pytest.mark.parametrize("outermost", [True, False], ids=["outermost", "in-order"])
@pytest.mark.parametrize(("world_size", "size"), [(2, 6), (3, 6), (3, 7)])
def test_a_conversion_and_a_product_in_one_node_have_the_same_derivatives(
    world_size, size, outermost, inside
):
    """Rows that are moved as they lie, those of unequal parts, and those that must be laid out."""
    one = on_ranks(world_size, lambda group: chain(group, size, outermost, True, inside))
    two = on_ranks(world_size, lambda group: chain(group, size, False, False, inside))
    for ours, theirs in zip(one, two, strict=True):
        for found, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def fanned(group: Group, joined: bool, outermost: bool, size: int, way: str) -> list[Any]:
    """A conversion and three products that read it, one of them late in its gap; gradients of first
    and second order.

    way: "all" results are read; "some": the second is not; "frozen": the first weight is; "whole":
    nothing is moved but gradients, and the weights are columns of whole ones.
    """
    generator = torch.Generator().manual_seed(3 + (way == "whole") * group.rank)
    one, two, three, last, bias = leaves = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 4), (3, 4), (5, 4), (2, 5), (5,))
    ]
    one.requires_grad_(way != "frozen")
    whole = torch.randn(2, size, 4, generator=generator, dtype=torch.float64)
    cut = Shard(1)
    first = sum(local_size(size, cut, group.world_size, rank) for rank in range(group.rank))
    own = local_size(size, cut, group.world_size, group.rank)
    x = whole[:, first : first + own].clone().requires_grad_()
    ends = (group, Shard(1, outermost=outermost), Replicate(), size)
    if way == "whole":
        x = torch.linspace(-1, 1, 8 * size, dtype=torch.float64).view(2, size, 4).requires_grad_()
        ends = (group, Invariant(), Replicate(), 0)
    if joined:
        weights = [(one, bias), (two, None), (three, None), (last, None)]
        a, b, c, gap = overlap.convert_then_linear(x.sin(), *ends, weights, 3)
        result = overlap.linear(a.tanh() * c, last, gap=gap, place=3)
    else:
        moved = convert(x.sin(), *ends)
        a, b, c = (
            functional.linear(moved, w, v) for w, v in ((one, bias), (two, None), (three, None))
        )
        result = functional.linear(a.tanh() * c, last)
    loss = result.pow(3).sum() + (0 if way == "some" else b.pow(2).sum())
    wanted = [x, *(leaf for leaf in leaves if leaf.requires_grad)]
    found = [loss, *torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)]
    grads = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
    twice = sum(grad.pow(2).sum() for grad in grads if grad is not None)
    return [*found, *torch.autograd.grad(twice, wanted, allow_unused=True)]


@pytest.mark.parametrize("way", ["all", "some", "frozen", "whole"])
@pytest.mark.parametrize("outermost", [True, False], ids=["outermost", "in-order"])
@pytest.mark.parametrize(("world_size", "size"), [(2, 6), (3, 7)])
def test_products_of_one_tensor_are_one_node_with_the_same_derivatives(
    world_size, size, outermost, way
):
    """Queries, keys and values. A result that nothing reads gives its weight no gradient."""
    one = on_ranks(world_size, lambda group: fanned(group, True, outermost, size, way))
    two = on_ranks(world_size, lambda group: fanned(group, False, False, size, way))
    for ours, theirs in zip(one, two, strict=True):
        for found, expected in zip(ours, theirs, strict=True):
            assert (found is None) == (expected is None)
            if found is not None:
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_gradients_of_one_tensor_are_summed_inside_of_the_products():
    """No sum of whole activations is a node of its own; a matrix has the same as a tensor."""
    notes: dict[bool, list[str]] = {}
    for joined in (True, False):
        x, *weights = (torch.ones(shape, requires_grad=True) for shape in ((6, 4), *[(4, 5)] * 3))
        ends = (SingleGroup(), Invariant(), Replicate(), 0)
        if joined:
            *made, gap = overlap.convert_then_mm(x.sin(), *ends, [(w, None) for w in weights], 3)
            assert gap is None
        else:
            made = [convert(x.sin(), *ends).mm(weight) for weight in weights]
        names = notes[joined] = []
        with NotedOps(names):
            torch.autograd.backward([each.sum() for each in made])
        torch.testing.assert_close(x.grad, 15 * torch.ones(6, 4).cos())
        assert all(torch.allclose(w.grad, torch.ones(6, 4).sin().sum(0)[:, None]) for w in weights)
    assert notes[True].count("aten.addmm_.default") == 2
    assert not any("aten.add." in name for name in notes[True])
    assert any("aten.add." in name for name in notes[False])


@pytest.mark.parametrize("outermost", [True, False], ids=["outermost", "in-order"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_gradient_that_all_ranks_have_alike_is_cut_and_not_summed(world_size, outermost):
    """A gather to what all ranks use alike, and a product with a whole weight."""

    def work(group: Group, joined: bool) -> list[torch.Tensor]:
        weight = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6).requires_grad_()
        x = torch.linspace(group.rank, 3, 24, dtype=torch.float64).view(2, 2, 6).requires_grad_()
        ends = (group, Shard(1, outermost=outermost), Invariant(), 2 * world_size)
        if joined:
            result, _ = overlap.convert_then_linear(x.sin(), *ends, [(weight, None)])
        else:
            result = functional.linear(convert(x.sin(), *ends), weight)
        return [result.detach(), *torch.autograd.grad(result.pow(3).sum(), [x, weight])]

    one = on_ranks(world_size, lambda group: work(group, True))
    two = on_ranks(world_size, lambda group: work(group, False))
    for ours, theirs in zip(one, two, strict=True):
        for found, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_pass_that_failed_leaves_no_gradient_of_a_weight_behind():
    def refuse(grad: torch.Tensor) -> None:
        raise ValueError("stop")

    def work(group: Group) -> list[Any]:
        x, weight = (torch.ones(shape, requires_grad=True) for shape in ((2, 3), (4, 3)))
        ends = (group, Invariant(), Replicate(), 0)
        moved, gap = overlap.convert_filled(x.sin(), *ends, [(weight, None)])
        product = overlap.linear(moved, weight, gap=gap, place=0)
        hook = moved.register_hook(refuse)
        with pytest.raises(ValueError, match="stop"):
            product.sum().backward(retain_graph=True)
        hook.remove()
        # The product is no part of this pass.
        return list(torch.autograd.grad(moved.sum(), [x, weight], allow_unused=True))

    for of_x, of_weight in on_ranks(2, work):
        assert of_weight is None or not of_weight.any()
        torch.testing.assert_close(of_x, 2 * torch.ones(2, 3).cos())


def test_a_gap_outlives_no_program():
    """What autograd keeps for a backward pass that never comes is freed with the results."""
    x, weight = (torch.ones(shape, requires_grad=True) for shape in ((2, 3), (4, 3)))
    before = x.sin()
    kept = weakref.ref(before)
    ends = (SingleGroup(), Invariant(), Replicate(), 0)
    moved, gap = overlap.convert_filled(before, *ends, [(weight, None)])
    result = overlap.linear(moved, weight, gap=gap, place=0)
    del before, moved, gap, result
    assert kept() is None


def in_another_thread(loss: torch.Tensor) -> None:
    """A backward pass as GPUs have it: in a thread of autograd's own."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loss.backward).result()


def after_another_program(loss: torch.Tensor) -> None:
    """A backward pass after a call of another module, which has a gap of the same number."""
    x = torch.ones(2, requires_grad=True)
    overlap.convert(x, SingleGroup(), Invariant(), Replicate(), 0, 1)
    loss.backward()


def after_a_call_without_gradients(loss: torch.Tensor) -> None:
    """A backward pass after a call that makes no gaps."""
    overlap.convert(torch.ones(2), SingleGroup(), Invariant(), Replicate(), 0, 1)
    loss.backward()


PASSES = [in_another_thread, after_another_program, after_a_call_without_gradients]


@pytest.mark.parametrize("late", [True, False], ids=["late", "plain"])
@pytest.mark.parametrize("run_backward", PASSES)
def test_a_recomputed_product_is_late_if_it_was_so(run_backward, late):
    """Otherwise it would keep other tensors than at first, and a checkpoint refuses that."""

    def work(group: Group) -> list[torch.Tensor]:
        shapes = ((2, 3, 6), (5, 6), (5,))
        x, weight, bias = (torch.ones(shape, requires_grad=True) for shape in shapes)
        # There is a gap where a gradient is moved.
        source = x.sin() if late else x.detach().sin()
        moved = overlap.convert(source, group, Invariant(), Replicate(), 0, 1)

        def block(*given: torch.Tensor) -> list[torch.Tensor]:
            return [overlap.linear(*given, gap=1).sin()]

        (result,) = recomputed(block, moved + x, weight, bias)
        run_backward(result.sum())
        return [weight.grad, bias.grad]

    x = torch.ones(2, 3, 6)
    weight, bias = torch.ones(5, 6, requires_grad=True), torch.ones(5, requires_grad=True)
    functional.linear(x.sin() + x, weight, bias).sin().sum().backward()
    for found in on_ranks(2, work):
        torch.testing.assert_close(found, [weight.grad, bias.grad])


def test_one_row_has_no_dims_to_sum_the_gradient_of_a_bias_over():
    def work(group: Group) -> list[torch.Tensor]:
        leaves = [torch.ones(shape, requires_grad=True) for shape in ((3,), (4, 3), (4,))]
        x, weight, bias = leaves
        moved = overlap.convert(x.sin(), group, Invariant(), Replicate(), 0, 1)
        overlap.linear(moved, weight, bias, gap=1).pow(2).sum().backward()
        plain = [leaf.detach().requires_grad_() for leaf in leaves]
        functional.linear(plain[0].sin(), *plain[1:]).pow(2).sum().backward()
        # Each rank's gradient of x is a term of the sum.
        return [leaf.grad / scale for leaf, scale in zip(leaves, (2, 1, 1), strict=True)] + [
            leaf.grad for leaf in plain
        ]

    for found in on_ranks(2, work):
        for one, other in zip(found[:3], found[3:], strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("source", "target"), CONVERSIONS, ids=str)
def test_halves_make_a_conversion(source, target):
    """Forward and backward, with uneven parts; the result may be written to, as any other."""
    shape = [5, 7]

    def work(group: Group, halves: bool) -> list[torch.Tensor]:
        mine = list(shape)
        if isinstance(source, Shard):
            mine[source.dim] = local_size(shape[source.dim], source, 3, group.rank)
        generator = torch.Generator().manual_seed(group.rank)
        x = torch.randn(mine, generator=generator, dtype=torch.float64, requires_grad=True)
        size = shape[source.dim] if isinstance(source, Shard) else 0
        ends = (group, source, target, size)
        moved = overlap.end(overlap.begin(x, *ends)) if halves else convert(x, *ends)
        if isinstance(target, Invariant | Shard):
            moved.mul_(2)
        moved.pow(2).sum().backward()
        return [moved.detach(), x.grad]

    apart, together = (on_ranks(3, partial(work, halves=halves)) for halves in (True, False))
    for one, other in zip(apart, together, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("filled", [True, False], ids=["filled", "numbered"])
def test_weight_gradients_run_while_the_gradient_is_summed(filled):
    """Both products' gradients of x come first, then the all-reduce, then those of the weights."""

    def work(group: Any) -> list[str]:
        notes: list[str] = []
        noting = NotingGroup(group, notes)
        x = torch.ones(2, 3, requires_grad=True)
        weights = [torch.ones(4, 3, requires_grad=True), torch.ones(5, 3, requires_grad=True)]
        before = x.exp()
        ends = (noting, Invariant(), Replicate(), 0)
        gap: Any = 1
        if filled:
            moved, gap = overlap.convert_filled(before, *ends, [(w, None) for w in weights])
        else:
            moved = overlap.convert(before, *ends, gap)
        first, second = (
            overlap.linear(moved, weight, gap=gap, place=place)
            for place, weight in enumerate(weights)
        )
        loss = first.sum() + second.sum()
        with NotedProducts(notes):
            loss.backward()
        return notes

    order = ["(2, 3)", "(2, 3)", "start all_reduce"]
    for notes in on_ranks(2, work):
        assert notes[:3] == order
        assert sorted(notes[3:5]) == ["(4, 3)", "(5, 3)"]
        assert notes[5:] == ["wait all_reduce"]


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_sum_has_one_order_also_where_a_rank_has_no_part(world_size):
    """Its summand is zeros, and tells nothing of the order in which the others lie in memory."""

    def work(group: Group) -> tuple[torch.Tensor, ...]:
        columns = 2 if group.rank < world_size - 1 else 0
        x = torch.arange(24.0).view(3, 4, 2).transpose(0, 1)[..., :columns].requires_grad_()
        weight = torch.arange(10.0).view(5, 2)[:, :columns].clone().requires_grad_()
        moved = overlap.convert(x, group, Invariant(), Replicate(), 0, 1)
        summed = overlap.linear(moved, weight, gap=1, group=group)
        return summed, convert(functional.linear(x, weight), group, Partial(), Invariant())

    for summed, plain in on_ranks(world_size, work):
        torch.testing.assert_close(summed, plain, rtol=0, atol=0)


def test_a_product_is_summed_in_pieces(monkeypatch):
    """Each piece is on its way while the next is computed; the sum is that of all ranks."""
    monkeypatch.setattr(products, "_PIECE_NBYTES", 3 * 4 * 8)

    def work(group: Any) -> tuple[list[str], list[torch.Tensor]]:
        notes: list[str] = []
        noting = NotingGroup(group, notes)
        generator = torch.Generator().manual_seed(group.rank)
        x, weight = (
            torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
            for shape in ((2, 4, 3), (4, 3))
        )
        moved = overlap.convert(x, group, Invariant(), Replicate(), 0, 1)
        with NotedProducts(notes):
            summed = overlap.linear(moved, weight, gap=1, group=noting)
        plain = convert(functional.linear(moved, weight), group, Partial(), Invariant())
        found = [summed, plain]
        for total in found[:2]:
            found += torch.autograd.grad(total.pow(2).sum(), [x, weight], retain_graph=True)
        return notes, found

    for notes, found in on_ranks(3, work):
        assert notes == ["(4, 4)", "start all_reduce"] * 2 + ["wait all_reduce"] * 2
        summed, plain, *gradients = found
        torch.testing.assert_close(summed, plain, rtol=1e-13, atol=1e-13)
        for one, other in zip(gradients[:2], gradients[2:], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
