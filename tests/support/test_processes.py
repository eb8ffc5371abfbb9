"""The helper that starts processes returns what they return and says why they failed."""

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from traces import sharing, traced_once

PREPARED: list[int] = []


def prepare() -> None:
    PREPARED.append(os.getpid())


def prepare_wrongly() -> None:
    raise ZeroDivisionError("it is not prepared")


def tell_what_is_prepared(rank: int) -> tuple[list[int], bool, int, int]:
    total = torch.ones(1, requires_grad=True)
    total.backward()
    dist.all_reduce(total.data)
    return PREPARED, "networkx" in sys.modules, os.getppid(), int(total)


def add_up(rank: int, offset: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor([rank + offset])
    dist.all_reduce(total)
    return rank, total


def tell_whether_traces_are_shared(rank: int) -> bool | None:
    return sharing()


def fail_on_one(rank: int) -> None:
    if rank == 1:
        raise ZeroDivisionError("the rank that failed")
    dist.barrier()


def die_on_one(rank: int) -> None:
    if rank == 1:
        os._exit(7)
    time.sleep(1000)


def never_finish(rank: int) -> None:
    time.sleep(1000)


def test_results_come_in_order() -> None:
    results = run_processes(add_up, 2, 10)
    assert results == [(0, torch.tensor([21])), (1, torch.tensor([21]))]


def test_failure_tells_its_cause() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed.*the rank that failed"):
        run_processes(fail_on_one, 2)


def test_sudden_death_tells_the_exit_code() -> None:
    with pytest.raises(RuntimeError, match=r"exit codes \[None, 7\]"):
        run_processes(die_on_one, 2)


def test_timeout() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\]"):
        run_processes(never_finish, 2, timeout_seconds=2.0)


def test_ranks_are_forks_of_what_is_prepared_once() -> None:
    """What all tests need is imported before, by the server."""
    one, other = run_processes(tell_what_is_prepared, 2, before=prepare)
    assert one == other
    prepared, imported, parent, total = one
    assert prepared == [parent]
    assert imported
    assert total == 2


def test_what_is_prepared_may_fail() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)before all ranks it failed.*it is not prepared"):
        run_processes(add_up, 2, 10, before=prepare_wrongly)


def test_ranks_that_are_forks_fail_alike() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed.*the rank that failed"):
        run_processes(fail_on_one, 2, before=prepare)
    with pytest.raises(RuntimeError, match=r"exit codes \[7\]"):
        run_processes(die_on_one, 2, before=prepare)
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\]"):
        run_processes(never_finish, 2, timeout_seconds=2.0, before=prepare)


@pytest.mark.parametrize("before", [None, int])
def test_ranks_share_traces_as_the_test_does(before) -> None:
    with traced_once(again=False):
        assert run_processes(tell_whether_traces_are_shared, 1, before=before) == [False]
    assert run_processes(tell_whether_traces_are_shared, 1, before=before) == [None]
