"""Ranks that are called differently say so, in any call, and are not ended by what communicates."""

from __future__ import annotations

import pytest
import torch
from processes import run_processes
from unlike_calls import calls, headers_of_hosts, results_of_python

from autoparallel.parallel.call_headers import checksum


@pytest.mark.parametrize("world_size", [2, 3])
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


@pytest.mark.parametrize("world_size", [2, 3])
def test_headers_between_hosts_are_looked_at_one_call_later(world_size: int) -> None:
    """As on NCCL, where a call does not wait for them, but for the first ones."""
    for said in run_processes(headers_of_hosts, world_size, world_size):
        assert [bool(text) for text in said] == [True, False, False, True, False]
        assert "the modes of modules" in said[0]
        assert said[0] == said[3]
