"""A rule that somebody registers is proven before it is used, and refused where it is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import custom_ops
import pytest
import torch
from scripts import run_script
from torch import nn

import autoparallel
from autoparallel import OpCall, ShardingRule
from autoparallel.errors import RuleError
from autoparallel.plan import Plan
from autoparallel.planning.plan_check import require_sound
from autoparallel.rules import registry, user_rules
from autoparallel.rules.user_rules import register_rule

assert custom_ops.GATED is not None  # importing it registers the ops
SCAN = "probed.scan.default"
X = torch.rand(3, 5, 8, dtype=torch.float64)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    monkeypatch.setattr(user_rules, "_WRITTEN_AT", {})
    monkeypatch.setattr(user_rules, "_TO_PROVE", set())


class Scans(nn.Module):
    """A recurrence over time between two products."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Linear(8, 12)
        self.decay = nn.Parameter(torch.rand(12))
        self.out = nn.Linear(12, 8)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.ops.probed.scan(self.entry(x), self.decay))


def right(call: OpCall) -> ShardingRule:
    return ShardingRule.parse("b t c, c -> b t c", call, whole="t", linear=[{0}])


def refusal(rule: Callable[[OpCall], ShardingRule], model: nn.Module | None = None) -> RuleError:
    register_rule(SCAN, replace=True)(rule)
    with pytest.raises(RuleError) as caught:
        autoparallel.make_plan(model or Scans(), 2, example_inputs=X)
    assert Path(__file__).name in caught.value.where
    assert "examples/custom_rule.py" in caught.value.fix
    return caught.value


def test_a_right_rule_is_used_and_gives_the_same_numbers() -> None:
    """Loss and every gradient; the rule was written, not found."""
    register_rule(SCAN)(right)
    torch.manual_seed(0)
    model = Scans()
    plan = autoparallel.make_plan(model, 2, example_inputs=X)
    choice = next(op for op in plan.ops if op.target == SCAN)
    assert not choice.discovered
    assert str(choice.results[0][0]) == "S(2)"
    result = autoparallel.simulate(
        model, plan=plan, example_inputs=X, backward=lambda y: y.square().sum()
    )
    y = model(X)
    y.square().sum().backward()
    torch.testing.assert_close(result.output, y.detach(), rtol=0, atol=1e-12)
    for path, parameter in model.named_parameters():
        torch.testing.assert_close(result.gradients[path], parameter.grad, rtol=1e-10, atol=1e-12)


def test_a_split_that_is_wrong_is_named() -> None:
    """Time cannot be split: the second rank does not know what came before."""
    error = refusal(lambda call: ShardingRule.parse("b t c, c -> b t c", call))
    assert "split along 't' as S(1), R -> S(1) on 2 ranks" in error.why
    assert "rank 1 is off by" in error.why


def test_a_sum_that_does_not_pass_is_named() -> None:
    """The op is not linear in the decay."""
    error = refusal(
        lambda call: ShardingRule.parse("b t c, c -> b t c", call, whole="t", linear=[{1}])
    )
    assert "P" in error.why
    assert "the sum over ranks is off" in error.why


def no_empty(x: torch.Tensor) -> torch.Tensor:
    if x.numel() == 0:
        raise ValueError("nothing to work on")
    return x * 2


custom_ops.define("no_empty", "(Tensor x) -> Tensor", no_empty)


