"""Gradients over data axes are reduced in buckets, while the backward pass goes on."""

import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from split_ranks import as_unsplit
from torch import nn

from autoparallel.mesh import Mesh
from autoparallel.parallel import uncaptured_python
from autoparallel.parallel.gradient_bucket import GradientBucket
from autoparallel.parallel.gradient_return import GradientReturn
from autoparallel.parallel.gradients_together import local_together
from autoparallel.placement import Invariant, Partial
from autoparallel.runtime.groups import LocalGroup, Result
from autoparallel.runtime.joint_moves import bucket_nbytes
from autoparallel.runtime.ranks import Ranks, run_ranks, thread_ranks


class Stack(nn.Module):
    """Products one after another; one weight is read twice, one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.layers[2].bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.layers, self.layers[1]):
            x = layer(x).sin()
        return x.pow(2).sum()


STARTS: dict[int, int] = {}


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets of two layers at most, and a count of each thread's all-reduces."""
    monkeypatch.setattr(uncaptured_python, "bucket_nbytes", lambda total: 6 * 6 * 8 + 1)
    start = LocalGroup.start_all_reduce_

    def counted(group: LocalGroup, tensor: torch.Tensor) -> Result:
        STARTS[threading.get_ident()] = STARTS.get(threading.get_ident(), 0) + 1
        return start(group, tensor)

    monkeypatch.setattr(LocalGroup, "start_all_reduce_", counted)


def script(model: Any) -> Iterator[Any]:
    """Two passes that accumulate, hooks on parameters, a pass of autograd.grad's."""
    early: list[int] = []
    ran: list[str] = []
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x.requires_grad_()

    def note(grad: torch.Tensor) -> None:
        early.append(STARTS.get(threading.get_ident(), 0) - before)

    for scale in (1.0, 2.0):
        y = x * 1.0
        y.register_hook(note)
        loss = model(y)
        before = STARTS.get(threading.get_ident(), 0)
        (scale * loss).backward()
        yield loss
    first = model.layers[0].weight
    first.register_hook(lambda grad: grad * 3)
    first.register_post_accumulate_grad_hook(lambda parameter: ran.append("after"))
    loss = model(x)
    loss.backward()
    yield loss
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(model(x), trained)
    yield [float(grad.pow(2).sum()) for grad in grads]
    assert ran == ["after"]
    yield early


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("mesh", [Mesh(dp=2), Mesh(dp=3)], ids=str)
@pytest.mark.parametrize("overlap", [True, False], ids=["overlapping", "waiting"])
def test_buckets_have_the_gradients_of_the_unsplit_model(mesh: Mesh, overlap: bool) -> None:
    torch.manual_seed(0)
    model, x = Stack().double(), torch.zeros(6, 6, dtype=torch.float64, requires_grad=True)
    early: list[list[int]] = []

    def without_counts(model: Any) -> Iterator[Any]:
        *steps, counts = script(model)
        early.append(counts)
        yield from steps

    # Buckets are of parameters that every rank holds whole; here, the script sees what it holds.
    whole = ["*.weight on dp is whole", "*.bias on dp is whole"]
    as_unsplit(model, None, (x,), without_counts, mesh=mesh, overlap=overlap, constraints=whole)
    # The unsplit model came first, and reduces nothing.
    assert early[0] == [0, 0]
    # The forward pass adds up the loss, which is not counted; nothing else but the input's gradient
    # and the buckets is added up.
    for counts in early[1:]:
        assert all(count >= 2 for count in counts) if overlap else all(c <= 1 for c in counts)


def test_a_hook_on_one_rank_leaves_buckets_as_they_are() -> None:
    """A gradient that has to wait for its hook alone fills no bucket: elsewhere it does not wait.

    With it, one rank would reduce the first gradient while the other waits for a second one.
    """

    def work(ranks: Ranks) -> list[torch.Tensor]:
        bucket = GradientBucket(ranks, nbytes=4 * 5)
        whole, pending = (Invariant(),), (Partial(),)
        late = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
        hooked = nn.Parameter(torch.ones(4))
        ways = [GradientReturn(tuple(p.shape), pending, pending, whole, bucket) for p in late]
        finished = GradientReturn((4,), whole, whole, whole, bucket)
        if ranks.world.rank == 0:
            hooked.register_hook(lambda grad: grad * 1)
        local = [way.local_of(p, p.data) for way, p in zip(ways, late, strict=True)]
        sums = [(each * 2).sum() for each in (*local, finished.local_of(hooked, hooked.data))]
        torch.stack(sums).sum().backward()
        return [p.grad for p in (*late, hooked) if p.grad is not None]

    for grads in run_ranks(thread_ranks(Mesh(tp=2)), work):
        assert [grad.tolist() for grad in grads] == [[4.0] * 3, [4.0] * 2, [2.0] * 4]


