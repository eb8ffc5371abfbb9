"""Stacks of equal blocks, whose folded capture is compared with the full one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from autoparallel.capture.export import Captured, capture

__all__ = ["LAYERS", "WIDTH", "Block", "Stack", "both", "instances", "numbered", "sample", "stack"]

LAYERS = 6
WIDTH = 12


def both(model: nn.Module, *args: Any, **kwargs: Any) -> Captured:
    """Return the folded capture, which was compared with the full one; the model is unchanged."""
    kinds = [(path, type(module)) for path, module in model.named_modules()]
    held = {path: dict(vars(module)) for path, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    folded = capture(model, args, kwargs)
    full = capture(model, args, kwargs, fold=False)
    assert str(folded.graph) == str(full.graph)
    assert folded.graph == full.graph
    assert [node.scope for node in folded.graph.nodes] == [node.scope for node in full.graph.nodes]
    assert [node.line for node in folded.graph.nodes] == [node.line for node in full.graph.nodes]
    assert (folded.inputs, folded.outputs) == (full.inputs, full.outputs)
    assert folded.aliases == full.aliases
    assert folded.constants.keys() == full.constants.keys()
    assert full.repeats == ()
    assert [(path, type(module)) for path, module in model.named_modules()] == kinds
    for path, module in model.named_modules():
        assert vars(module).keys() == held[path].keys()
        changed = [n for n, value in held[path].items() if vars(module)[n] is not value]
        assert changed == [], path
    assert all(torch.equal(value, state[path]) for path, value in model.state_dict().items())
    return folded


class Block(nn.Module):
    """A Block has two products and a norm; `options` become its attributes."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.first = nn.Linear(WIDTH, 20)
        self.second = nn.Linear(20, WIDTH)
        for name, value in options.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(torch.relu(self.first(self.norm(x))))


class Stack(nn.Module):
    """A Stack runs its blocks one after the other."""

    def __init__(self, blocks: Any) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


def stack(kind: type[Block] = Block, **options: Any) -> Stack:
    """Return a stack of equal blocks."""
    return Stack(kind(**options) for _ in range(LAYERS))


def numbered(kind: type[Block], **options: Any) -> Stack:
    """Return blocks that know their place: each has its number as an attribute."""
    return Stack(kind(layer_idx=index, **options) for index in range(LAYERS))


def sample() -> torch.Tensor:
    """Return an input for a stack."""
    return torch.randn(3, 5, WIDTH)


def instances(captured: Captured) -> list[int]:
    """Return for each traced block the number of blocks that it stands for."""
    return [len(paths) for paths in captured.repeats]
