"""Repeated blocks of a graph: found by what they compute, and equal node by node."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from autoparallel.capture.export import capture
from autoparallel.graph.graph import Graph, Node
from autoparallel.graph.passes.run_passes import run_passes
from autoparallel.graph.repeated_blocks import Block, Repeats, find_repeats

WIDTH = 12


class Layer(nn.Module):
    """Two products around a ReLU; `extra` products more."""

    def __init__(self, width: int = WIDTH, hidden: int = 20, extra: int = 0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.more = nn.ModuleList(nn.Linear(width, width) for _ in range(extra))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for product in self.more:
            x = product(x)
        return x + self.second(torch.relu(self.first(x)))


class Chain(nn.Module):
    """Layers one after the other, and a product at each end."""

    def __init__(self, layers: Any, width: int = WIDTH) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Sum(nn.Module):
    """Experts side by side, after a product of two of their own."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.experts = nn.ModuleList(Layer() for _ in range(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.gate(x))
        return sum((expert(x) for expert in self.experts), start=x)


def repeats_of(model: nn.Module, *, fold: bool = True) -> Repeats:
    """Of the model's graph; the input needs a gradient, as what goes from block to block does."""
    captured = capture(model, (torch.ones(4, WIDTH, requires_grad=True),), {}, fold=fold)
    return find_repeats(run_passes(captured.graph))


def paths(repeats: Repeats) -> list[tuple[str, int]]:
    return [(block.path, block.kind) for block in repeats.blocks]


def require_equal(graph: Graph, first: Block, second: Block, repeats: Repeats) -> None:
    """Corresponding nodes of two blocks of one kind are equal but for names."""
    nodes = {node.name: node for node in graph.nodes}
    names = dict(zip(second.inputs, first.inputs, strict=True))
    assert second.stop - second.start == first.stop - first.start
    for node in graph.nodes[second.start : second.stop]:
        twin = nodes[repeats.twin(node.name)]
        assert first.start <= graph.nodes.index(twin) < first.stop
        assert (node.target, len(node.args)) == (twin.target, len(twin.args))
        assert repeats.key(node.name) == repeats.key(twin.name)
        reads = tuple(names.get(name) or repeats.twin(name) for name in node.operands())
        assert reads == twin.operands()
        for value, like in zip(node.results, twin.results, strict=True):
            assert repeats.twin(value.name) == like.name
            assert (value.shape, value.dtype) == (like.shape, like.dtype)
            assert value.requires_grad == like.requires_grad
    assert [repeats.twin(name) for name in second.outputs] == list(first.outputs)


def test_layers_of_a_chain_are_blocks_of_one_kind():
    repeats = repeats_of(Chain(Layer() for _ in range(4)))
    graph, blocks = repeats.graph, repeats.blocks
    assert paths(repeats) == [(f"layers.{index}", 0) for index in range(4)]
    assert [block.index for block in blocks] == [0, 1, 2, 3]
    assert {block.pattern for block in blocks} == {"layers.*"}
    for before, block in itertools.pairwise(blocks):
        assert block.start == before.stop
        assert block.inputs == before.outputs
        require_equal(graph, blocks[0], block, repeats)
    for block in blocks:
        inside = graph.nodes[block.start : block.stop]
        assert all(node.kind == "call" and node.where.startswith(block.path) for node in inside)
        assert {repeats.block_of(node.name) for node in inside} == {block}
        assert len(block.own) == 4
        assert all(repeats.block_of(name) == block for name in block.own)


def test_no_node_outside_of_blocks_belongs_to_one():
    repeats = repeats_of(Chain(Layer() for _ in range(3)))

    def is_outside(node: Node) -> bool:
        return "layers" not in node.where and "layers" not in node.target

    outside = [node for node in repeats.graph.nodes if is_outside(node)]
    assert len(outside) > 4
    for node in outside:
        assert repeats.block_of(node.name) is None
        assert repeats.key(node.name) is None
        assert repeats.twin(node.name) == node.name


