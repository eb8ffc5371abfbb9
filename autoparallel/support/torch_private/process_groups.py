"""Groups of processes, what they send, and torch's schedules of pipelines."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "default_store",
    "fake_process_group",
    "flattened_group",
    "functional_collectives",
    "gloo_ranks",
    "let_gloo_end",
    "pipeline_order",
    "set_patience",
]

# The threads in which gloo waits for collectives and runs them, as the system lists them.
_GLOO_THREADS = "pt_gloo_runloop"


def fake_process_group(rank: int, world_size: int) -> None:
    """Start a process group of ranks that do not run: its collectives return at once, with what was
    in the memory. It is for measuring what one rank computes.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=world_size
    )


def functional_collectives() -> Any:
    """Return the ops of torch.distributed that return their results, so that they can be traced.

    They are called by position, and are not differentiable.
    """
    names = ["all_reduce", "all_reduce_", "all_gather_into_tensor", "reduce_scatter_tensor"]
    names += ["all_to_all_single", "wait_tensor"]
    ops = {name: _past_autograd(name) for name in names}
    ops["all_gather_into_tensor"] = _gathers_alone(ops["all_gather_into_tensor"])
    return SimpleNamespace(**ops)


def _gathers_alone(several: Callable[..., Any]) -> Callable[..., Any]:
    """Return the gather that takes one tensor and not a list of them, as `several` does inside.

    The threads of gloo share, without a lock, a string with the name of the op that ended last. The
    long name of a gather of a list is allocated, and was freed by two of them, which ended the
    process (torch 2.13; AddressSanitizer: a double free in ProcessGroupGloo::runLoop). A name of up
    to 15 letters lies in the string itself. Under a tracer or a counter `several` is called, by its
    usual name.
    """
    from torch.utils._python_dispatch import _get_current_dispatch_mode as current_mode

    direct = torch.ops._c10d_functional.all_gather_into_tensor_out.default._op
    below, is_compiling = torch._C._AutoDispatchBelowAutograd, torch.compiler.is_compiling

    def call(x: torch.Tensor, count: int, group: str) -> Any:
        if is_compiling() or current_mode() is not None:
            return several(x, count, group)
        with below():
            out = x.new_empty((count * x.size(0), *x.shape[1:]))
            if x.is_complex():
                direct(torch.view_as_real(x), count, group, out=torch.view_as_real(out))
            else:
                direct(x, count, group, out=out)
        return out

    return call


def _past_autograd(name: str) -> Callable[..., Any]:
    """Return a collective of torch.distributed that autograd is not told of.

    Torch wraps each of these ops in Python for autograd, which takes longer than all the rest of
    the call. A tracer is given the op itself.
    """
    function = getattr(torch.ops._c10d_functional, name).default
    # The same without a function of Python around it.
    direct, is_compiling = function._op, torch.compiler.is_compiling
    below = torch._C._AutoDispatchBelowAutograd

    def call(*arguments: Any) -> Any:
        if is_compiling():
            return function(*arguments)
        with below():
            return direct(*arguments)

    return call


def default_store() -> Any:
    """Return the store through which the processes of the default process group met."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def gloo_ranks(store: Any, rank: int, world_size: int, patience: timedelta) -> Any:
    """Return gloo's own group of the ranks that meet in a store: it is none of torch's list.

    Torch names the groups of its list by how many a process has, which may differ between ranks.
    patience: how long this waits for the others, and then each collective, but see `set_patience`.
    """
    return torch.distributed.ProcessGroupGloo(store, rank, world_size, patience)


def set_patience(backend: Any, group: Any, least: timedelta) -> None:
    """Have the collectives of gloo's own group wait as long as those of torch's group do.

    least: how long they wait where those wait less, or do not tell.
    """
    waits = [least]
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        waits.append(getattr(options, "_timeout", least))
    backend._set_default_timeout(max(waits))


def let_gloo_end(patience: float = 5.0) -> None:
    """Wait until gloo's threads have let go of the tensors of collectives that are over.

    Such a thread may be the last to hold a tensor. To free it, it takes Python's lock, and where
    the interpreter ends meanwhile, it ends the process: "terminate called without an active
    exception". Those that wait for work, or for another rank, are not waited for. patience: the
    longest time, in seconds. Nothing happens on systems that do not tell of threads.
    """
    calm, end = 0, time.monotonic() + patience
    while calm < 2 and time.monotonic() < end:
        # Threads that are waiting for Python's lock have it meanwhile.
        time.sleep(0.0005)
        calm = 0 if _gloo_runs() else calm + 1


def _gloo_runs() -> bool:
    """Return whether a thread of gloo is running, or waits for no more than a processor."""
    for task in Path("/proc/self/task").glob("*/stat"):
        try:
            name, _, rest = task.read_text().partition(" (")[2].rpartition(") ")
        except OSError:  # it has ended
            continue
        if name == _GLOO_THREADS and rest.startswith("R"):
            return True
    return False


def flattened_group(devices: DeviceMesh) -> Any:
    """Return the process group of all ranks of a mesh of several axes, or of a part of one.

    Where the mesh is a part of another one, all ranks of the larger one must ask for it.
    """
    import torch.distributed as dist

    if devices.size() == dist.get_world_size():
        return dist.group.WORLD
    return devices._flatten().get_group()


def pipeline_order(
    schedule: str, ranks: int, per_rank: int, microbatches: int
) -> list[list[tuple[int, str, int]]]:
    """Return what each rank of a pipeline computes, in order, as (stage, kind, micro-batch).

    schedule: the name of one of torch's classes. kind: "F", "B" or, where a backward pass is in two
    halves, "I" and "W". Raises ValueError for numbers that the class does not take.
    """
    from torch.distributed.pipelining import schedules

    base: Any = getattr(schedules, schedule)

    class Table(base):
        """The schedule without its sends, which take long to be put in and are not asked for."""

        def _prepare_schedule_with_comms(self, *args: Any, **kwargs: Any) -> None:
            """Leave the table as it is."""

    stage = SimpleNamespace(
        group_size=ranks,
        group_rank=0,
        num_stages=ranks * per_rank,
        is_first=True,
        is_last=False,
        stage_index=0,
        submod=None,
    )
    several = issubclass(base, schedules.PipelineScheduleMulti)
    table = Table([stage] * per_rank if several else stage, microbatches, loss_fn=None)
    orders: list[list[tuple[int, str, int]]] = []
    for rank in range(ranks):
        orders.append([])
        for action in table.pipeline_order[rank]:
            both = () if action is None else action.sub_actions or (action,)
            orders[-1] += [
                (each.stage_index, each.computation_type.value, each.microbatch_index)
                for each in both
                if each.computation_type.value in ("F", "B", "I", "W")
            ]
    return orders
