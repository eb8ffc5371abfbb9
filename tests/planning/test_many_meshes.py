"""Of many meshes, those are planned in full that estimates say are quickest."""

from __future__ import annotations

import pytest
from broad_cases import broad

import autoparallel
from autoparallel.planning import plan_model
from autoparallel.train.models import GPT, GPTConfig


@pytest.mark.parametrize("limited", [*broad(False), True])
def test_many_ops_within_a_limit_are_planned_on_few_meshes(
    limited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan within a limit takes as long as several without."""
    monkeypatch.setattr(plan_model, "_MOST_OPS", 300)
    model = GPT(GPTConfig(layers=6, hidden=64, heads=4, vocabulary=128, positions=32))
    plan = autoparallel.make_plan(
        model,
        8,
        example_inputs=model.example_inputs(batch=16, sequence=32),
        mesh="auto",
        memory_limit="1GiB" if limited else None,
    )
    assert ("left out by estimates" in plan.method) == limited
