"""Blocks that look the same and are not, or are looked into from outside: they are traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_stacks import LAYERS, WIDTH, Block, Stack, both, instances, numbered, sample, stack
from broad_cases import share_of
from torch import nn

from autoparallel.capture.export import capture
from autoparallel.errors import CaptureError


class OddIsDifferent(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -super().forward(x) if self.layer_idx % 2 else super().forward(x)


class ThreeIsDifferent(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -super().forward(x) if self.layer_idx == 3 else super().forward(x)


class FarIsDifferent(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * [1.0, 1.0, 2.0, 1.0, 1.0, 1.0][self.layer_idx]


class CountsItsCalls(Block):
    """State of its own: the second call does something else."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


class CountsInContextStack(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.context.depth = 0
        return super().forward(x)


class CountsInContext(Block):
    """State shared by all blocks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.context.depth += 1
        return -super().forward(x) if self.context.depth % 7 == 3 else super().forward(x)


class InPlace(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += self.second(torch.relu(self.first(self.norm(x))))
        return x


class InPlaceOnAView(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x[:, 1:].mul_(2)
        return super().forward(x)


class ReturnsAView(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(0, 1)


class CountsInABuffer(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps.add_(1)
        return super().forward(x)


class Context:
    """A plain object that blocks share."""

    def __init__(self) -> None:
        self.depth = 0
        self.kept: list[torch.Tensor] = []
        self.bias: Any = None


class KeepsAside(Block):
    """A second result that is handed over behind the caller's back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(self.norm(x))
        self.context.kept.append(hidden.mean())
        return x + self.second(hidden)


class KeepsAsideStack(Stack):
    def forward(self, x: torch.Tensor) -> Any:
        self.context.kept.clear()
        return super().forward(x), sum(self.context.kept)


KEPT: list[torch.Tensor] = []


class KeepsGlobally(Block):
    """The same where no object of the model knows of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(self.norm(x))
        KEPT.append(hidden.mean())
        return x + self.second(hidden)


class KeepsGloballyStack(Stack):
    def forward(self, x: torch.Tensor) -> Any:
        KEPT.clear()
        x = super().forward(x)
        total = sum(KEPT)
        KEPT.clear()
        return x, total


class ReadsAside(Block):
    """An input that is handed over behind the caller's back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.context.bias


class ReadsAsideStack(Stack):
    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        for index, block in enumerate(self.blocks):
            self.context.bias = torch.relu(x) if index == 2 else torch.tanh(x)
            x = block(x)
        return x


class LeavesAnAttribute(Block):
    penalty: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(self.norm(x))
        self.penalty = hidden.square().mean()
        return x + self.second(hidden)


class LeavesAnAttributeStack(Stack):
    def forward(self, x: torch.Tensor) -> Any:
        x = super().forward(x)
        return x, sum(block.penalty for block in self.blocks if block.penalty is not None)


class PenalizesWeights(Stack):
    """Reads the parameters of blocks from outside."""

    def forward(self, x: torch.Tensor) -> Any:
        x = super().forward(x)
        return x, sum(parameter.square().sum() for parameter in self.parameters())


class PenalizesOneWeight(Stack):
    def forward(self, x: torch.Tensor) -> Any:
        x = super().forward(x)
        return x, sum(block.first.weight.square().sum() for block in self.blocks)


class LooksForAWeight(Stack):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) * sum(hasattr(block, "first") for block in self.blocks)


class SwallowsErrors(Stack):
    """A fold that gives up must not be taken for the model's own error."""

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            try:
                x = x + block.first.weight.sum()
            except Exception:
                x = x * 2
            x = block(x)
        return x


class CountsParameters(Stack):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) * len(list(self.parameters()))


class CallsAPart(Stack):
    def forward(self, x: torch.Tensor) -> Any:
        x = super().forward(x)
        return self.blocks[2].second(self.blocks[3].first(x))


