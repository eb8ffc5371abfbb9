"""Programs that a forward writes in any order, as by a loop over a set, are one graph."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import pytest
import torch
import zoo
from block_stacks import WIDTH, both, sample
from broad_cases import broad
from torch import nn

import autoparallel
from autoparallel.capture.export import capture
from autoparallel.capture.graph_breaks import trace
from autoparallel.rules.lookup import find_rule

KINDS = ("full", "sliding", "none")
Make = Callable[[Collection[str]], nn.Module]


class Wave(nn.Module):
    """One module that is called once for each kind, with a buffer for each."""

    def __init__(self) -> None:
        super().__init__()
        for number, kind in enumerate(KINDS):
            self.register_buffer(kind, torch.linspace(1.0, 2.0 + number, WIDTH))

    def forward(self, x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        angles = x * self.get_buffer(kind)
        return angles.cos(), angles.sin()


class Layer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, waves: dict[str, tuple[torch.Tensor, ...]]) -> torch.Tensor:
        cos, sin = waves[self.kind]
        return self.linear(x * cos) + x * sin


class Waves(nn.Module):
    """What is made in a loop over kinds, in `order`, is read by layers in an order of their own."""

    def __init__(self, order: Collection[str]) -> None:
        super().__init__()
        self.order, self.wave = order, Wave()
        self.layers = nn.ModuleList(
            Layer(kind) for kind in ("sliding", "none", "full", "none", "none", "none")
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        waves = {}
        for kind in self.order:
            waves[kind] = self.wave(x, kind)
        for layer in self.layers:
            x = layer(x, waves)
        return x


class Masks(nn.Module):
    """Calls outside of modules: what nobody reads goes along."""

    def __init__(self, order: Collection[str]) -> None:
        super().__init__()
        self.order = order

    def mask(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        places = torch.arange(x.shape[-1])
        _ = places + 1
        far = places[None, :] - places[:, None]
        return far >= 0 if kind == "full" else far.abs() < len(kind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        masks = {kind: self.mask(x, kind) for kind in self.order}
        for kind in ("none", "full", "sliding"):
            x = (x[..., None] * masks[kind]).sum(-1)
        return x


class Heads(nn.Module):
    """Other modules for each kind, whose results are returned."""

    def __init__(self, order: Collection[str]) -> None:
        super().__init__()
        self.order = order
        self.heads = nn.ModuleDict({kind: nn.Linear(WIDTH, WIDTH) for kind in KINDS})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        heads = {kind: self.heads[kind](x).sigmoid() for kind in self.order}
        return {kind: heads[kind] for kind in KINDS}


class Inner(nn.Module):
    """The loops stand in modules that are called in a loop themselves."""

    def __init__(self, order: Collection[str], inner: Make = Waves) -> None:
        super().__init__()
        self.order = order
        self.parts = nn.ModuleDict({kind: inner(order) for kind in KINDS})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = {kind: self.parts[kind](x) for kind in self.order}
        return parts["none"] * 3 + parts["full"] * 2 - parts["sliding"]


@pytest.mark.parametrize("make", [Waves, Masks, Heads, *broad(Inner)])
def test_independent_calls_have_one_order(make: Make) -> None:
    """Graphs, names and the numbers of module calls are equal, and the program is the model's."""
    torch.manual_seed(3)
    model = make(KINDS).double()
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    captured = both(model, x)
    for order in (("none", "sliding", "full"), ("sliding", "full", "none")):
        other = make(order).double()
        other.load_state_dict(model.state_dict())
        graph = both(other, x).graph
        assert str(graph) == str(captured.graph)
        assert [node.scope for node in graph.nodes] == [n.scope for n in captured.graph.nodes]
        program = autoparallel.to_fx(other, example_inputs=(x,))
        expected = model(x)
        results = list(expected.values()) if isinstance(expected, dict) else [expected]
        for one, another in zip(results, program(x), strict=True):
            torch.testing.assert_close(another, one, rtol=0, atol=0)


FACTORS = {"full": 2.0, "sliding": 3.0, "none": 5.0}


class Drawn(Waves):
    """Random numbers are drawn in the order of the loop."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        drawn = {kind: torch.rand_like(x) * FACTORS[kind] for kind in self.order}
        return x * drawn["full"] + drawn["sliding"] - drawn["none"]


class Written(Waves):
    """Each turn of the loop writes to the same memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last = torch.zeros_like(x)
        for kind in self.order:
            last[..., 1:].copy_(x[..., 1:] * FACTORS[kind])
        return last


@pytest.mark.parametrize("make", [Drawn, Written])
@pytest.mark.parametrize("order", [KINDS, KINDS[::-1]])
def test_an_order_with_a_meaning_stays(make: Make, order: tuple[str, ...]) -> None:
    graph = capture(make(order), (sample(),), {}).graph
    factors = [node.args[1] for node in graph.calls if node.target == "aten.mul.Tensor"]
    assert factors[:3] == [FACTORS[kind] for kind in order]


def graphs_of(names: Iterable[str]) -> dict[str, str]:
    """The texts of the graphs of families, and of a loop over a set of strings."""
    graphs = {}
    for name in names:
        if name == "a set":
            model, args, inputs = Waves(frozenset(KINDS)), (sample(),), {}
        else:
            model, args, inputs = zoo.build(name, 3), (), zoo.inputs_for(name)
        graphs[name] = str(trace(model, args, inputs, known=find_rule).graph)
    return graphs


# Ours, and that of Gemma 3.
SETS = [frozenset(KINDS), frozenset({"sliding_attention", "full_attention"})]
ORDERS = """
import sys
print(*(list(frozenset(words.split(","))) for words in sys.argv[1:]), sep=";")
"""
PROBE = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from test_canonical_order import graphs_of
print(json.dumps(graphs_of(sys.argv[1:])))
"""


def with_hashes_of(seed: int, *code: str) -> str:
    """The last line that a process prints in which the hashes of strings are of this seed."""
    folder = Path(__file__).parent
    path = os.pathsep.join([str(folder), str(folder.parent / "support"), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": str(seed)}
    command = [sys.executable, "-c", *code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "names", [["a set"], *broad(["gemma3"], ["mixtral", "t5", "u-net"])], ids=str
)
def test_graphs_do_not_depend_on_the_hashes_of_strings(names: list[str]) -> None:
    """Gemma 3 loops over a set of strings, of which another process has another order; the other
    families, all of them in make broad, show that nothing of the tracer does.
    """
    here = [str(list(each)) for each in SETS]

    def orders(seed: int) -> list[str]:
        return with_hashes_of(seed, ORDERS, *map(",".join, SETS)).split(";")

    other = next(
        seed
        for seed in range(50)
        if all(one != two for one, two in zip(orders(seed), here, strict=True))
    )
    assert json.loads(with_hashes_of(other, PROBE, *names)) == graphs_of(names)
