"""Every strategy of every rule, run on parts and joined, equals the unsplit op."""

from dataclasses import replace

import pytest
import torch
from broad_cases import one_of_each
from calls import call, x
from sample_calls import CALLS

from autoparallel.discovery.strategy_validation import derived, uneven_parts, why_wrong
from autoparallel.placement import Invariant, Partial, Replicate, Shard
from autoparallel.rules.lookup import find_rule, registered
from autoparallel.rules.ops.pointwise import pointwise
from autoparallel.rules.rule import ShardingRule
from autoparallel.rules.strategies import Strategy

EMPTY_INDEX = "cannot reshape tensor of 0 elements"


@pytest.mark.parametrize("target", registered())
def test_every_rule_is_of_an_op(target):
    space, name, overload = target.split(".")
    assert overload in getattr(getattr(torch.ops, space), name).overloads()


def test_every_rule_has_a_sample():
    sampled = {call.target for call in CALLS}
    assert [target for target in registered() if target not in sampled] == []


# Each op once, and of its other samples some.
FIRST = {id(next(call for call in CALLS if call.target == target)) for target in registered()}
SOME = {*FIRST, *map(id, CALLS[::3])}


@pytest.mark.parametrize("call", one_of_each(CALLS, lambda call: id(call) in SOME), ids=str)
def test_every_strategy_is_sound(call):
    """Split the inputs, run the op on each part, join: same values, gradients and derivatives of
    gradients as unsplit. On three ranks no part is like another.
    """
    judge(call, 3)


@pytest.mark.broad
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_every_strategy_is_sound_on_other_ranks(call, world_size):
    judge(call, world_size)


def judge(call, world_size):
    example = call.example()
    assert all(result.isfinite().all() for result in example.results)
    rule = find_rule(call.target)(example.call)
    faults = []
    for strategy in derived(example, rule, world_size):
        found = why_wrong(example, strategy, world_size, twice=True)
        if found:
            faults.append(f"{strategy} on {world_size}: {found}")
    assert faults == []


def test_torch_refuses_second_derivatives_of_an_empty_look_up():
    """So a rank that holds no tokens looks up a stand-in."""
    table = x(4, 3)
    rows = torch.nn.functional.embedding(torch.zeros(0, 5, dtype=torch.long), table)
    seed = torch.zeros_like(rows, requires_grad=True)
    (first,) = torch.autograd.grad(rows, table, seed, create_graph=True)
    with pytest.raises(RuntimeError, match=EMPTY_INDEX):
        torch.autograd.grad(first.sum(), seed)


def test_attention_keeps_heads_on_every_rank_where_torch_needs_them(monkeypatch):
    """Heads of known number are split only if all ranks have some; else a rank without takes one.

    Batch and queries may still be empty: nothing is added to their parts.
    """
    name = "scaled_dot_product_attention.default"
    monkeypatch.setattr("autoparallel.support.torch_versions.ATTENTION_NEEDS_HEADS", True)

    def heads_split(sample, world_size):
        example = sample.example()
        rule = find_rule(sample.target)(example.call)
        found = derived(example, rule, world_size)
        assert not any(why_wrong(example, strategy, world_size) for strategy in found)
        return [strategy for strategy in found if strategy.operands[0] == Shard(1)]

    six = (x(4, 6, 5, 8), x(4, 6, 7, 8), x(4, 6, 7, 8))
    assert heads_split(call(name, *six), 3)
    assert not heads_split(call(name, *six), 4)  # 2, 2, 2 and none
    grouped = (x(4, 12, 5, 8), x(4, 3, 7, 8), x(4, 3, 7, 8))
    assert not heads_split(call(name, *grouped, enable_gqa=True), 4)
    unknown = call(name, *(x(4, 5, 8, 6) for _ in range(3)), symbolic={4: "s0", 5: "s1", 8: "s2"})
    assert heads_split(unknown, 4)
    example = unknown.example()
    rule = find_rule(unknown.target)(example.call)
    assert [loop for loop in rule.loops if rule.needs_elements(loop)] == ["b1"]


