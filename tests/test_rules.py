"""Every strategy of every rule, run on parts and joined, equals the unsplit op."""

import pytest
import torch
from sample_calls import CALLS

from autoparallel.rules.referee import derived, fault
from autoparallel.rules.registry import find_rule, registered


@pytest.mark.parametrize("target", registered())
def test_every_rule_is_of_an_op(target):
    space, name, overload = target.split(".")
    assert overload in getattr(getattr(torch.ops, space), name).overloads()


def test_every_rule_has_a_sample():
    sampled = {call.target for call in CALLS}
    assert [target for target in registered() if target not in sampled] == []


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_every_strategy_is_sound(call):
    """Split the inputs, run the op on each part, join: same values and gradients as unsplit."""
    example = call.example()
    assert all(result.isfinite().all() for result in example.results)
    rule = find_rule(call.target)(example.call)
    faults = []
    for world_size in (2, 3, 4):
        for strategy in derived(example, rule, world_size):
            found = fault(example, strategy, world_size)
            if found:
                faults.append(f"{strategy} on {world_size}: {found}")
    assert faults == []
