"""Steps of random programs: equal blocks in containers, called, or used part by part."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from fuzz_pen import Pen
from fuzz_programs import BLOCKS, content
from torch import nn

__all__ = ["contained", "container"]


class Block(nn.Module):
    """A Block keeps its modules and their weights in plain lists, too."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, inner), nn.Linear(inner, width)
        self.pieces = [self.first, self.last]
        self.methods = (self.first.forward, self.last.forward)
        self.raw = {"first": (self.first.weight,), "last": (self.last.weight,)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(x).tanh()

    def other(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).tanh())


_MAKERS: dict[str, Callable[[int, int], nn.Module]] = {
    "lists": lambda n, m: nn.ModuleList([nn.Linear(n, m), nn.Linear(m, n)]),
    "dicts": lambda n, m: nn.ModuleDict({"first": nn.Linear(n, m), "last": nn.Linear(m, n)}),
    "sequences": lambda n, m: nn.Sequential(
        OrderedDict(first=nn.Linear(n, m), middle=nn.Tanh(), last=nn.Linear(m, n))
    ),
    "classes": Block,
}
# How a block of each kind is applied to y.
_BY_NAME = "block.last(block.first(y).tanh())"
_INDEXED = "block[-1](block[0](y).tanh())"
_UNPACKED = "[*block][-1]([*block][0](y).tanh())"
_CHILDREN = "[*block.children()][-1](block.first(y).tanh())"
_WAYS = {
    "lists": (_UNPACKED, _INDEXED, "block[1:][0](block[:1][0](y).tanh())"),
    "dicts": (
        "[*block.values()][1]([*block.values()][0](y).tanh())",
        "dict(block.items())['last'](dict(block.items())['first'](y).tanh())",
        "block['last'](block['first'](y).tanh())",
        _BY_NAME,
    ),
    "sequences": ("block(y)", _INDEXED, _UNPACKED, "block[1:](block[:1](y))", _BY_NAME, _CHILDREN),
    "classes": (
        "block(y)",
        _BY_NAME,
        "block.other(y)",
        "block.pieces[1](block.pieces[0](y).tanh())",
        "block.methods[1](block.methods[0](y).tanh())",
        "F.linear(F.linear(y, block.raw['first'][0]).tanh(), block.raw['last'][0])",
        "block(y) * block.raw['last'][0].mean()",
        "block(y) + block.first.bias.mean()",
        _CHILDREN,
    ),
}


def container(name: str, kind: str, sizes: tuple[int, ...]) -> nn.ModuleList:
    """Return equal blocks. sizes: their number, their outer and their inner width."""
    count, width, inner = sizes
    made = nn.ModuleList(
        _MAKERS[kind.removeprefix("blocks_")](width, inner) for _ in range(count)
    ).double()
    with torch.no_grad():
        for path, parameter in made.named_parameters():
            parameter.copy_(content(f"{name}.{path}", "parameter", tuple(parameter.shape)) / 2)
    return made


def contained(pen: Pen) -> None:
    """Write three to five equal blocks, one after the other or side by side."""
    a = pen.value(lambda t: t.dim() >= 1)
    kind = pen.one(BLOCKS)
    sizes = (pen.number(3, 5), pen.shape(a)[-1], pen.size())
    blocks = pen.declare_blocks(kind, container, *sizes)
    ways: Any = _WAYS[kind.removeprefix("blocks_")]
    one = pen.one(ways)
    order = pen.one(
        (blocks, blocks, f"reversed({blocks})", f"{blocks}[1:]", f"[*{blocks}, {blocks}[0]]")
    )
    form = pen.number(0, 3)
    if form == 0:
        pen.write(f"sum(({one}).tanh() for block in {order} for y in [{a}])")
    elif form == 1:
        other = pen.one(ways)
        both = f"{one} if index % 2 else {other}"
        pen.write(
            f"functools.reduce(lambda y, item: [y + ({both}) for index, block in [item]][0], "
            f"enumerate({order}), {a})"
        )
    else:
        pen.write(f"functools.reduce(lambda y, block: y + {one}, {order}, {a})")
