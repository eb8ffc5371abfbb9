"""Networks of one graph that count bytes at different moments differ in their usages alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from any_plans import network_of
from families import build, inputs_for
from torch import nn

from autoparallel.mesh import Mesh
from autoparallel.strategy.build_network import rebuilt
from megatron_rules.papers import Transformer
from megatron_rules.papers import build as build_megatron
from planners import Factor, Problem, Variable
from planners.two_usages import mean_usage, require_same_ways

broad = pytest.mark.broad
Sample = tuple[nn.Module, Any]


def of_paper() -> Sample:
    """A GPT with attention written out, in which masks are computed from nothing that is split."""
    sizes = {"layers": 2, "hidden": 64, "heads": 4}
    module, _ = build_megatron(Transformer.of(sizes, {"sequence": 16, "vocabulary": 64}))
    with torch.device("meta"):
        return module, module.model.example_inputs(batch=8)


def family(name: str) -> Sample:
    """One of the models that tests split."""
    return build(name, 2), inputs_for(name, batch=8, sequence=16)


def of_zoo(name: str) -> Sample:
    """A tiny model of a library."""
    return zoo.build(name, 2), zoo.inputs_for(name)


@pytest.mark.parametrize(
    ("make", "mesh", "recompute"),
    [
        (of_paper, Mesh(dp=8), "auto"),
        pytest.param(of_paper, Mesh(dp=2, tp=2), "selective", marks=broad),
        pytest.param(of_paper, Mesh(tp=4), "full", marks=broad),
        *(
            pytest.param(partial(make, name), Mesh(dp=2, tp=2), recompute, marks=broad, id=name)
            for make, name, recompute in (
                (family, "gpt", "auto"),
                (family, "hf-llama", "auto"),
                (family, "hf-bert", "selective"),
                (of_zoo, "mixtral", "auto"),
                (of_zoo, "deepseek-v3", "selective"),
                (of_zoo, "mamba", "auto"),
                (of_zoo, "swin", "auto"),
                (of_zoo, "t5", "auto"),
            )
        ),
    ],
)
def test_networks_differ_in_usages_alone(
    make: Callable[[], Sample], mesh: Mesh, recompute: str
) -> None:
    """They have the same variables, factors and costs, and the same ways to pay for each, so that
    a solution of one is one of the others.
    """
    _, network = network_of(*make(), mesh, memory_limit=10**12, recompute=recompute, tokens=1)
    problem = network.problem()
    calls = [node.name for node in network.graph.calls]
    drawn = np.random.default_rng(0).permutation(calls)[:10]
    inside = [call for call in calls if "attention" in call][:8]
    for call in ("", *map(str, drawn), *inside):
        other = rebuilt(network, counted_at=call).problem()
        require_same_ways(problem, other)
        items = zip(costs_of(problem), costs_of(other), strict=True)
        assert all(np.array_equal(one, two) for one, two in items), call


def costs_of(problem: Problem) -> list[np.ndarray]:
    """The costs of all ways of all tables, in order."""
    tables: tuple[Variable | Factor, ...] = (*problem.variables, *problem.factors)
    return [way.cost for table in tables for way in table.prices.ways]


def test_problems_that_differ_have_no_mean() -> None:
    """A problem with other tables is refused: usage would be read from the wrong ones."""
    a, b = (Variable(name, np.zeros(2)) for name in "ab")
    both = Problem((a, b), (Factor(("a", "b"), np.zeros((2, 2))),))
    require_same_ways(both, both)
    with pytest.raises(ValueError, match=r"table 2 is a, b of 2x2 in 1 ways, and none"):
        mean_usage(both, Problem((a, b)), 0.5)
