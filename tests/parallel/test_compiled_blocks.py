"""torch.compile of split modules with many equal blocks: one function for all of them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from broad_cases import broad
from processes import run_processes
from torch import nn
from torch._dynamo.utils import counters

import autoparallel
from autoparallel.rewrite import block_functions

pytestmark = [
    pytest.mark.usefixtures("one_trace", "fresh_compiler"),
    # Torch looks at `grad` of a function's arguments, and hides what it is told then.
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
]
MANY = 40
FEW = 5
FUNCTIONS = 3  # before the blocks, of a block, and after them


class Block(nn.Module):
    """A Block has two products, and drops."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.first, self.second = nn.Linear(size, inner), nn.Linear(inner, size)
        self.dropout = nn.Dropout(0.25)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inner = torch.tanh(self.dropout(self.first(self.norm(x))).view(x.shape[0], 2, -1))
        y = self.second((inner * torch.sigmoid(inner)).view(x.shape[0], -1))
        return x + self.dropout(y) * 0.5, inner.mean()


class Stack(nn.Module):
    """A Stack is blocks between two products; inner: the inner size of each block."""

    def __init__(self, *inner: int) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.before, self.after = nn.Linear(6, 8), nn.Linear(8, 6)
        self.blocks = nn.ModuleList(Block(8, size) for size in inner)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        """Return a loss, and a number of each block that no other line reads."""
        x, numbers = self.before(x), []
        for block in self.blocks:
            x, number = block(x)
            numbers.append(number)
        return {"loss": self.after(x).square().sum(), "numbers": numbers}


def rows(count: int = 4) -> torch.Tensor:
    return torch.linspace(-1, 1, 6 * count, dtype=torch.float64).view(count, 6)


def pair(inner: tuple[int, ...], ranks: int = 1, **options: Any) -> tuple[Any, Any]:
    """Two parallel modules of one plan."""
    model = Stack(*inner).double()
    plan = autoparallel.make_plan(model, ranks, example_inputs=rows(), **options)
    return autoparallel.apply_plan(model, plan), autoparallel.apply_plan(
        Stack(*inner).double(), plan
    )


def step(call: Any, module: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """All that a call returns, and all gradients, this rank's parts."""
    module.zero_grad()
    result = call(x)
    result["loss"].backward()
    tensors = [result["loss"], *result["numbers"], *(p.grad for p in module.parameters())]
    return [t.to_local() if hasattr(t, "to_local") else t for t in (x.detach() for x in tensors)]


def worst(
    module: Any, other: Any, backend: str = "aot_eager", counts: Sequence[int] = (4, 4, 7, 9)
) -> float:
    """The largest difference to the module that is not compiled, in steps of so many rows."""
    call = torch.compile(module, backend=backend, fullgraph=True)
    errors = []
    for count in counts:
        pairs = zip(step(call, module, rows(count)), step(other, other, rows(count)), strict=True)
        errors += [float((one - two).abs().max() / two.abs().max()) for one, two in pairs]
    return max(errors)


def test_equal_blocks_are_one_function() -> None:
    """Numbers that blocks draw are their own; other sizes compile each function once more."""
    assert worst(*pair((12,) * MANY)) < 1e-12
    assert counters["stats"]["unique_graphs"] == 2 * FUNCTIONS
    assert not counters["graph_break"]


def test_few_blocks_stay_in_one_graph() -> None:
    assert worst(*pair((12,) * 4), "eager") < 1e-12
    assert counters["stats"]["unique_graphs"] == 2


def test_blocks_of_other_sizes_are_another_function() -> None:
    """Their lines are the same, and to run them a compiler would compile them again."""
    assert worst(*pair((12,) * MANY + (10,) + (16,) * MANY), "eager") < 1e-12
    # The single block is a function between the two of blocks.
    assert counters["stats"]["unique_graphs"] == 2 * (FUNCTIONS + 2)


def test_blocks_that_are_recomputed_are_one_function() -> None:
    module, other = pair((12,) * MANY, recompute="full")
    assert "recomputed(" in module.emitted_program
    assert worst(module, other) < 1e-12
    assert counters["stats"]["unique_graphs"] == 2 * FUNCTIONS


def test_what_is_not_needed_later_is_freed() -> None:
    """Without a backward pass no block's results outlive the next block."""
    module, _ = pair((12,) * MANY)
    results: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        def run(*tensors: Any) -> Any:
            alive.append(sum(each() is not None for each in results))
            first, *others = graph(*tensors)
            results.append(weakref.ref(first))
            return (first, *others)

        return run

    with torch.no_grad():
        torch.compile(module, backend=backend, fullgraph=True)(rows())
    assert len(alive) == MANY + 2
    assert max(alive) == 1


def compared(rank: int, blocks: int, counts: Sequence[int]) -> tuple[bool, int]:
    """On a rank: say whether a compiled module does as one that is not, and count its graphs."""
    torch._dynamo.reset()
    counters.clear()
    with pytest.MonkeyPatch.context() as patch:
        if blocks < MANY:
            patch.setattr(block_functions, "_is_worth", lambda lines, count: lines >= 10)
        error = worst(*pair((12,) * blocks, 2), counts=counts)
    return error < 1e-12, counters["stats"]["unique_graphs"]


# With sizes that a compiler does not know, parts of unequal size take it long.
@pytest.mark.parametrize(
    ("blocks", "counts"), [(FEW, (4, 4)), *broad((MANY, (4, 4, 7, 9)))], ids=["few", "many"]
)
def test_equal_blocks_are_one_function_on_two_ranks(blocks: int, counts: tuple[int, ...]) -> None:
    """A few of them, where these are worth a function, or as many as are worth it always."""
    graphs = FUNCTIONS * len(set(counts[:3]))
    assert run_processes(compared, 2, blocks, counts) == [(True, graphs)] * 2