@pytest.mark.parametrize("world_size", [2, 3])
def test_small_gradients_that_wait_come_by_one_node(world_size: int) -> None:
    """One sum over the ranks for all; for one that is asked for by itself, none for the others."""

    def work(ranks: Ranks) -> tuple[list[int], list[list[float]]]:
        bucket = GradientBucket(ranks)
        parameters = [nn.Parameter(torch.ones(size)) for size in (3, 2, 4)]
        ends = (Partial(),), (Partial(),), (Invariant(),)
        ways = [GradientReturn(tuple(each.shape), *ends, bucket) for each in parameters]
        local = local_together(ways, parameters, [each.data for each in parameters])
        assert len({each.grad_fn for each in local.values()}) == 1
        loss = torch.stack([(local[n] * (n + 1)).sum() for n in range(3)]).sum()
        counts = [ranks.counts.get("all_reduce", 0)]
        (asked,) = torch.autograd.grad(loss, parameters[1], retain_graph=True)
        counts.append(ranks.counts["all_reduce"])
        loss.backward(inputs=[parameters[2]], retain_graph=True)
        counts.append(ranks.counts["all_reduce"])
        loss.backward()
        counts.append(ranks.counts["all_reduce"])
        grads = [each.grad for each in parameters if each.grad is not None]
        return counts, [each.tolist() for each in (asked, *grads)]

    for counts, grads in run_ranks(thread_ranks(Mesh(dp=world_size)), work):
        assert counts == [0, 1, 2, 3]
        # The last one was added to twice.
        sums = [(2.0, 2), (1.0, 3), (2.0, 2), (6.0, 4)]
        assert grads == [[factor * world_size] * size for factor, size in sums]


def test_finished_small_gradients_are_given_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is asked for by itself, but where one of them has more to be done for it: a hook, a
    gradient from before, another holder of the same tensor, or a pass that wants some of them.
    """
    asked: list[int] = []
    bring = GradientReturn.bring

    def counted(way: GradientReturn, *arguments: Any) -> Any:
        asked.append(way.number)
        return bring(way, *arguments)

    monkeypatch.setattr(GradientReturn, "bring", counted)
    whole = (Invariant(),)

    def grads(number: int) -> tuple[int, list[Any]]:
        """Return for how many gradients one was asked, and the gradients."""
        bucket = GradientBucket(thread_ranks(Mesh(tp=1))[0])
        parameters = [nn.Parameter(torch.ones(3)) for _ in range(2)]
        ways = [GradientReturn((3,), whole, whole, whole, bucket) for _ in parameters]
        local = local_together(ways, parameters, [each.data for each in parameters])
        first, second = local[0], local[1]
        if number == 1:
            parameters[0].register_hook(lambda grad: grad * 2)
        if number == 2:
            parameters[1].grad = torch.ones(3)
        if number == 3:
            torch.autograd.backward(first + second, torch.full((3,), 2.0))
        else:
            inputs = [parameters[0]] if number == 4 else None
            ((first + second * 3) * 2).sum().backward(inputs=inputs)
        held = [each.grad for each in parameters]
        if all(grad is not None for grad in held):
            assert held[0].data_ptr() != held[1].data_ptr()
        count = len(asked)
        asked.clear()
        return count, [None if grad is None else grad.tolist() for grad in held]

    assert grads(0) == (0, [[2.0] * 3, [6.0] * 3])
    assert grads(1) == (2, [[4.0] * 3, [6.0] * 3])
    assert grads(2) == (2, [[2.0] * 3, [7.0] * 3])
    assert grads(3) == (2, [[2.0] * 3, [2.0] * 3])
    assert grads(4)[1] == [[2.0] * 3, None]


def test_a_gradient_is_not_kept_while_its_sum_is_on_its_way() -> None:
    """It is copied when the reduction begins, and the backward pass needs the memory."""

    def work(ranks: Ranks) -> bool:
        bucket = GradientBucket(ranks, nbytes=1)
        parameters = [nn.Parameter(torch.ones(3)) for _ in range(2)]
        ends = (Partial(),), (Partial(),), (Invariant(),)
        first, second = (
            GradientReturn((3,), *ends, bucket).local_of(each, each.data) for each in parameters
        )
        kept: list[weakref.ref[torch.Tensor]] = []
        alive: list[bool] = []
        early = first * 2
        early.register_hook(lambda grad: alive.append(kept[0]() is not None))
        late = second * 2
        second.register_hook(lambda grad: kept.append(weakref.ref(grad)))
        # The second one's gradient is there first.
        (early.sum() + late.sum()).backward()
        return alive == [False]

    assert all(run_ranks(thread_ranks(Mesh(tp=2)), work))


def test_a_bucket_is_a_quarter_of_the_parameters_within_bounds() -> None:
    assert [bucket_nbytes(2**n) for n in (10, 20, 24, 30)] == [2**20, 2**20, 2**22, 25 * 2**20]
