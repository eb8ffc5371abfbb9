"""Models that no tracer takes whole, each of them for a reason of its own."""

from __future__ import annotations

import dataclasses
import logging
import random
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

WIDTH, WORDS, LAYERS = 12, 31, 3


class Block(nn.Module):
    """A Block has two products and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    """A Model has an embedding, a middle, a tied head and a loss. x: (b, s) of words."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.first, self.middle, self.last = Block(), middle, Block()
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.last(self.middle(self.first(self.embed(x)))))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


class Several(nn.Module):
    """Several has blocks, which its subclasses call in ways that cannot be traced."""

    def __init__(self, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(LAYERS))
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.9))


class Branches(Several):
    """Takes one of two paths, by the sign of a sum; a parameter of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) * self.scale if float(x.detach().sum()) > 0 else block(-x)
        return x


class Items(Several):
    """Computes with a tensor's value in Python."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        top = x.max().item()
        for block in self.blocks:
            x = block(x) * (1.0 + top / 10)
        return x


class Loops(Several):
    """Calls its blocks a number of times that depends on the data: some twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in range(int(x.abs().sum()) % 3 + 4):
            x = self.blocks[index % LAYERS](x)
        return x


class Numpy(Several):
    """Takes a detour through numpy, which torch does not follow."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.from_numpy(np.tanh(x.detach().numpy()))
        for block in self.blocks:
            x = block(x) * weights
        return x


class Remarks(Several):
    """Logs values, and takes its blocks from a generator."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (block for block in self.blocks):
            x = block(x)
            logging.getLogger(__name__).info("mean %.3f", float(x.mean()))
        return x


class Drops(Several):
    """Leaves out layers by chance, as BART and OPT do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            if self.training and torch.rand([]) < 0.5:
                continue
            x = block(x)
        return x


class PythonDrops(Several):
    """The same with the generators of Python and numpy, which a tracer does not see."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            if random.random() + np.random.uniform() < 1:
                continue
            x = block(x)
        return x


@dataclasses.dataclass
class Result:
    """A Result is a dataclass that a block returns."""

    x: torch.Tensor
    extra: torch.Tensor | None = None


class Structured(Block):
    """It takes keyword arguments only, and returns a dataclass, or a dict, or a tuple with None."""

    def forward(  # type: ignore[override]
        self, *, x: torch.Tensor, mask: torch.Tensor | None = None, kind: str = "dataclass"
    ) -> Any:
        y = super().forward(x)
        if mask is not None:
            y = y * mask
        if kind == "dataclass":
            return Result(y)
        return {"x": y, "none": None} if kind == "dict" else (None, (y, mask))


class Structures(Several):
    """It calls one block in three ways."""

    def __init__(self) -> None:
        super().__init__(Structured)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if float(x.detach().sum()) == 0.123:
            return x
        x = self.blocks[0](x=x).x
        x = self.blocks[0](x=x, mask=x > 0, kind="dict")["x"]
        _, (x, mask) = self.blocks[1](x=x, mask=torch.ones(WIDTH).double(), kind="tuple")
        return self.blocks[1](x=x).x * mask


class WithoutGradient(Several):
    """It has a block under no_grad, one that is frozen, and one whose input has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            constant = self.blocks[0](x)
            if float(constant.sum()) == 0.123:
                return x
        return self.blocks[1](x) + self.blocks[2](constant)


class Reads(Several):
    """Python reads parameters of a block that is split, directly and in a sum over all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if float(x.detach().sum()) == 0.123:
            return x
        for block in self.blocks:
            x = block(x)
        penalty = sum(parameter.square().sum() for parameter in self.parameters())
        up = self.blocks[1].up
        return x + nn.functional.linear(nn.functional.linear(x, up.weight), up.weight.T) + penalty


class Keeps(Block):
    """Leaves a tensor behind, in an attribute or in a list that it is given."""

    kept: Any = None

    def forward(self, x: torch.Tensor, box: list[Any] | None = None) -> torch.Tensor:
        y = super().forward(x)
        if box is None:
            self.kept = y.mean()
        else:
            box.append(y.mean())
        return y


class Keeping(Several):
    """Reads what its blocks leave behind."""

    def __init__(self) -> None:
        super().__init__(Keeps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if float(x.detach().sum()) == 0.123:
            return x
        x = self.blocks[0](x)
        box: list[Any] = []
        x = self.blocks[1](x, box)
        return x * self.blocks[0].kept * box[0]


class Costs(Block):
    """Returns a loss beside its result, which a whole model may return split."""

    def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
        y = torch.relu(self.up(self.norm(x)))
        return x + self.down(y), y, y.square().mean()


class Penalties(Several):
    """Adds up what its blocks cost."""

    def __init__(self) -> None:
        super().__init__(Costs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(()).double()
        for block in self.blocks:
            x, inner, cost = block(x)
            total = total + cost + inner.sin().mean() if float(cost.detach()) > 0 else total
        return x * total


class Number(Block):
    """Has a number, and reads it: no two are equal after all."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1.0 + self.number)


class Numbers(Branches):
    """It has blocks that look the same but for a number."""

    def __init__(self) -> None:
        Several.__init__(self, Number)
        for index, block in enumerate(self.blocks):
            block.number = index  # type: ignore[assignment]


class Packed(Several):
    """It runs a recurrent network on packed sequences; lists hold blocks and a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.listed = [self.blocks[0], self.blocks[1]]
        self.method, self.weights = self.run, [self.scale]

    def run(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.listed:
            x = block(x)
        return x * self.weights[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lengths = (x[:, 0, 0] > 0).long().cpu() + x.size(1) - 1
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = pad_packed_sequence(
            self.recurrent(packed)[0], batch_first=True, total_length=x.size(1)
        )
        return self.method(y)


class Counts(Several):
    """It has buffers that Python and a block write to."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if int(self.calls) % 2:
            x = self.blocks[0](x)
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


MIDDLES: dict[str, type[Several]] = {
    kind.__name__: kind
    for kind in (
        Branches, Items, Loops, Numpy, Remarks, Drops, PythonDrops, Structures,
        WithoutGradient, Reads, Keeping, Penalties, Numbers, Packed, Counts,
    )
}  # fmt: skip


def build(name: str) -> Model:
    """Return the model in float64 and train mode, with the same weights at every call."""
    torch.manual_seed(11)
    return Model(MIDDLES[name]()).double()


def inputs() -> dict[str, torch.Tensor]:
    """Return a batch of three sequences of seven words."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(WORDS, (3, 7), generator=generator)
    return {"x": x, "labels": x.roll(1)}