def test_folded_and_full_traces_have_the_same_blocks():
    model = Chain(Layer() for _ in range(4))
    assert repeats_of(model).blocks == repeats_of(model, fold=False).blocks


def test_a_model_without_repeated_modules_has_no_blocks():
    assert repeats_of(Chain([])).blocks == ()
    assert repeats_of(Chain([Layer()])).blocks == ()
    assert repeats_of(nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 8))).blocks == ()


def test_names_of_modules_do_not_matter():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lower, self.upper = Layer(), Layer()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.upper(self.lower(x))

    assert paths(repeats_of(Named())) == [("lower", 0), ("upper", 0)]


def test_calls_of_one_module_are_blocks_that_read_the_same_weights():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                x = self.layer(x)
            return x

    repeats = repeats_of(Shared())
    assert paths(repeats) == [("layer", 0), ("layer@1", 0), ("layer@2", 0)]
    weights = {"p_layer_first_weight", "p_layer_second_bias"}
    for block in repeats.blocks:
        assert block.own == ()
        assert weights < set(block.inputs)
    require_equal(repeats.graph, repeats.blocks[0], repeats.blocks[2], repeats)


def test_sizes_and_numbers_make_other_kinds():
    class Scaled(Layer):
        scale = 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.scale

    layers = [Scaled() for _ in range(3)]
    layers[1].scale = 0.5
    assert [kind for _, kind in paths(repeats_of(Chain(layers)))] == [0, 1, 0]
    layers = [Layer(), Layer(hidden=24), Layer(), Layer(hidden=24)]
    repeats = repeats_of(Chain(layers))
    assert [kind for _, kind in paths(repeats)] == [0, 1, 0, 1]
    assert [block.index for block in repeats.blocks] == [0, 0, 1, 1]
    layers = [Layer(), Layer()]
    layers[0].first.weight.requires_grad_(False)
    assert [kind for _, kind in paths(repeats_of(Chain(layers)))] == [0, 1]


def test_a_first_layer_that_computes_more_is_a_block_of_its_own_kind():
    repeats = repeats_of(Chain([Layer(extra=1), Layer(), Layer()]))
    assert paths(repeats) == [("layers.0", 0), ("layers.1", 1), ("layers.2", 1)]


def test_layers_of_equal_towers_are_the_blocks_and_not_the_towers():
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = (Chain(Layer() for _ in range(2)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.left(x) + self.right(x)

    found = paths(repeats_of(Towers()))
    assert found == [
        (f"{side}.layers.{index}", 0) for side in ("left", "right") for index in (0, 1)
    ]


def test_experts_side_by_side_are_part_of_their_layer():
    assert paths(repeats_of(Chain(Sum(3) for _ in range(2)))) == [("layers.0", 0), ("layers.1", 0)]


def test_a_wrapped_layer_counts_once():
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    assert repeats_of(Chain([Wrapped(Layer())])).blocks == ()
    assert paths(repeats_of(Chain(Wrapped(Layer()) for _ in range(2)))) == [
        ("layers.0", 0),
        ("layers.1", 0),
    ]


def test_values_that_leave_a_block_are_part_of_its_kind():
    class Peeked(Chain):
        def forward(self, x: torch.Tensor) -> Any:
            x = self.stem(x)
            kept = []
            for number, layer in enumerate(self.layers):
                hidden, x = layer(x)
                kept += [hidden] if number == 1 else []
            return self.head(x), *kept

    class Two(Layer):
        def forward(self, x: torch.Tensor) -> Any:
            hidden = torch.relu(self.first(x))
            return hidden, x + self.second(hidden)

    repeats = repeats_of(Peeked(Two() for _ in range(3)))
    assert [kind for _, kind in paths(repeats)] == [0, 1, 0]
    assert [len(block.outputs) for block in repeats.blocks] == [1, 2, 1]