def softmax_split_along_its_dim(call):
    return replace(find_rule(call.node.target)(call), whole=frozenset(), kernels={})


def blocks_in_another_order(call):
    def turned(dims):
        return tuple(names[::-1] if len(names) == 2 else names for names in dims)

    rule = find_rule(call.node.target)(call)
    return replace(
        rule,
        operands=tuple(map(turned, rule.operands)),
        results=tuple(map(turned, rule.results)),
    )


WRONG_RULES = {
    "a bias counted on every rank": (
        call("add.Tensor", x(4, 5), x(5)),
        lambda call: pointwise(call, {0}),
        "P, R -> P",
    ),
    "a pending sum through relu": (
        call("relu.default", x(4, 5)),
        lambda call: pointwise(call, {0}),
        "P -> P",
    ),
    "softmax split along its own dim": (
        call("softmax.int", x(4, 5), 1),
        softmax_split_along_its_dim,
        "S(1) -> S(1)",
    ),
    "a mean that divides by the local count": (
        call("mean.dim", x(4, 5), (1,)),
        lambda call: ShardingRule.parse("a b -> a", call),
        "S(1) -> P",
    ),
    "parts of a split in another order": (
        call("chunk.default", x(12, 5), 3),
        blocks_in_another_order,
        "S(0) -> S(0), S(0), S(0)",
    ),
    "parts of a cat in another order": (
        call("cat.default", (x(5, 4), x(5, 4)), 1),
        blocks_in_another_order,
        "S(1), S(1) -> S(1)",
    ),
}


@pytest.mark.parametrize("name", WRONG_RULES)
def test_a_wrong_rule_is_caught(name):
    """And its strategies that are right are not."""
    sample, author, wrong = WRONG_RULES[name]
    example = sample.example()
    choices = derived(example, author(example.call), 2)
    faults = {str(strategy): why_wrong(example, strategy, 2) for strategy in choices}
    assert faults[wrong].startswith(("result 0: ", "rank 0 failed: "))
    assert not any(found for strategy, found in faults.items() if set(strategy) <= set("IR, ->"))


WRONG_STRATEGIES = {
    "column-parallel without the sum of the input's gradient": (
        (Invariant(), Shard(0)),
        (Shard(1),),
        "gradient of operand x0: rank 0 is off by",
    ),
    "row-parallel without the sum": (
        (Shard(1), Shard(1)),
        (Invariant(),),
        "result 0: rank 0 is off by",
    ),
    "a replica that every rank uses alike": (
        (Invariant(), Invariant()),
        (Replicate(),),
        "gradient of operand x0: rank 0 is off by",
    ),
    "a replica whose gradient is whole on every rank": (
        (Replicate(), Replicate()),
        (Invariant(),),
        "gradient of operand x0: the sum over ranks is off by",
    ),
    "a product of two pending sums": (
        (Partial(), Partial()),
        (Partial(),),
        "result 0: the sum over ranks is off by",
    ),
    "a part where the whole is needed": (
        (Shard(1), Replicate()),
        (Partial(),),
        "rank 0 failed: RuntimeError",
    ),
}


@pytest.mark.parametrize("name", WRONG_STRATEGIES)
def test_a_wrong_strategy_is_caught(name):
    operands, results, message = WRONG_STRATEGIES[name]
    example = call("linear.default", x(4, 6), x(8, 6)).example()
    assert why_wrong(example, Strategy(operands, results), 2).startswith(message)


def test_pending_sums_are_uneven():
    """An even split, or one of one sign, would let `abs` look linear."""
    whole = x(4, 5).detach()
    for world_size in (2, 3, 4):
        parts = uneven_parts(whole, world_size, torch.Generator().manual_seed(0))
        assert torch.allclose(torch.stack(parts).sum(0), whole)
        assert all((part > 0).any() and (part < 0).any() for part in parts)
        assert not torch.allclose(torch.stack(parts).abs().sum(0), whole.abs())
