"""Threads cover every dim of every value, and have the names and fates that a reader expects."""

from __future__ import annotations

from functools import cache
from math import prod

import pytest
import torch
import zoo
from image_decoder import Decoder
from torch import nn

import autoparallel
from autoparallel.errors import CaptureError, PlanError
from autoparallel.graph.graph import Graph, hint
from autoparallel.plan import Plan
from autoparallel.threads import Threads, Treatment, find_threads
from autoparallel.threads.thread_names import ROLES
from autoparallel.train.models import GPT, GPTConfig

IN_THE_SUITE = ("llama", "resnet", "lstm")


@cache
def gpt() -> Threads:
    """Of two layers, with sizes that are all different."""
    config = GPTConfig(layers=2, hidden=48, heads=4, vocabulary=210, positions=32, dropout=0.0)
    tokens = torch.zeros(3, 10, dtype=torch.long)
    return autoparallel.trace_threads(GPT(config), example_inputs=(tokens, tokens))


def uncovered(threads: Threads, graph: Graph) -> list[str]:
    """Dims of which the threads are not the whole, or that a thread does not know of."""
    places = {
        (place.value, place.dim, place.inner): thread.number
        for thread in threads.threads
        for place in thread.places
    }
    wrong = []
    for name, value in graph.values.items():
        for dim, (row, size) in enumerate(zip(threads.dims[name], value.shape, strict=True)):
            if prod(hint(threads.threads[number].size) for number in row) != hint(size):
                wrong.append(f"{value}: dim {dim}")
            if any(places[name, dim, inner] != number for inner, number in enumerate(row)):
                wrong.append(f"{value}: dim {dim} is no place")
    return wrong


@pytest.mark.parametrize(
    "name",
    [
        name if name in IN_THE_SUITE else pytest.param(name, marks=pytest.mark.broad)
        for name in zoo.FAMILIES
    ],
)
def test_every_dim_of_every_value_is_covered(name: str) -> None:
    """The sizes of a dim's threads make up its size, in every family of the zoo."""
    plan = autoparallel.make_plan(zoo.build(name, 2), 2, example_inputs=zoo.inputs_for(name))
    plans: list[Plan] = [plan] if plan.captured is not None else [p.plan for p in plan.parts]
    for part in plans:
        threads = part.threads()
        assert not uncovered(threads, threads.graph)
        assert all(thread.name for thread in threads.threads)
        # Every loop of every call is told, so that nothing is synchronized unseen.
        assert set(threads.passages) == {node.name for node in threads.graph.calls}


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        ("heads", 4, 2),
        ("head size", 12, 2),
        ("fused parts", 3, 2),
        ("feed-forward", 192, 2),
        ("hidden", 48, 1),
        ("vocabulary", 210, 1),
        ("positions", 32, 1),
    ],
)
def test_a_gpt_has_the_names_of_the_field(name: str, size: int, count: int) -> None:
    """Inferred from what calls do: one hidden thread through all layers, heads in each."""
    threads = gpt().named(name)
    assert [hint(thread.size) for thread in threads] == [size] * count


def test_every_name_is_explained() -> None:
    """But for those that say themselves where a thread comes from."""
    plain = ("made by ", "of a ", "input_ids.", "labels.", "inside of an op")
    names = [name for name in gpt().names if not name.startswith(plain)]
    assert set(names) <= set(ROLES)
    assert len(names) > 6


def test_batch_and_sequence_are_those_of_the_inputs() -> None:
    """One thread each, which every activation of the model has."""
    (batch,), (sequence,) = gpt().named("batch"), gpt().named("sequence")
    assert batch.births[0].kind == sequence.births[0].kind == "input"
    activations = [v for v in gpt().graph.values.values() if v.requires_grad and len(v.shape) > 2]
    for thread in (batch, sequence):
        assert {value.name for value in activations} <= {place.value for place in thread.places}


@pytest.mark.parametrize("name", ["heads", "feed-forward"])
def test_columns_then_rows(name: str) -> None:
    """A split takes one sum forward, where they end, and one backward, of the gradient of what the
    product reads that they begin in. Nothing needs all of them.
    """
    for thread in gpt().named(name):
        assert thread.is_free
        summed = thread.treated(Treatment.SUMMED)
        gradients = {value for passage in thread.passages for value in passage.gradients}
        assert len(summed) == len(gradients) == 1
        assert summed[0].is_end


