"""Rules for ops that have none: found by trial, the same as a person would write, and sound."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import custom_ops
import pytest
import torch
from broad_cases import broad, share_of
from calls import Call, ints, truth, x
from scripts import run_script
from torch import nn

import autoparallel
from autoparallel.discovery.discover import ProbeError, discover
from autoparallel.discovery.strategy_validation import derived, why_wrong
from autoparallel.errors import UnsupportedOpError
from autoparallel.graph.graph import Node, Ref, Value
from autoparallel.placement import Shard
from autoparallel.rewrite.emit import emit
from autoparallel.rules import registry
from autoparallel.rules.rule import OpCall, ShardingRule
from autoparallel.runtime.ranks import thread_ranks
from autoparallel.strategy.rule_matching import match_rules
from autoparallel.view.report import plan_text


def probed(name: str, *args: object, symbolic: dict[int, str] | None = None) -> Call:
    return Call(f"probed.{name}.default", args, {}, symbolic or {})


def rule_of(call: Call) -> ShardingRule:
    example = call.example()
    rule = discover(example.call).rule(example.call)
    assert rule is not None
    return rule


_MEAN = "a b, a b -> (); a by weighted_mean; b by weighted_mean"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read that another run has left behind."""
    monkeypatch.setenv("AUTOPARALLEL_CACHE", str(tmp_path))


SYMBOLIC = {4: "s0", 5: "s1"}
FOUND = [
    (probed("gated", x(4, 5, 12)), "a b (c d) -> a b d; c whole"),
    (probed("gated", x(4, 5, 12), symbolic=SYMBOLIC), "a b (c d) -> a b d; c whole"),
    (
        probed("fused_heads", x(4, 5, 36), 3),
        "a b (c d e) -> a d b e, a d b e, a d b e; c whole; linear in 0",
    ),
    (
        probed("fused_heads", x(4, 5, 576), 12, symbolic=SYMBOLIC),
        "a b (c d e) -> a d b e, a d b e, a d b e; c whole; linear in 0",
    ),
    (
        probed("head_norm", x(4, 5, 12), x(12), 3),
        "a b (c d), (c e) -> a b (c e); d e whole; linear in 1",
    ),
    (probed("scan", x(6, 6, 6), x(6)), "a b c, c -> a d c; b d whole; linear in 0"),
    (probed("magnitude", x(4, 5)), "a b -> a b"),
    (probed("masked_sum", x(5, 5), truth(5, 5)), "a b, a b -> a; b summed; linear in 0"),
    (
        probed("biased_product", x(4, 5, 6), x(6, 6), x(6)),
        "a b c, d e, e -> a b e; c d whole; linear in 0+2, 1+2",
    ),
    (probed("softmax_product", x(4, 4), x(4, 4)), "a b, c d -> a d; b c whole; linear in 1"),
    (probed("merge_heads", x(4, 4, 4, 4)), "a b c d -> a c (b d); linear in 0"),
    (
        probed("merge_heads", x(3, 6, 5, 7), symbolic={3: "s0", 5: "s1"}),
        "a b c d -> a c (b d); linear in 0",
    ),
    (
        probed("lookup", x(4, 9), ints(3, 5, high=9)),
        "a b, c d -> a c d; b by masked_lookup; linear in 0",
    ),
    (
        probed("looped_lookup", x(4, 9), ints(3, 5, high=9)),
        "a b, c d -> a c d; b whole; linear in 0",
    ),
    (probed("token_loss", x(4, 9), ints(4)), "a b, a -> a; b whole"),
    (probed("average", x(4, 5), x(4, 5)), _MEAN),
    (probed("counted_mean", x(4, 5)), "a b -> a; b whole"),
    (probed("power_sum", x(4, 5)), "a b -> a; b by combined_parts"),
    (probed("clipped_by_all", x(4, 5)), "a b -> a b; a b whole"),
    (
        probed("clipped", x(4, 5)),
        "a b -> a b; linear in 0; its backward takes no summands of a gradient",
    ),
]


@pytest.mark.parametrize(("call", "words"), share_of(FOUND, 3), ids=lambda item: str(item)[:60])
def test_rules_of_ops_that_nobody_knows(call: Call, words: str) -> None:
    """Equal sizes do not forge loops; what is found is sound on 4 ranks and at the call's sizes."""
    example = call.example()
    rule = discover(example.call).rule(example.call)
    assert rule is not None
    assert rule.discovered == words
    assert all(rule.reasons[loop] for loop in rule.whole)
    for world_size in (2, 4):
        for strategy in derived(example, rule, world_size):
            wrong = why_wrong(example, strategy, world_size, rule, twice=True)
            assert not wrong, f"{strategy} on {world_size}: {wrong}"