def with_context(kind: type[Stack], block: type[Block]) -> Stack:
    context = Context()
    model = kind(block(context=context) for _ in range(LAYERS))
    model.context = context
    return model


def hooked() -> Stack:
    model = stack()
    model.blocks[3].register_forward_hook(lambda module, args, result: result * 2)
    return model


def hooked_inside() -> Stack:
    model = stack()
    model.blocks[3].first.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return model


def patched() -> Stack:
    model = stack()
    block = model.blocks[3]
    block.forward = lambda x: Block.forward(block, x) * 3
    return model


def frozen() -> Stack:
    model = stack()
    model.blocks[3].first.weight.requires_grad_(False)
    return model


def one_in_eval_mode() -> Stack:
    model = Stack(Dropping() for _ in range(LAYERS))
    model.blocks[3].eval()
    return model


class Dropping(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


def tied_to_the_stem() -> Stack:
    model = Stack(Square() for _ in range(LAYERS))
    model.blocks[3].mix.weight = model.stem.weight
    return model


class Square(Block):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(super().forward(x))


def own_function() -> Stack:
    """An attribute that is a function: the same one is equal, another one is not."""

    class Applies(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.function(super().forward(x))

    return Stack(Applies(function=torch.tanh if i == 3 else torch.relu) for i in range(LAYERS))


ODD_ONES = {
    "odd": lambda: numbered(OddIsDifferent),
    "three": lambda: numbered(ThreeIsDifferent),
    "far": lambda: numbered(FarIsDifferent),
    "shared-count": lambda: with_context(CountsInContextStack, CountsInContext),
    "in-place": lambda: stack(InPlace),
    "in-place-view": lambda: stack(InPlaceOnAView),
    "returns-view": lambda: stack(ReturnsAView),
    "buffer-count": lambda: stack(CountsInABuffer),
    "keeps-aside": lambda: with_context(KeepsAsideStack, KeepsAside),
    "keeps-globally": lambda: KeepsGloballyStack(KeepsGlobally() for _ in range(LAYERS)),
    "reads-aside": lambda: with_context(ReadsAsideStack, ReadsAside),
    "leaves-attribute": lambda: LeavesAnAttributeStack(LeavesAnAttribute() for _ in range(LAYERS)),
    "all-weights": lambda: PenalizesWeights(Block() for _ in range(LAYERS)),
    "one-weight": lambda: PenalizesOneWeight(Block() for _ in range(LAYERS)),
    "looks": lambda: LooksForAWeight(Block() for _ in range(LAYERS)),
    "swallows": lambda: SwallowsErrors(Block() for _ in range(LAYERS)),
    "counts": lambda: CountsParameters(Block() for _ in range(LAYERS)),
    "part": lambda: CallsAPart(Block() for _ in range(LAYERS)),
}


@pytest.mark.parametrize("name", share_of(ODD_ONES, 4))
def test_what_cannot_be_folded_is_traced(name: str) -> None:
    """Blocks that look the same and are not, or are looked into: no block is copied."""
    model = ODD_ONES[name]()
    folded = capture(model, (sample(),), {})
    full = capture(ODD_ONES[name](), (sample(),), {}, fold=False)
    assert str(folded.graph) == str(full.graph)
    assert folded.repeats == ()
    assert not any(kind.__name__ == "forward" for kind in map(type, model.modules()))


def test_counted_calls_are_refused() -> None:
    """A graph would go on with the count of its trace."""
    with pytest.raises(CaptureError, match=r"blocks\.0\.calls"):
        capture(stack(CountsItsCalls), (sample(),), {})


@pytest.mark.parametrize(
    "make", [hooked, hooked_inside, patched, frozen, one_in_eval_mode, tied_to_the_stem,
             own_function],
)  # fmt: skip
def test_the_one_that_differs_is_traced(make: Any) -> None:
    """The others are folded all the same."""
    captured = both(make(), sample())
    assert instances(captured) == [LAYERS - 2]
    assert "blocks.3" not in captured.repeats[0]
