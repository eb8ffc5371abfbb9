"""A rank that fails, or is gone, is named by those that wait for it, with the op of the model."""

from __future__ import annotations

import re
import tempfile
from functools import partial

import pytest
import rank_faults
from processes import run_processes
from rank_faults import FAILS, launch


@pytest.fixture(scope="module")
def said() -> dict[str, list[tuple[str, str]]]:
    with tempfile.TemporaryDirectory() as folder:
        before = partial(launch, folder)
        (answers,) = run_processes(rank_faults.said, 1, before=before)
    return dict(answers)


Said = dict[str, list[tuple[str, str]]]
waiting = pytest.mark.parametrize("rank", [0, 1])


@waiting
def test_an_op_that_fails_on_one_rank(said: Said, rank: int) -> None:
    text = said["wrong_token"][FAILS][0]
    # The error stays torch's own; a note says which op of the model it is.
    assert text.startswith("IndexError: index out of range in self\nautoparallel: in `embedding = ")
    assert "(words, " in text
    told = said["wrong_token"][rank][0]
    assert told.startswith("AutoParallelError: rank 2 has failed, and this one waited for it")
    assert "s ago: IndexError: index out of range in self" in told
    assert "in `embedding = " in told.partition("why:")[2]
    # A gather that all ranks had begun may have come to its end before, or not.
    waited = rf"where: rank {rank}, (all_gather|all_reduce) of ranks 0, 1, 2, in `"
    assert re.search(waited, told), told
    assert "called at rank_faults.py:" in told


@waiting
def test_an_error_in_the_backward_pass_of_one_rank(said: Said, rank: int) -> None:
    assert said["failing_hook"][FAILS][0] == "ValueError: a hook of one rank"
    told = said["failing_hook"][rank][0]
    assert told.startswith("AutoParallelError: rank 2 has failed, and this one waited for it")
    assert "ValueError: a hook of one rank, at rank_faults.py:" in told
    assert "in the backward pass of `" in told
    # The gradient of a parameter, which is waited for later than it was sent.
    assert "= begin(" in told
    assert "(the parameter " in told


@waiting
def test_a_rank_that_is_gone(said: Said, rank: int) -> None:
    told = said["gone"][rank][0]
    assert "in the backward pass of `" in told
    assert "2 did not answer" in told.splitlines()[0]
    told = said["gone_from_a_parameter"][rank][0]
    assert told.startswith("AutoParallelError: ")
    assert "all_gather of full_tensor()" in told
    assert "2 did not answer" in told.splitlines()[0]


@waiting
def test_collectives_of_the_user_are_explained_where_they_end_the_process(
    said: Said, rank: int
) -> None:
    text, written = said["gone_from_a_sum"][rank]
    assert text.startswith("RuntimeError: ")
    assert "\nautoparallel: this rank waited, and rank" in written
    assert "called at rank_faults.py:" in written


@waiting
def test_what_all_ranks_catch_is_forgotten(said: Said, rank: int) -> None:
    told = said["caught_alike"][rank][0]
    assert "2 did not answer" in told.splitlines()[0]
    assert "IndexError" not in told