class Full(nn.Module):
    """An op that does not run on tensors without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.probed.no_empty(self.inner(x))


def test_an_op_that_needs_elements_must_say_so() -> None:
    """Some ranks would be left with nothing, and fail there."""

    def rule(call: OpCall) -> ShardingRule:
        return ShardingRule.parse("... -> ...", call, linear=[{0}])

    x, target = torch.rand(4, 8), "probed.no_empty.default"
    register_rule(target)(rule)
    with pytest.raises(RuleError, match="nothing to work on"):
        autoparallel.make_plan(Full(), 2, example_inputs=x)
    register_rule(target, replace=True, takes_empty=False)(rule)
    assert autoparallel.make_plan(Full(), 2, example_inputs=x).ops


def test_a_rule_of_an_op_whose_gradients_of_nothing_are_constants() -> None:
    """It must say so: in second derivatives, a rank with nothing would leave out what others
    send."""

    def rule(call: OpCall) -> ShardingRule:
        return ShardingRule.parse("... -> ...", call, linear=[{0}])

    class Forgetful(Full):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.probed.forgetful(self.inner(x))

    x, target = torch.rand(4, 8), "probed.forgetful.default"
    register_rule(target)(rule)
    with pytest.raises(RuleError, match="second derivative by seed 0: none comes on rank"):
        autoparallel.make_plan(Forgetful(), 2, example_inputs=x)
    register_rule(target, replace=True, takes_empty=False)(rule)
    assert autoparallel.make_plan(Forgetful(), 2, example_inputs=x).ops


def test_rules_that_do_not_fit_the_call_are_refused() -> None:
    """By what does not fit."""

    def other_sizes(call: OpCall) -> ShardingRule:
        rule = right(call)
        return ShardingRule(rule.operands, rule.results, {**rule.sizes, "c": 7})

    def fails(call: OpCall) -> ShardingRule:
        raise KeyError("width")

    def nothing(call: OpCall) -> ShardingRule:
        return None  # type: ignore[return-value]

    rules: dict[str, Callable[[OpCall], ShardingRule]] = {
        "names 2 tensors, the call has 3": lambda call: ShardingRule.parse("b t c -> b t c", call),
        "do not make up": other_sizes,
        "KeyError: 'width'": fails,
        "returned NoneType": nothing,
        "names a loop 'z'": lambda call: ShardingRule.parse(
            "b t c, c -> b t c", call, whole=("t", "z")
        ),
        "linear names operand 2": lambda call: ShardingRule.parse(
            "b t c, c -> b t c", call, whole="t", linear=[{2}]
        ),
    }
    for words, rule in rules.items():
        assert words in refusal(rule).why


def test_what_is_claimed_for_these_sizes_alone_is_proven_at_them() -> None:
    """A rule that is right at the small sizes and wrong at the call's is not let through."""

    def depends(call: OpCall) -> ShardingRule:
        width = call.operands[1].shape[0]
        return ShardingRule.parse("b t c, c -> b t c", call, whole=() if width == 12 else "t")

    assert "split along 't'" in refusal(depends).why

    def harmless(call: OpCall) -> ShardingRule:
        width = call.operands[1].shape[0]
        return ShardingRule.parse("b t c, c -> b t c", call, whole="t" if width == 12 else "btc")

    register_rule(SCAN, replace=True)(harmless)
    plan = autoparallel.make_plan(Scans(), 2, example_inputs=X)
    assert str(next(op for op in plan.ops if op.target == SCAN).results[0][0]) == "S(2)"


class Noisy(nn.Module):
    """An op that cannot be proven: it gives other results when it is run again."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.probed.noisy(self.inner(x))


def test_what_cannot_be_proven_is_refused_unless_the_author_vouches_for_it() -> None:
    """And the error says how to vouch."""

    def rule(call: OpCall) -> ShardingRule:
        return ShardingRule.parse("... -> ...", call)

    x = torch.rand(4, 8)
    register_rule("probed.noisy.default")(rule)
    with pytest.raises(RuleError) as caught:
        autoparallel.make_plan(Noisy(), 2, example_inputs=x)
    assert "cannot be proven" in caught.value.why
    assert "trusted=True" in caught.value.why
    register_rule("probed.noisy.default", replace=True, trusted=True)(rule)
    plan = autoparallel.make_plan(Noisy(), 2, example_inputs=x)
    assert plan.ops


def test_claims_that_no_run_can_show_are_refused() -> None:
    """A bias that the op adds is fused by the emitter without a trial."""

    def rule(call: OpCall) -> ShardingRule:
        return replace(right(call), takes_bias=True)

    assert "takes_bias cannot be proven" in refusal(rule).why


def test_a_plan_from_elsewhere_is_not_followed_by_a_wrong_rule() -> None:
    """The rule of the process that applies a plan is the one that is proven."""
    register_rule(SCAN)(right)
    plan = autoparallel.make_plan(Scans(), 2, example_inputs=X)
    require_sound(plan, Scans())
    register_rule(SCAN, replace=True)(lambda call: ShardingRule.parse("b t c, c -> b t c", call))
    with pytest.raises(RuleError, match="cannot be used"):
        require_sound(plan, Scans())
    assert Plan.from_json(plan.to_json()) == plan


def test_the_example_runs() -> None:
    """It plans by its rule, and shows how a wrong one is refused."""
    root = Path(__file__).parents[2]
    done = run_script(root / "examples" / "custom_rule.py", folder=root)
    assert done.returncode == 0, done.stderr
    assert "planned:  decayed_sum: S(2), S(0) -> S(2)" in done.stdout
    assert "split along 't' as S(1), R -> S(1) on 2 ranks" in done.stdout