def test_gradients_of_nothing_depend_on_what_others_do() -> None:
    """Else a rank without elements would leave out, in second derivatives, what others send."""
    assert rule_of(probed("magnitude", x(4, 5))).takes_empty
    call = probed("forgetful", x(4, 5))
    rule = rule_of(call)
    assert rule.discovered == "a b -> a b; linear in 0"
    assert not rule.takes_empty
    forgetting = replace(rule, takes_empty=True)
    strategy = next(s for s in derived(call.example(), forgetting, 4) if s.operands[0] == Shard(1))
    found = why_wrong(call.example(), strategy, 4, forgetting, twice=True)
    assert found == "second derivative by seed 0: none comes on rank 3"


REFUSED = {
    "noisy": ((), "gives other results when it is run again"),
    "picky": (("fast",), "failed on probe inputs: ValueError: mode 'fast' is not known"),
    "broken_backward": ((), "failed on probe inputs, in its backward: KeyError"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_ops_that_cannot_be_probed_say_why(name: str) -> None:
    """Random ones, and ones that fail."""
    arguments, why = REFUSED[name]
    value = Value("x", (4, 5), torch.float32, True)
    made = Value("y", (4, 5), torch.float32, True)
    node = Node("y", "call", f"probed.{name}.default", (made,), (Ref("x"), *arguments))
    with pytest.raises(ProbeError) as caught:
        discover(OpCall(node, (value,)))
    assert why in str(caught.value)


def plain(name: str) -> OpCall:
    """A call of an op on one float32 tensor, without running it."""
    value = Value("x", (4, 5), torch.float32, True)
    made = Value("y", (4, 5), torch.float32, True)
    return OpCall(Node("y", "call", f"probed.{name}.default", (made,), (Ref("x"),)), (value,))


def test_an_op_of_one_precision_is_probed_in_it() -> None:
    """The judge is looser then."""
    found = discover(plain("single_only"))
    assert (found.dtype, found.whole, found.linear) == ("float32", (), ())


def test_an_op_without_a_backward_is_proven_forward() -> None:
    """And the rule says so."""
    call = plain("forward_only")
    rule = discover(call).rule(call)
    assert rule is not None
    assert rule.discovered.startswith("a b -> a b; proven forward only: backward failed:")


class Mixer(nn.Module):
    """Ops without rules between products: fused heads, a scan, a gate."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.entry = nn.Linear(8, 3 * width)
        self.scale = nn.Parameter(torch.randn(width))
        self.decay = nn.Parameter(torch.rand(width))
        self.gates = nn.Linear(width, 4 * width)
        self.out = nn.Linear(2 * width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = torch.ops.probed.fused_heads(self.entry(x), self.heads)
        y = torch.ops.probed.merge_heads(q * k + v)
        y = torch.ops.probed.head_norm(y, self.scale, self.heads)
        y = torch.ops.probed.scan(y, self.decay)
        return self.out(torch.ops.probed.gated(self.gates(y)))


@pytest.mark.parametrize("world_size", [*broad(2), 3])
def test_a_model_of_unknown_ops_is_split(world_size: int) -> None:
    """All products are, and outputs and gradients equal those of the unsplit model."""
    torch.manual_seed(0)
    model, inputs = Mixer().double(), torch.randn(3, 5, 8, dtype=torch.float64)
    plan = autoparallel.make_plan(model, world_size, example_inputs=inputs)
    assert plan.split_flops > 0.99
    found = {op.target: op.discovered for op in plan.ops if op.target.startswith("probed.")}
    assert found["probed.gated.default"] == "a b (c d) -> a b d; c whole"
    assert "probed.scan.default" in plan_text(plan)
    result = autoparallel.simulate(
        model, world_size, example_inputs=inputs, plan=plan, backward=lambda y: y.square().sum()
    )
    y = model(inputs)
    y.square().sum().backward()
    torch.testing.assert_close(result.output, y.detach())
    for path, parameter in model.named_parameters():
        torch.testing.assert_close(result.gradients[path], parameter.grad)


class Kernels(nn.Module):
    """A table that is looked up, and reductions to a loss, all by ops of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 40))
        self.out = nn.Linear(12, 6)

    def forward(self, index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        rows = torch.ops.probed.lookup(self.table, index).movedim(0, -1)
        return torch.ops.probed.average(rows * self.out(x).exp(), rows).sqrt()


def test_generic_kernels_in_a_plan() -> None:
    """A table split over its rows, and a mean over split ones: gradients as unsplit."""
    torch.manual_seed(0)
    model = Kernels().double()
    inputs = {"index": torch.arange(8) * 5, "x": torch.randn(8, 12, dtype=torch.float64)}
    plan = autoparallel.make_plan(
        model, 3, example_inputs=inputs, pins={"table": autoparallel.Shard(1)}
    )
    kernels = {op.target: op.kernels for op in plan.ops}
    assert kernels["probed.lookup.default"] == ("masked_lookup",)
    result = autoparallel.simulate(model, 3, example_inputs=inputs, plan=plan)
    loss = model(**inputs)
    loss.backward()
    torch.testing.assert_close(result.output, loss.detach())
    for path, parameter in model.named_parameters():
        torch.testing.assert_close(result.gradients[path], parameter.grad)


class Refused(nn.Module):
    """An op that may draw numbers without saying so, one that takes probabilities alone, and one
    that can be discovered.
    """

    def __init__(self, noisy: bool, detached: bool = False) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.noisy, self.detached = noisy, detached

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.probed.magnitude(self.inner(x))
        if self.noisy:
            y = y + torch.ops.probed.noisy(y.detach() if self.detached else y)
        return torch.ops.probed.entropy(y.softmax(-1)).square().sum()


@pytest.mark.parametrize("detached", [False, True])
def test_offenders_are_listed_with_their_reasons(detached: bool) -> None:
    """What, where, why of each, and the fix. Whether a gradient flows through it or not, an op that
    draws numbers would give each rank others.
    """
    with pytest.raises(UnsupportedOpError) as caught:
        autoparallel.make_plan(Refused(True, detached), 2, example_inputs=torch.zeros(4, 8))
    text = str(caught.value)
    assert "none could be discovered" in text
    assert "probed.noisy.default: the op gives other results when it is run again" in text
    assert "test_discover.py" in text
    assert "register_rule" in text
    assert "unknown_ops='replicate'" not in text
    assert "magnitude" not in text
    assert "entropy" not in text


@pytest.mark.parametrize("world_size", [*broad(2), 3])
def test_an_op_of_which_no_rule_is_found_stays_whole(world_size: int) -> None:
    """The rest is split around it, and the plan says why it is whole."""
    torch.manual_seed(0)
    model, x = Refused(False).double(), torch.randn(4, 8, dtype=torch.float64)
    plan = autoparallel.make_plan(model, world_size, example_inputs=x)
    told = {op.target: op.discovered for op in plan.ops if op.discovered}
    reason = "whole: the op failed on probe inputs: ValueError: rows must sum to 1"
    assert told["probed.entropy.default"].startswith(reason)
    assert f"probed.entropy.default ×1: {reason}" in " ".join(plan_text(plan).split())
    assert any(parameter.storage != (autoparallel.Invariant(),) for parameter in plan.parameters)
    result = autoparallel.simulate(model, plan=plan, example_inputs=x)
    loss = model(x)
    loss.backward()
    torch.testing.assert_close(result.output, loss.detach())
    torch.testing.assert_close(result.gradients["inner.weight"], model.inner.weight.grad)
    assert result.apart == 0.0


class Looped(nn.Module):
    """A parameter that a custom op needs whole."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 24))
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(8, device=x.device)
        return self.inner(x) * torch.ops.probed.looped_lookup(self.table, places)


def test_the_plan_says_why_a_parameter_is_whole() -> None:
    """In the words of the rule that was found."""
    plan = autoparallel.make_plan(Looped(), 2, example_inputs=torch.zeros(4, 8))
    reasons = {parameter.path: parameter.reason for parameter in plan.parameters}
    assert "probed.looped_lookup.default needs it whole: its parts" in reasons["table"]


def test_a_plan_of_unknown_ops_is_applied_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan read from JSON has no rules with it: they are found again."""
    model, inputs = Mixer().double(), torch.randn(3, 5, 8, dtype=torch.float64)
    plan = autoparallel.make_plan(model, 2, example_inputs=inputs)
    read = autoparallel.Plan.from_json(plan.to_json())
    assert read == plan
    monkeypatch.setattr(registry, "_REMEMBERED", {})
    match_rules(plan.captured.graph, set(), plan.options, 2)
    every = thread_ranks(plan.mesh)
    sources = [emit(plan.captured.graph, read, ranks).source for ranks in every]
    assert sources == [emit(plan.captured.graph, plan, ranks).source for ranks in every]
    assert "torch.ops.probed.fused_heads.default(" in sources[0]
    assert ", 2)" in next(line for line in sources[0].splitlines() if "fused_heads.default" in line)


@pytest.mark.parametrize("processes", [1, *broad(2)])
def test_the_example_runs(processes: int, tmp_path: Path) -> None:
    """Its losses are those of the unsplit model, and it shows what it found."""
    root = Path(__file__).parents[2]
    example, variables = root / "examples" / "custom_op.py", {"AUTOPARALLEL_CACHE": str(tmp_path)}
    if processes == 1:
        done = run_script(example, "--steps", "4", folder=root, variables=variables)
    else:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, "-m", *launcher, str(example), "--steps", "4"]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**os.environ, **variables},
            cwd=root,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "found:    a b (c d) -> a b d; c whole" in done.stdout
    assert "found:    a b c, c -> a d c; b d whole; linear in 0" in done.stdout
    assert "gated: S(2, blocks=2) -> S(2)" in done.stdout
    assert list(tmp_path.rglob("*.json"))


assert custom_ops.GATED is not None  # importing it registers the ops
