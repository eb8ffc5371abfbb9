"""Python's collector of cycles rests while models are traced and planned, and goes on then."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import autoparallel
from autoparallel.capture import global_reads
from autoparallel.errors import CaptureError
from autoparallel.support.paused_collection import paused_collection


@pytest.fixture(params=[True, False], ids=["on", "off"])
def is_on(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Return whether the collector is on as planning begins: a user may have turned it off."""
    before = gc.isenabled()
    (gc.enable if request.param else gc.disable)()
    yield request.param
    (gc.enable if before else gc.disable)()


class Refused(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input * float(super().forward(input).sum())


@pytest.mark.parametrize("kind", [nn.Linear, Refused])
def test_it_rests_until_a_model_is_planned_or_refused(
    kind: type[nn.Linear], is_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bool] = []
    untouched = global_reads.untouched

    @contextmanager
    def noting(*objects: Any) -> Iterator[None]:
        found.append(gc.isenabled())
        with untouched(*objects):
            yield
        found.append(gc.isenabled())

    monkeypatch.setattr(global_reads, "untouched", noting)
    options: dict[str, Any] = {"example_inputs": torch.ones(4, 8), "strict_capture": True}
    if kind is Refused:
        with pytest.raises(CaptureError):
            autoparallel.make_plan(kind(8, 8), 2, **options)
    else:
        autoparallel.make_plan(kind(8, 8), 2, **options)
    assert found
    assert not any(found)
    assert gc.isenabled() == is_on


def test_what_is_made_meanwhile_is_old_and_what_is_frozen_stays_so() -> None:
    """A pass over what is new, right after planning, would look through all that it has made."""
    gc.unfreeze()  # what the tests have frozen as they began
    try:
        made = []
        with paused_collection():
            made += [[number] for number in range(5000)]
        new = {id(one) for age in (0, 1) for one in gc.get_objects(age)}
        assert new.isdisjoint(map(id, made))
    finally:
        gc.freeze()
    frozen = gc.get_freeze_count()
    with paused_collection():
        pass
    assert 0 < frozen <= gc.get_freeze_count()
