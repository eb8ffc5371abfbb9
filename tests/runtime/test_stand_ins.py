"""Ranks that hold nothing: what is computed on a stand-in is part of no result and no gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import custom_ops
import pytest
import torch
from broad_cases import broad, share_of
from calls import Call, x
from sample_calls import CALLS
from torch import nn
from torch.nn import functional

import autoparallel
from autoparallel.discovery.strategy_validation import Example, derived, difference, why_wrong
from autoparallel.graph.graph import leaves
from autoparallel.graph.operators import operator_of
from autoparallel.mesh import Mesh
from autoparallel.placement import Invariant, Partial, Placement, Shard, part_bounds
from autoparallel.rules.lookup import find_rule
from autoparallel.rules.rule import ShardingRule
from autoparallel.runtime import discovered_kernels as generic
from autoparallel.runtime import stand_ins as standing
from autoparallel.runtime.axis_parts import take_part
from autoparallel.runtime.ranks import Ranks, run_ranks, thread_ranks


def rule_of(example: Example) -> ShardingRule:
    author = find_rule(example.node.target)
    assert author is not None
    return author(example.call)


def too_many_ranks(size: int) -> int:
    """The fewest ranks of which the last gets nothing of `size`."""
    return next(n for n in range(2, size + 2) if part_bounds(size, n, n - 1)[0] == size)


def short_calls(sample: Call) -> Iterator[tuple[Example, int]]:
    """The call of an op that refuses nothing, with a size that the program takes from its inputs;
    and ranks that are too many for it."""
    rule = rule_of(replace(sample, symbolic={}).example())
    if rule.takes_empty:
        return
    numbers = [leaf for leaf in leaves((sample.args, sample.kwargs)) if isinstance(leaf, int)]
    for loop, size in rule.sizes.items():
        known = rule.whole | set(rule.kernels)  # kernels stand for nothing by themselves
        if loop in known or size in numbers or list(rule.sizes.values()).count(size) > 1:
            continue
        assert isinstance(size, int)
        try:
            example = replace(sample, symbolic={size: "s0"}).example()
        except AssertionError:  # the rule demands a number: it is a weight's size
            continue
        yield example, too_many_ranks(size)


@pytest.mark.parametrize("sample", share_of(CALLS, 5), ids=str)
def test_no_number_of_a_stand_in_counts(sample: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every strategy of every op that refuses nothing is right on ranks that hold nothing, also
    where each number of a stand-in is none: in results, pending sums and all gradients."""

    # Where torch looks up a place that is no number, it reads memory that is not its own.
    number = 2.5 if "grid_sampler" in sample.target else float("nan")

    def poisoned(ctx: Any, part: torch.Tensor, shape: Any) -> torch.Tensor:
        made = plain(ctx, part, shape)
        return made.fill_(number) if made.is_floating_point() else made

    plain = standing._StandIn.forward
    faults = []
    for example, world_size in short_calls(sample):
        with monkeypatch.context() as patch:
            patch.setattr(standing._StandIn, "forward", staticmethod(poisoned))
            for strategy in derived(example, rule_of(example), world_size):
                found = why_wrong(example, strategy, world_size, twice=True)
                if found:
                    faults.append(f"{strategy} on {world_size}: {found}")
    assert faults == []


def test_what_refuses_nothing_was_tried() -> None:
    """Of most such ops, a sample has a size that may be too short."""
    refusing = {
        s.target for s in CALLS if not rule_of(replace(s, symbolic={}).example()).takes_empty
    }
    tried = {sample.target for sample in CALLS if any(short_calls(sample))}
    assert len(tried) > 0.8 * len(refusing)
    assert {"aten.group_norm.default", "aten.conv2d.default", "aten.var.correction"} <= tried
    assert "aten.scaled_dot_product_attention.default" in tried  # with a mask that is trained


def test_a_trained_operand_where_no_gradient_is_recorded() -> None:
    """As of a rank without a row in a call under no_grad."""
    operands = [torch.ones(0, 2), torch.ones(3, requires_grad=True)]
    with torch.no_grad():
        rows, weight = standing.stand_ins_for(operands, [[0], []])
    assert (rows.shape, weight.grad_fn) == ((1, 2), None)


