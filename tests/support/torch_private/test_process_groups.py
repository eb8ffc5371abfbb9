"""Process groups, and collectives that are functions, are as the adapter says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autoparallel.support import torch_private

ROOT = Path(__file__).parents[3]


def test_a_fake_process_group_has_ranks_that_do_not_run() -> None:
    """In a process of its own, because there is one default group in a process."""
    program = (
        "import torch, torch.distributed as dist\n"
        "from autoparallel.support import torch_private\n"
        "torch_private.fake_process_group(1, 4)\n"
        "x = torch.ones(3)\n"
        "dist.all_reduce(x)\n"
        "print(dist.get_rank(), dist.get_world_size())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", "4"]


def test_functional_collectives_are_past_autograd(mesh_of_this_process) -> None:
    """What calls them has a backward pass of its own."""
    ops, group = torch_private.functional_collectives(), mesh_of_this_process.get_group()
    x = torch.ones(2, requires_grad=True)
    result = ops.wait_tensor(ops.all_reduce(x, "sum", group.group_name))
    assert result.grad_fn is None
    assert not result.requires_grad


def test_functional_collectives_return_what_they_make(mesh_of_this_process) -> None:
    """One rank: every collective is the identity, and leaves its operand alone."""
    ops, group = torch_private.functional_collectives(), mesh_of_this_process.get_group()
    x = torch.arange(6.0).view(1, 6)
    for made in (
        ops.all_reduce(x, "sum", group.group_name),
        ops.all_reduce(x, "max", group.group_name),
        ops.all_gather_into_tensor(x, 1, group.group_name),
        ops.reduce_scatter_tensor(x, "sum", 1, group.group_name),
        ops.all_to_all_single(x.view(-1), [6], [6], group.group_name).view(1, 6),
    ):
        result = ops.wait_tensor(made)
        assert result.data_ptr() != x.data_ptr()
        assert torch.equal(result, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_a_gather_is_none_of_a_list(mesh_of_this_process, dtype: torch.dtype) -> None:
    """The long name of that op was freed by two threads of gloo, which ended the process (seen on
    torch 2.13, in ProcessGroupGloo::runLoop).
    """
    ops, group = torch_private.functional_collectives(), mesh_of_this_process.get_group()
    x = torch.arange(6.0).view(2, 3).to(dtype).requires_grad_()
    with torch.autograd.profiler.profile() as profile:
        gathered = ops.wait_tensor(ops.all_gather_into_tensor(x, 1, group.group_name))
    called = {event.name for event in profile.function_events if event.name.startswith("c10d::")}
    assert called == {"c10d::_allgather_base_"}
    assert torch.equal(gathered, x)
    assert not gathered.requires_grad


def test_pipeline_order() -> None:
    """Torch's tables of passes, of one stage on each rank and of several, whole or in halves."""
    looped = torch_private.pipeline_order("ScheduleInterleaved1F1B", 2, 2, 4)
    assert [len(order) for order in looped] == [16, 16]
    assert looped[1][:3] == [(1, "F", 0), (1, "F", 1), (3, "F", 0)]
    halves = torch_private.pipeline_order("ScheduleInterleavedZeroBubble", 2, 1, 3)
    assert {kind for _, kind, _ in halves[0]} == {"F", "I", "W"}
    alone = torch_private.pipeline_order("ScheduleGPipe", 2, 1, 2)
    assert alone[0] == [(0, "F", 0), (0, "F", 1), (0, "B", 0), (0, "B", 1)]


def test_gloo_s_threads_have_let_go_of_tensors_at_the_end() -> None:
    """A thread of gloo that holds the last reference to a tensor waits for Python's lock as the
    interpreter ends: alone, that ends the process; it is waited for.
    """
    program = (
        "import atexit, sys, time, torch, torch.distributed as dist\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from datetime import timedelta\n"
        "from autoparallel.support import torch_private\n"
        "store, patience = dist.HashStore(), timedelta(seconds=60)\n"
        "with ThreadPoolExecutor(2) as threads:\n"
        "    join = lambda rank: torch_private.gloo_ranks(store, rank, 2, patience)\n"
        "    groups = list(threads.map(join, range(2)))\n"
        "if sys.argv[1:]:\n"
        "    atexit.register(torch_private.let_gloo_end)\n"
        "sys.setswitchinterval(1000)\n"  # this thread keeps the lock
        "for group in groups:\n"
        "    group.allreduce([torch.ones(4)])\n"
        "end = time.perf_counter() + 0.5\n"
        "while time.perf_counter() < end:\n"
        "    pass\n"
    )
    alone, waited = (
        subprocess.run(
            [sys.executable, "-c", program, *given], cwd=ROOT, capture_output=True, text=True
        )
        for given in ((), ("wait",))
    )
    assert "terminate called" in alone.stderr
    assert (waited.returncode, waited.stderr) == (0, "")
