"""The counter sees every collective of the process, by hand, functional or inside DTensor."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from processes import run_processes
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from autoparallel.runtime.collective_counter import _KINDS, _NOT_COUNTED, CollectiveCounter

# torch 2.11 has these under their older names, which 2.15 deprecates.
NEW_NAMES = hasattr(dist, "all_gather_single")
all_gather = dist.all_gather_single if NEW_NAMES else dist.all_gather_into_tensor
reduce_scatter = dist.reduce_scatter_single if NEW_NAMES else dist.reduce_scatter_tensor
functional_all_gather = functional.all_gather_single if NEW_NAMES else functional.all_gather_tensor
functional_reduce_scatter = (
    functional.reduce_scatter_single if NEW_NAMES else functional.reduce_scatter_tensor
)
# Several sends and receives in one call: what each of them moves is not looked up.
REFUSED = {"_c10d_functional::batch_p2p_ops"}


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    """A gloo group of this one process."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def counted(function):
    with CollectiveCounter() as counter:
        function()
    return counter


class AllReduceBothWays(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


CALLS = {
    "all_reduce": ("all_reduce", lambda x: dist.all_reduce(x)),
    "all_reduce_async": ("all_reduce", lambda x: dist.all_reduce(x, async_op=True).wait()),
    "all_gather": ("all_gather", lambda x: dist.all_gather([torch.empty_like(x)], x)),
    "all_gather_single": (
        "all_gather",
        lambda x: all_gather(torch.empty_like(x), x),
    ),
    "reduce_scatter": (
        "reduce_scatter",
        lambda x: dist.reduce_scatter(torch.empty_like(x), [x]),
    ),
    "reduce_scatter_single": (
        "reduce_scatter",
        lambda x: reduce_scatter(torch.empty_like(x), x),
    ),
    "all_to_all_single": ("all_to_all", lambda x: dist.all_to_all_single(torch.empty_like(x), x)),
    "broadcast": ("broadcast", lambda x: dist.broadcast(x, 0)),
    "functional_all_reduce": (
        "all_reduce",
        lambda x: functional.all_reduce(x, "sum", dist.group.WORLD).wait(),
    ),
    "functional_all_gather": (
        "all_gather",
        lambda x: functional_all_gather(x, 0, dist.group.WORLD).wait(),
    ),
    "functional_reduce_scatter": (
        "reduce_scatter",
        lambda x: functional_reduce_scatter(x, "sum", 0, dist.group.WORLD).wait(),
    ),
    "functional_all_to_all": (
        "all_to_all",
        lambda x: functional.all_to_all_single(x, None, None, dist.group.WORLD).wait(),
    ),
    "functional_broadcast": (
        "broadcast",
        lambda x: functional.broadcast(x, 0, dist.group.WORLD).wait(),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_call_counts_once_with_its_bytes(name):
    kind, call = CALLS[name]
    counter = counted(lambda: call(torch.ones(4, 3, dtype=torch.float64)))
    assert counter.counts == {kind: 1}
    assert counter.nbytes == 4 * 3 * 8
    assert counter.events == [(kind, 12, (4, 3))]


def test_a_coalesced_call_is_one_call_of_all_its_tensors():
    def call():
        tensors = [torch.ones(5), torch.ones(2, 3)]
        for result in functional.all_reduce_coalesced(tensors, "sum", dist.group.WORLD):
            result.wait()

    counter = counted(call)
    assert counter.counts == {"all_reduce": 1}
    assert counter.events == [("all_reduce", 11, (11,))]
    assert counter.nbytes == 44


def test_backward_counts_as_well():
    x = torch.ones(2, 5, requires_grad=True)
    counter = counted(lambda: AllReduceBothWays.apply(x).sum().backward())
    assert counter.counts == {"all_reduce": 2}
    assert x.grad is not None


def test_barriers_and_waits_do_not_count():
    counter = counted(dist.barrier)
    assert counter.calls == counter.nbytes == 0
    assert counter.counts == {}


def test_nothing_is_counted_outside():
    with CollectiveCounter() as counter:
        pass
    dist.all_reduce(torch.ones(3))
    assert counter.calls == 0


def test_every_collective_of_this_torch_is_known():
    """Whatever torch.distributed may issue is counted, known to move nothing, or refused."""
    names = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    issued = {name for name in names if name.startswith(("c10d::", "_c10d_functional::"))}
    assert len(issued) > 20
    assert issued <= {*_KINDS, *_NOT_COUNTED, *REFUSED}


def count_on_two_ranks(_rank):
    """Events of DTensor's own calls and of direct ones, all of an (8, 3) tensor."""
    mesh = dist.init_device_mesh("cpu", (2,))
    whole, part = torch.arange(24.0).view(8, 3), torch.empty(4, 3)
    split = distribute_tensor(whole, mesh, [Shard(0)])
    pending = DTensor.from_local(whole, mesh, [Partial()])
    with CollectiveCounter() as counter:
        split.redistribute(mesh, [Replicate()]).to_local()
        pending.redistribute(mesh, [Shard(0)]).to_local()
        pending.redistribute(mesh, [Replicate()]).to_local()
        reduce_scatter(part, whole)
        all_gather(whole, part)
    return [tuple(event) for event in counter.events], counter.nbytes


def test_two_processes_report_the_whole_tensors():
    """A gathered or scattered tensor counts whole, not by the rank's part."""
    kinds = ["all_gather", "reduce_scatter", "all_reduce", "reduce_scatter", "all_gather"]
    for events, nbytes in run_processes(count_on_two_ranks, 2):
        assert events == [(kind, 24, (8, 3)) for kind in kinds]
        assert nbytes == 5 * 24 * 4


def test_dtensor_in_one_process():
    mesh = dist.init_device_mesh("cpu", (1,))
    split = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
    counter = counted(lambda: (split @ split.t()).redistribute(mesh, [Replicate()]))
    assert all(event.kind == "all_gather" for event in counter.events)