class Head(nn.Module):
    """Rows of twelve numbers, and an op whose gradient on zeros is no number."""

    def __init__(self, op: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.op = op
        self.first = nn.Linear(12, 12)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6, dtype=torch.float64))
        self.offset = nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))
        self.mask = nn.Parameter(torch.linspace(-1, 1, 36, dtype=torch.float64).view(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(self, self.first(x)).square().sum()


def attended(m: Head, x: torch.Tensor) -> torch.Tensor:
    q, k, v = x.view(-1, 2, 6, 1), (x + 1).view(-1, 2, 6, 1), (x * 2).view(-1, 2, 6, 1)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=(m.mask / m.scale))


HEADS: dict[str, Callable[[Head, torch.Tensor], torch.Tensor]] = {
    "group norm": lambda m, x: functional.group_norm(x.view(-1, 6, 2), 2, m.scale, m.offset, 0.0),
    "instance norm": lambda m, x: functional.instance_norm(
        x.view(-1, 6, 2), None, None, m.scale, m.offset, eps=0.0
    ),
    "batch norm": lambda m, x: functional.batch_norm(
        x.view(-1, 6, 2), None, None, m.scale, m.offset, training=True, eps=1e-12
    ),
    "batch norm in evaluation": lambda m, x: functional.batch_norm(
        x.view(-1, 6, 2),
        torch.zeros(6).to(x),
        torch.zeros(6).to(x) + 0.5,
        m.scale,
        m.offset,
        eps=1e-300,
    ),
    "layer norm": lambda m, x: functional.layer_norm(
        x.view(-1, 2, 6), (6,), m.scale, m.offset, 0.0
    ),
    "division": lambda m, x: m.scale / x.view(-1, 2, 6).std((1,), keepdim=True),
    "logarithm": lambda m, x: (x.view(-1, 2, 6).var((1,)) * m.scale).log(),
    "root": lambda m, x: (x.view(-1, 2, 6).var((1,)) * m.scale).sqrt(),
    "norm": lambda m, x: m.scale / torch.linalg.vector_norm(x.view(-1, 2, 6) * m.scale, dim=1),
    "normalize": lambda m, x: functional.normalize(x.view(-1, 2, 6) * m.scale, dim=-1, eps=0.0),
    "cosine similarity": lambda m, x: functional.cosine_similarity(
        x.view(-1, 2, 6), m.offset, dim=-1, eps=0.0
    ),
    "attention": attended,
    "convolution": lambda m, x: functional.conv1d(x.view(-1, 2, 6), m.mask.view(6, 2, 3)).exp(),
    "an op of one's own": lambda m, x: custom_ops.STRICT_RATIO(x.view(-1, 2, 6), m.scale),
    "a pending sum of one's own": lambda m, x: custom_ops.STRICT_SUM(x.view(-1, 2, 6), m.scale),
    "a mean of one's own": lambda m, x: custom_ops.STRICT_MEAN(x.view(-1, 2, 6), m.scale),
    "a reduction of one's own": lambda m, x: custom_ops.STRICT_HIGHEST(x.view(-1, 2, 6)),
}


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("mesh", [*broad(Mesh(dp=3), Mesh(dp=3, tp=2)), Mesh(tp=2, dp=3)], ids=str)
@pytest.mark.parametrize("name", share_of(HEADS, 2))
def test_a_rank_without_rows(name: str, mesh: Mesh, sequence_parallel: bool) -> None:
    """It adds exactly nothing to the gradient of a weight that all have, though on zeros the
    derivative is no number; and to a pending sum."""
    torch.manual_seed(0)
    model, rows = Head(HEADS[name]).double(), torch.randn(2, 12, dtype=torch.float64)
    whole = copy.deepcopy(model)
    loss = whole(rows)
    loss.backward()
    made = autoparallel.simulate(
        model, mesh=mesh, example_inputs=rows, sequence_parallel=sequence_parallel
    )
    torch.testing.assert_close(made.output, loss.detach(), rtol=1e-11, atol=1e-11)
    expected = {path: p.grad for path, p in whole.named_parameters() if p.grad is not None}
    found = {path: made.gradients[path] for path in expected}
    assert all(bool(grad.isfinite().all()) for grad in expected.values())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert made.apart <= 1e-12


KERNELS: dict[str, tuple[Any, str, Any, Placement, Callable[..., tuple[Any, ...]]]] = {
    "a mean": (
        generic.weighted_mean,
        "probed.strict_mean.default",
        ((0, 0),),
        Partial(),
        lambda x, scale: (x, scale),
    ),
    "a reduction of reductions": (
        generic.combined_parts,
        "probed.strict_highest.default",
        (0, 0, (-1, 0, 1)),
        Invariant(),
        lambda x, scale: (x,),
    ),
    "a look-up": (
        generic.masked_lookup,
        "probed.ratio_lookup.default",
        (0, 1, 0, (0,)),
        Partial(),
        lambda x, scale: (x.flatten(1), torch.tensor([3, 1, 3]), scale.repeat(2)),
    ),
}


@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_of_ops_that_refuse_nothing(name: str, world_size: int) -> None:
    """On ranks that hold nothing, and on those that hold nothing of what is looked up: also rows
    at which the derivative is no number, as long as nobody asks for them."""
    kernel, operation, where, result, operands = KERNELS[name]
    numbers, scale = x(4, 2, 6, signs=False).detach(), x(6).detach()
    if name == "a look-up":
        numbers[0] = numbers[2] = 0
    size = numbers.size(0)

    def run(one: torch.Tensor, two: torch.Tensor, group: Any) -> Any:
        one, two = one.clone().requires_grad_(), two.clone().requires_grad_()
        if group is None:
            made = operator_of(operation)(*operands(one, two))
        else:
            made = kernel(
                *operands(one, two), group=group, size=size, operation=operation, where=where
            )
        seed = torch.linspace(-1, 2, made.numel(), dtype=torch.float64).view(made.shape)
        made.backward(seed)
        return made.detach(), one.grad, two.grad

    whole = run(numbers, scale, None)

    def work(ranks: Ranks) -> Any:
        group = ranks.groups[0]
        part = take_part(numbers, Shard(0), group.world_size, group.rank)
        return run(part, scale, group)

    made = run_ranks(thread_ranks(Mesh(dp=world_size)), work)
    assert difference([values for values, _, _ in made], whole[0], result) == ""
    assert difference([grad for _, grad, _ in made], whole[1], Shard(0)) == ""
    if whole[2] is not None:
        assert difference([grad for _, _, grad in made], whole[2], Partial()) == ""


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("what", ["an operand", "a result"])
def test_a_compiled_rank_without_rows_is_one_graph(what: str) -> None:
    """Torch's compiler does not know what has made a tensor that is made in the graph."""

    def run(x: torch.Tensor) -> torch.Tensor:
        made = x * 2
        if what == "an operand":
            (made,) = standing.stand_ins_for([made], [[0]])
            return made.sum()
        return standing.silenced(made, torch.tensor(True)).sum()

    x = torch.zeros(0, 3, requires_grad=True)
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    compiled(x).backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