@pytest.mark.parametrize(
    ("name", "op"),
    [("hidden", "layer_norm"), ("head size", "scaled_dot_product_attention")],
)
def test_what_is_needed_whole(name: str, op: str) -> None:
    """The norm needs all of the hidden thread, attention all of a head."""
    for thread in gpt().named(name):
        calls = {passage.call for passage in thread.treated(Treatment.WHOLE)}
        assert {call.rstrip("_0123456789") for call in calls} == {op}


def test_merged_and_divided_dims_keep_their_threads() -> None:
    """Heads are in a merged dim before and after attention, and in one of their own inside."""
    threads = gpt()
    product = next(p for p in threads.passages if p.startswith("scaled_dot_product_attention"))
    assert threads.shape(product) == "[batch, heads, sequence, head size]"
    merged = [p for t in threads.named("head size") for p in t.places if p.inner == 1]
    assert merged
    assert "heads * head size" in threads.shape(merged[-1].value)


class CutsAcross(nn.Module):
    """A CutsAcross model reads a dim once as 2 of 3 and once as 3 of 2."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, 2, 3).sum(1).sum() + x.reshape(-1, 3, 2).sum(1).sum()


def test_a_dim_that_is_cut_in_two_ways() -> None:
    """Both are covered, with threads of their own."""
    threads = autoparallel.trace_threads(
        CutsAcross(), example_inputs=torch.ones(4, 6, requires_grad=True)
    )
    assert not uncovered(threads, threads.graph)


def test_a_call_without_a_rule_ends_what_it_reads() -> None:
    """And begins what it makes."""
    graph = gpt().graph
    threads = find_threads(graph, rule_of=lambda call: None)
    assert not uncovered(threads, graph)
    ends = {passage.treatment for rows in threads.passages.values() for passage in rows}
    assert ends == {Treatment.WHOLE}


def test_text_has_a_row_for_equal_threads() -> None:
    """The threads that each layer has for itself are told once, with their number."""
    lines = str(gpt()).splitlines()
    (row,) = [line for line in lines if line.startswith("feed-forward")]
    assert row.split()[:4] == ["feed-forward", "×", "2", "192"]
    assert "1 sum forward, 1 backward" in row


def test_plans_without_a_graph_are_refused() -> None:
    """In words, with what to do."""
    plan = autoparallel.make_plan(nn.Linear(4, 4), 2, example_inputs=torch.ones(2, 4))
    with pytest.raises(PlanError, match="no graph"):
        Plan.from_json(plan.to_json()).threads()


class Stays(nn.Module):
    """A Stays model cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y.new_tensor(y.detach().numpy()).sum() + y.sum()


def test_models_in_parts_are_told_by_their_parts() -> None:
    """The whole has no threads, each part has."""
    with pytest.raises(CaptureError, match="make_plan"):
        autoparallel.trace_threads(Stays(), example_inputs=torch.ones(2, 4))
    plan = autoparallel.make_plan(Stays(), 2, example_inputs=torch.ones(2, 4))
    with pytest.raises(PlanError, match="in parts"):
        plan.threads()
    assert plan.parts[0].plan.threads().threads


def test_windows_are_told_by_what_they_move_along() -> None:
    """Images keep their places through convolutions, pools and growth: each is one thread."""
    inputs = torch.zeros(1, 4, 3, 4), torch.zeros(1, 3, 6, 8)
    threads = autoparallel.trace_threads(Decoder((4, 2), 2, 1), example_inputs=inputs)
    kinds = {each.name.partition(" ")[0] for each in threads.threads}
    assert {"channels", "window", "places"} <= kinds
    assert "experts" not in kinds
    passed = [each for each in threads.threads if each.name.startswith("places")]
    # Attention reads rows and columns as one dim: where the inputs decide on their sizes, no part
    # of one of them can be told of both.
    whole = {passage.call for each in passed for passage in each.treated(Treatment.WHOLE)}
    assert whole <= {"view", "view_1"}
