"""The helper that starts processes returns what they return and says why they failed."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from processes import run_processes


def add_up(rank: int, offset: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor([rank + offset])
    dist.all_reduce(total)
    return rank, total


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
