"""Models of equal blocks that are kept, reached and called in every way that Python has."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from container_parts import (
    WIDTH,
    Block,
    Head,
    Listed,
    Plain,
    Sequence,
    Tracks,
    WithParameters,
    both,
    down,
    pair,
    up,
)
from torch import nn

__all__ = ["KINDS", "WIDTH", "Model", "make", "sample"]

COUNT = 4
Tensor = torch.Tensor


class Model(nn.Module):
    """A Model gets its blocks from prepare(model); run(model, x) is its forward."""

    def __init__(
        self, prepare: Callable[[Any], None], run: Callable[[Any, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        prepare(self)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, WIDTH). Returns the loss."""
        return self.run(self, self.stem(x)).square().mean()


def sample() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(4, WIDTH, generator=generator, dtype=torch.float64)


def make(kind: str) -> Model:
    """Return the model in float64, with the same weights at every call."""
    torch.manual_seed(7)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # not .double(): kept tensors are the model's own
    try:
        return Model(*KINDS[kind])
    finally:
        torch.set_default_dtype(before)


# What a model consists of, and how it is run.


def layers(block: Callable[[], Any], container: Any = nn.ModuleList, count: int = COUNT) -> Any:
    """Return what puts blocks into a container under the name `layers`."""

    def prepare(model: Any) -> None:
        model.layers = container([block() for _ in range(count)])

    return prepare


def lists() -> nn.ModuleList:
    return nn.ModuleList(pair())


def dicts() -> nn.ModuleDict:
    return nn.ModuleDict({"first": up(), "second": down()})


def sequential() -> nn.Sequential:
    return nn.Sequential(up(), nn.ReLU(), down())


