"""Ranks that are called differently say so, in any call, and are not ended by what communicates."""

from __future__ import annotations

import pytest
import torch
from broad_cases import broad
from processes import run_processes
from unlike_calls import (
    calls,
    headers_of_hosts,
    headers_without_hosts,
    host_that_left,
    results_of_python,
)

from autoparallel.parallel.call_headers import checksum


@pytest.mark.parametrize("world_size", [*broad(2), 3])
def test_what_differs_is_said_on_all_ranks(world_size: int) -> None:
    results = run_processes(calls, world_size, world_size, timeout_seconds=300.0)
    words = {
        "values": "were given different inputs: x",
        "one value": "were given different inputs: x",
        "sizes": "the sizes, types or number of the inputs",
        "modes": "the modes of modules",
        "frozen": "the parameters that are trained",
        "attributes": "the program that fits the call",
        "hooks": "hooks for which it runs as Python",
        "gradients": "whether gradients are recorded",
    }
    for rank, said in enumerate(results):
        for name, text in words.items():
            assert text in said[name], (rank, name, said[name])
            assert (
                f"rank {rank}, call of Scores: rank {world_size - 1} and rank 0 differ"
                in (said[name])
            )
        assert said["none"] == ""


def test_samples_tell_of_the_end_of_a_large_input() -> None:
    x = torch.zeros(1000, 100)
    other = x.clone()
    other[-20:] = 1
    assert checksum(x) != checksum(other)
    assert checksum(x.T) == checksum(x.T.contiguous()[:64]) != checksum(other.T)
    assert checksum(x.to("meta")) == 0
    assert checksum(torch.tensor(True)) != checksum(torch.tensor(False))
    assert checksum(torch.ones(3, dtype=torch.bfloat16)) != 0
    z = torch.tensor([1 + 2j, 3 - 1j])
    for lazy in (z.conj(), z.conj().imag):  # conjugated, and negated, when they are read
        assert checksum(lazy) == checksum(lazy.resolve_conj().resolve_neg().clone())
        assert checksum(lazy) not in (checksum(z), checksum(z.imag))


def test_what_python_computes_must_be_the_same_on_all_ranks() -> None:
    for rank, (unlike, alike) in enumerate(run_processes(results_of_python, 2, 2)):
        assert "the ranks have computed different results in Python" in unlike
        assert f"rank {rank}, call of Asking: rank 1 and rank 0 differ" in unlike
        assert "asks time.perf_counter()" in alike


@pytest.mark.parametrize("world_size", [*broad(2), 3])
def test_headers_between_hosts_are_looked_at_one_call_later(world_size: int) -> None:
    """As on NCCL, where a call does not wait for them, but for the first ones."""
    for said in run_processes(headers_of_hosts, world_size, world_size):
        assert [bool(text) for text in said] == [True, False, False, True, False]
        assert "the modes of modules" in said[0]
        assert said[0] == said[3]


@pytest.mark.parametrize("world_size", [*broad(2), 3])
def test_a_group_of_hosts_is_of_all_ranks_or_of_none(world_size: int) -> None:
    """A rank that cannot have it, when it tries alone or with the others, is not waited for."""
    last, what = world_size - 1, "the ranks do not compare how they are called: no gloo group"
    results = run_processes(headers_without_hosts, world_size, world_size, timeout_seconds=60.0)
    for rank, (alone, together, made) in enumerate(results):
        assert made == (True, [])
        assert not alone[0]
        assert not together[0]
        cause = {0: [f"{what} on rank {last}"], last: [f"{what} on rank {last}: no such network"]}
        assert alone[1] == cause.get(rank, [])
        if rank == last:
            assert together[1] == cause[last]
        else:  # they have waited for it in vain
            assert together[1][0].startswith(f"{what} on rank {rank}: ")


def test_a_host_that_is_gone_is_named() -> None:
    for said in run_processes(host_that_left, 3, 3)[:-1]:
        assert "2 did not answer" in said.splitlines()[0]
        assert "all_gather of ranks 0, 1, 2, before a call, where the ranks compare" in said
