"""Families beyond the zoo: loss, outputs, gradients and buffers equal the unsplit module's.

Without dropout, the unsplit module is the user's own; with dropout, it is ours on one rank, which
draws the same masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import family_checks as checks
import more_families
import pytest
from broad_cases import share_of

from autoparallel.mesh import Mesh

TOLERANCE = 1e-9
DROPOUT = 0.1
FAMILIES = more_families.FAMILIES
# One of each kind: a decoder, an encoder, both, sounds, images, documents, series, diffusion.
DROPPING = ["gpt-bigcode", "distilbert", "m2m-100", "wav2vec2"]
DROPPING += ["segformer", "layoutlmv3", "patchtst", "dit"]

SMOKE = [("qwen2", Mesh(dp=2, tp=2)), ("roberta", 3), ("deit", 2)]


@cache
def installed(library: str) -> bool:
    return more_families.is_installed(library)


@pytest.fixture(autouse=True)
def _one_family_at_a_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """Skip families of libraries that are missing, and keep no more than two traces."""
    library = FAMILIES[request.node.callspec.params["name"]].library
    if not installed(library):
        pytest.skip(f"{library} is not installed")
    yield
    if checks.traced.cache_info().currsize > 2:
        checks.traced.cache_clear()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("name", "ranks"), share_of(SMOKE, 2), ids=str)
def test_some_of_each_kind(name: str, ranks: int | Mesh) -> None:
    """The quick ones of the sweep below, in `make test`."""
    test_split_equals_the_users_module(name, ranks)


@pytest.mark.broad
@pytest.mark.filterwarnings("default")  # the libraries' own
@pytest.mark.parametrize("ranks", [2, 3, Mesh(dp=2, tp=2)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_split_equals_the_users_module(name: str, ranks: int | Mesh) -> None:
    step, apart = checks.simulated(name, checks.plan_for(name, ranks))
    errors = checks.errors_of(step, checks.unsplit(name))
    assert errors.worst < TOLERANCE, errors
    assert apart < TOLERANCE


@pytest.mark.broad
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", DROPPING)
def test_dropout_does_not_depend_on_the_plan(name: str, world_size: int) -> None:
    steps = [
        checks.simulated(name, checks.plan_for(name, size, DROPOUT), DROPOUT)[0]
        for size in (world_size, 1)
    ]
    errors = checks.errors_of(*steps)
    assert errors.worst < TOLERANCE, errors