def each(step: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Return a forward that makes the step with every block."""

    def run(model: Any, x: Tensor) -> Tensor:
        for block in model.layers:
            x = step(block, x)
        return x

    return run


def through(block: Any, x: Tensor) -> Tensor:
    for part in block:
        x = part(x)
    return x


def unpacked(model: Any, x: Tensor) -> Tensor:
    for first, second in model.layers:
        x = both(x, first, second)
    return x


def two_lists(model: Any) -> None:
    model.firsts = nn.ModuleList(nn.Sequential(up(), nn.ReLU()) for _ in range(COUNT))
    model.seconds = nn.ModuleList(nn.Sequential(down(), nn.Tanh()) for _ in range(COUNT))


def named_layers(model: Any) -> None:
    for index in range(COUNT):
        setattr(model, f"layer{index}", Block())


def stages(model: Any) -> None:
    model.layers = nn.ModuleList(nn.ModuleList(Block() for _ in range(COUNT)) for _ in range(COUNT))


def deep(model: Any) -> None:
    model.layers = nn.ModuleDict(
        {f"stage{s}": nn.ModuleList(lists() for _ in range(COUNT)) for s in range(2)}
    )


def run_deep(model: Any, x: Tensor) -> Tensor:
    for name, stage in model.layers.items():
        for first, second in stage:
            x = both(x, first, second) * len(name)
    return x


def shared_inside(model: Any) -> None:
    """Give all blocks one and the same second module."""
    second = down()
    model.layers = nn.ModuleList(nn.ModuleList([up(), second]) for _ in range(COUNT))


def shared_outside(model: Any) -> None:
    """Give inner modules a second path by which they can be reached."""
    model.layers = nn.ModuleList(Block() for _ in range(COUNT))
    model.firsts = nn.ModuleList(block.first for block in model.layers)


def run_shared_outside(model: Any, x: Tensor) -> Tensor:
    for block, first in zip(model.layers, model.firsts, strict=True):
        x = block(x) + block.second(first(x).tanh())
    return x


def plain_lists(model: Any) -> None:
    layers(Block)(model)
    model.chosen = [model.layers[index] for index in (2, 0, 3, 1)]
    model.inner = {"first": tuple(b.first for b in model.layers)}


def run_plain_lists(model: Any, x: Tensor) -> Tensor:
    for block, first in zip(model.chosen, model.inner["first"], strict=True):
        x = block(x) + first(x).mean(-1, keepdim=True)
    return x


def raw_parameters(model: Any) -> None:
    layers(Block)(model)
    model.raw = [(b.first.weight, b.second.bias) for b in model.layers]


def run_raw_parameters(model: Any, x: Tensor) -> Tensor:
    for block, (weight, bias) in zip(model.layers, model.raw, strict=True):
        x = block(x) + bias * (x @ weight.T).mean()
    return x


def run_raw_after(model: Any, x: Tensor) -> Tensor:
    x = each(lambda block, x: block(x))(model, x)
    return x * torch.stack([weight.square().sum() for weight, _ in model.raw]).sum()


def partials(model: Any) -> None:
    layers(Block)(model)
    model.calls = [functools.partial(block) for block in model.layers]
    model.others = [block.other for block in model.layers]
    model.inner = [block.first.forward for block in model.layers]


def run_partials(model: Any, x: Tensor) -> Tensor:
    for call, other, inner in zip(model.calls, model.others, model.inner, strict=True):
        x = call(x) + other(x) + inner(x).mean()
    return x


def run_inner_methods(model: Any, x: Tensor) -> Tensor:
    for call, inner in zip(model.calls, model.inner, strict=True):
        x = call(x) + inner(x).mean()
    return x


def run_stages(model: Any, x: Tensor) -> Tensor:
    for stage in model.layers:
        for block in stage:
            x = block(x)
    return x


def run_weights_outside(model: Any, x: Tensor) -> Tensor:
    for index in range(COUNT):
        x = model.layers[index](x) + model.layers[index].first.weight.mean()
    return x


def run_inside_first(model: Any, x: Tensor) -> Tensor:
    """Call some blocks, and look into others."""
    for index, block in enumerate(model.layers):
        x = block(x) if index % 2 else both(x, block.first, block.second)
    return x


def run_twice(model: Any, x: Tensor) -> Tensor:
    for block in (*model.layers, *reversed(model.layers)):
        x = block(x)
    return x


def run_medusa(model: Any, x: Tensor) -> Tensor:
    """Run heads side by side, each a list that is called part by part."""
    return torch.stack([both(x, head[0], head[1]) for head in model.layers]).tanh().sum(0)


def run_called_and_indexed(model: Any, x: Tensor) -> Tensor:
    for block in model.layers:
        x = x + block(x) + block[2](block[0](x).tanh())
    return x


def run_with_buffer(block: Any, x: Tensor) -> Tensor:
    return block(x) * block.kept[0]


def run_by_name(model: Any, x: Tensor) -> Tensor:
    for index in range(COUNT):
        x = getattr(model, f"layer{index}")(x)
        x = x + getattr(model, f"layer{index}").second(getattr(model, f"layer{index}").first(x))
    return x


def run_zip(model: Any, x: Tensor) -> Tensor:
    for first, second in zip(model.firsts, model.seconds, strict=True):
        x = x + second(first(x))
    return x


def run_zip_inside(model: Any, x: Tensor) -> Tensor:
    for first, second in zip(model.firsts, model.seconds, strict=True):
        x = x + second[1](second[0](first[1](first[0](x))))
    return x


def chosen(model: Any, x: Tensor) -> Tensor:
    return each(lambda block, x: block(x))(model, x)


Kind = tuple[Callable[[Any], None], Callable[[Any, Tensor], Tensor]]
KINDS: dict[str, Kind] = {
    "lists, unpacked": (layers(lists), unpacked),
    "five lists, indexed": (layers(lists, count=5), each(lambda b, x: both(x, b[0], b[-1]))),
    "lists, sliced": (
        layers(lists),
        each(lambda b, x: x + through(b[:1], x).mean() + through(b[1:], through(b[:1], x))),
    ),
    "lists, enumerated": (
        layers(lists),
        each(lambda b, x: both(x, *(part for _, part in enumerate(b)))),
    ),
    "lists of lists of blocks": (stages, run_stages),
    "a dict of lists of lists": (deep, run_deep),
    "a list with a forward": (layers(lambda: Listed(pair())), unpacked),
    "sequentials, called": (layers(sequential), each(lambda b, x: x + b(x))),
    "sequentials, indexed": (layers(sequential), each(lambda b, x: x + b[2](b[1](b[0](x))))),
    "sequentials, sliced": (layers(sequential), each(lambda b, x: x + b[1:](b[:1](x)))),
    "sequentials, iterated": (layers(sequential), each(lambda b, x: x + through(b, x))),
    "sequentials, by name": (
        layers(lambda: nn.Sequential(OrderedDict(a=up(), b=down()))),
        each(lambda b, x: x + b.b(b.a(x))),
    ),
    "sequentials, called and indexed": (layers(sequential, count=5), run_called_and_indexed),
    "a sequential of sequentials": (
        layers(sequential, lambda blocks: nn.Sequential(*blocks)),
        each(lambda b, x: x + through(b, x)),
    ),
    "dicts, keys": (layers(dicts), each(lambda b, x: both(x, *(b[key] for key in b.keys())))),  # noqa: SIM118
    "dicts, values": (layers(dicts), each(lambda b, x: both(x, *b.values()))),
    "dicts, items": (layers(dicts), each(lambda b, x: both(x, *(part for _, part in b.items())))),
    "dicts, attributes": (layers(dicts), each(lambda b, x: both(x, b.first, b.second))),
    "a class of its own, iterated": (
        layers(lambda: Sequence(pair())),
        each(lambda b, x: both(x, *b)),
    ),
    "a class of its own, indexed": (
        layers(lambda: Sequence(pair())),
        each(lambda b, x: both(x, b[0], b[len(b) - 1])),
    ),
    "a class of its own, called": (layers(lambda: Sequence(pair())), each(lambda b, x: b(x))),
    "children": (layers(Block), each(lambda b, x: both(x, *b.children()))),
    "the table of modules": (layers(Block), each(lambda b, x: both(x, *b._modules.values()))),
    "the table of modules in vars": (
        layers(Block),
        each(lambda b, x: both(x, *vars(b)["_modules"].values())),
    ),
    "the table of parameters in vars": (
        layers(Head),
        each(lambda b, x: b(x) * vars(vars(b)["_modules"]["linear"])["_parameters"]["bias"]),
    ),
    "plain lists in blocks": (
        layers(Plain),
        each(lambda b, x: both(x, b.pieces[0], b.pieces[1][0])),
    ),
    "plain dicts in blocks": (layers(Plain), each(lambda b, x: both(x, *b.table.values()))),
    "partials in blocks": (layers(Plain), each(lambda b, x: b.partial(x))),
    "bound methods in blocks": (layers(Plain), each(lambda b, x: b.method(x))),
    "bound methods of parts": (layers(Plain), each(lambda b, x: both(x, *b.inner))),
    "objects in blocks": (
        layers(Plain),
        each(lambda b, x: both(x, b.object.first, b.object.second)),
    ),
    "raw parameters in blocks": (
        layers(Plain),
        each(
            lambda b, x: (
                b(x)
                + (x @ b.raw[0].T + b.raw[1]) @ b.parameters_too["weight"].T
                + b.parameters_too["kept"][0]
            )
        ),
    ),
    "raw parameters alone": (
        layers(Plain, count=5),
        each(lambda b, x: (x @ b.raw[0].T) @ b.parameters_too["weight"].T),
    ),
    "two lists": (two_lists, run_zip),
    "two lists, looked into": (two_lists, run_zip_inside),
    "blocks, reversed": (
        layers(Block),
        lambda m, x: functools.reduce(lambda y, b: b(y), reversed(m.layers), x),
    ),
    "blocks, in another order": (
        layers(Block, count=5),
        lambda m, x: functools.reduce(lambda y, i: m.layers[i](y), (3, 0, 4, 2, 1), x),
    ),
    "blocks, twice": (layers(Block), run_twice),
    "blocks, sliced": (
        layers(Block, count=5),
        lambda m, x: functools.reduce(lambda y, b: b(y), [*m.layers[1:], *m.layers[:3]], x),
    ),
    "blocks, by name": (named_layers, run_by_name),
    "blocks, by another method": (layers(Block), each(lambda b, x: b.other(x))),
    "blocks, by both methods": (layers(Block), each(lambda b, x: b.other(b(x)))),
    "blocks, by the class": (layers(Block), each(lambda b, x: Block.forward(b, x))),
    "blocks, their weights read": (layers(Block), run_weights_outside),
    "blocks, some looked into": (layers(Block, count=5), run_inside_first),
    "blocks in plain lists": (plain_lists, run_plain_lists),
    "raw parameters of blocks": (raw_parameters, run_raw_parameters),
    "raw parameters of blocks, after them": (raw_parameters, run_raw_after),
    "partials and methods of blocks": (partials, run_partials),
    "methods of parts of blocks": (partials, run_inner_methods),
    "parameter lists and dicts": (layers(WithParameters), each(lambda b, x: b(x))),
    "parameter lists, indexed": (
        layers(WithParameters),
        each(lambda b, x: (x @ b.weights[0].T) @ b.weights[1].T + b.biases["second"]),
    ),
    "buffers in plain lists": (layers(Tracks), each(run_with_buffer)),
    "heads in lists": (
        layers(lambda: nn.ModuleList([nn.Sequential(Head(), up()), down()]), count=5),
        run_medusa,
    ),
    "heads, called": (
        layers(lambda: nn.Sequential(Head(), nn.Linear(WIDTH, 7))),
        lambda m, x: torch.stack([head(x) for head in m.layers]),
    ),
    "modules shared inside": (shared_inside, unpacked),
    "modules shared outside": (shared_outside, run_shared_outside),
}
