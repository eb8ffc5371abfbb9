"""Rules are registered by the op's name, once, and replaced only when asked."""

from __future__ import annotations

import custom_ops
import pytest
import torch
from torch import nn

import autoparallel
from autoparallel import OpCall, ShardingRule
from autoparallel.errors import RuleError, UnsupportedOpError
from autoparallel.rules import registry, user_rules
from autoparallel.rules.lookup import find_rule
from autoparallel.rules.user_rules import needs_proof, register_rule, written_at

assert custom_ops.GATED is not None  # importing it registers the ops
SCAN = "probed.scan.default"


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    monkeypatch.setattr(user_rules, "_WRITTEN_AT", {})
    monkeypatch.setattr(user_rules, "_TO_PROVE", set())


def scan_rule(call: OpCall) -> ShardingRule:
    return ShardingRule.parse("b t c, c -> b t c", call, whole="t", linear=[{0}])


def other_rule(call: OpCall) -> ShardingRule:
    return ShardingRule.parse("b t c, c -> b t c", call, whole="t")


def test_a_registered_rule_is_found_and_is_to_be_proven() -> None:
    """It says where it is written; rules of the project itself are proven by its tests."""
    assert find_rule(SCAN) is None
    assert register_rule(SCAN)(scan_rule) is scan_rule
    assert find_rule(SCAN) is not None
    assert needs_proof(SCAN)
    assert written_at(SCAN).startswith(f"{__file__}:")
    assert not needs_proof("aten.mm.default")


def test_a_rule_is_replaced_only_when_asked() -> None:
    """Whether it is the project's own or was registered."""
    register_rule(SCAN)(scan_rule)
    for target in (SCAN, "aten.mm.default"):
        before = find_rule(target)
        with pytest.raises(RuleError, match="has a sharding rule already") as caught:
            register_rule(target)(other_rule)
        assert "replace=True" in caught.value.fix
        assert find_rule(target) is before
        register_rule(target, replace=True)(other_rule)
        assert find_rule(target) is not before
    assert written_at(SCAN).rsplit(":")[-1] != str(scan_rule.__code__.co_firstlineno)


def test_nothing_is_registered_where_one_of_several_targets_is_refused() -> None:
    """The rules are as they were."""
    with pytest.raises(RuleError):
        register_rule(SCAN, "aten.mm.default")(scan_rule)
    assert find_rule(SCAN) is None


def test_a_trusted_rule_is_not_proven_and_its_replacement_is() -> None:
    """Trust goes with the rule, not with the op."""
    register_rule(SCAN, trusted=True)(scan_rule)
    assert not needs_proof(SCAN)
    register_rule(SCAN, replace=True)(other_rule)
    assert needs_proof(SCAN)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("probed.no_such_op.default", "torch.library.custom_op"),
        ("probed::scan", "namespace.name.default"),
        ("probed.scan", '"probed.scan.default"'),
        ("scan", "torch.library.custom_op"),
    ],
)
def test_what_is_no_op_is_refused(target: str, words: str) -> None:
    """With the name that it has, where there is one."""
    with pytest.raises(RuleError, match="is no op") as caught:
        register_rule(target)(scan_rule)
    assert words in caught.value.fix


def test_the_error_of_an_op_without_a_rule_points_here() -> None:
    """To the function and to the example."""

    class Scans(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decay = nn.Parameter(torch.rand(6))

        def forward(self, x):  # type: ignore[no-untyped-def]
            return torch.ops.probed.scan(x, self.decay)

    x = torch.rand(3, 5, 6)
    with pytest.raises(UnsupportedOpError) as caught:
        autoparallel.make_plan(Scans(), 2, example_inputs=x, unknown_ops="error")
    assert "autoparallel.register_rule" in caught.value.fix
    assert "examples/custom_rule.py" in caught.value.fix
