"""Regions that a model checkpoints: gradients as without, and as little saved as by the model."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from broad_cases import broad, share_of
from torch import nn
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import autoparallel
from autoparallel.view.report import plan_text

WIDTH = 12
held = functools.partial(checkpoint, use_reentrant=False)


class Block(nn.Module):
    """A layer that saves much more than its input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, *, shift: torch.Tensor | None = None) -> torch.Tensor:
        """Return a tensor of the same shape."""
        y = torch.sin(torch.tanh(self.up(x)))
        return x + self.down(y if shift is None else y * shift.mean())


class Inside(Block):
    """A layer whose own forward checkpoints the larger part of it."""

    def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        """Return a tensor of the same shape."""

        def body(x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.sin(torch.tanh(self.up(x))))

        return x + checkpoint(body, x, use_reentrant=self.training)


class Stack(nn.Module):
    """Layers that `use` calls, between an entry and a loss."""

    def __init__(self, use: Any, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.use = use
        self.entry, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the loss."""
        return (self.out(self.use(self.blocks, self.entry(x))) - x).square().mean()


def each(call: Any) -> Any:
    """Return a function that calls the blocks one after the other by `call`."""

    def use(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            x = call(block, x)
        return x

    return use


def nested(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    """Call the blocks in a checkpoint with a checkpoint inside."""

    def both(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(blocks[1], blocks[0](x), use_reentrant=False)

    return blocks[2](checkpoint(both, x, use_reentrant=False))


KINDS = {
    "reentrant": each(lambda b, x: checkpoint(b, x, use_reentrant=True)),
    "not reentrant": each(lambda b, x: checkpoint(b, x, use_reentrant=False)),
    "by reference": each(held),
    "by name": each(lambda b, x: torch_checkpoint.checkpoint(b, x, use_reentrant=True)),
    "keyword": each(lambda b, x: checkpoint(b, x, shift=x, use_reentrant=False)),
    "sequential": lambda blocks, x: checkpoint_sequential(list(blocks), 3, x, use_reentrant=False),
    "every other": lambda blocks, x: blocks[2](held(blocks[1], blocks[0](x))),
    "nested": nested,
}


def compared(model: nn.Module, world_size: int, x: torch.Tensor) -> Any:
    """Return the plan of a model whose split step is its own."""
    whole = copy.deepcopy(model)
    loss = whole(x)
    loss.backward()
    plan = autoparallel.make_plan(model, world_size, example_inputs=x)
    made = autoparallel.simulate(model, example_inputs=x, plan=plan)
    torch.testing.assert_close(made.output, loss.detach(), rtol=1e-12, atol=0)
    expected = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    gradients = {name: grad for name, grad in made.gradients.items() if grad is not None}
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-13)
    return plan


def saved(model: nn.Module, x: torch.Tensor) -> int:
    """Return the bytes that a forward saves, those of parameters left out, each memory once."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in known:
            seen[memory.data_ptr()] = memory.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(seen.values())


def batch() -> torch.Tensor:
    """Return an input."""
    return torch.randn(6, 4, WIDTH, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning")
@pytest.mark.parametrize("block", [Block, Inside])
@pytest.mark.parametrize("world_size", [*broad(2), 3])
@pytest.mark.parametrize("kind", share_of(["called plainly", *KINDS], 4))
def test_gradients_are_the_models(kind: str, world_size: int, block: type[nn.Module]) -> None:
    torch.manual_seed(0)
    use = KINDS.get(kind, each(lambda b, x: b(x)))
    plan = compared(Stack(use, block).double(), world_size, batch())
    assert not plan.breaks
    if kind == "called plainly" and block is Block:
        assert not plan.recomputed
    else:
        assert plan.recomputed


@pytest.mark.parametrize("kind", share_of(KINDS, 4))
def test_as_little_is_saved_as_by_the_model(kind: str) -> None:
    torch.manual_seed(0)
    plain, x = Stack(KINDS[kind]).double(), batch()
    free = Stack(each(lambda b, x: b(x))).double()
    asked, kept = (
        autoparallel.autoparallelize(copy.deepcopy(plain), 1, example_inputs=x, recompute=recompute)
        for recompute in (None, "none")
    )
    least, most = saved(plain, x), saved(free, x)
    assert most > 1.3 * least
    assert saved(asked, x) <= 1.1 * least
    assert saved(kept, x) > 0.9 * most - 4 * x.nbytes


def test_the_report_says_who_chose() -> None:
    plan = autoparallel.make_plan(Stack(KINDS["by reference"]), 2, example_inputs=batch().float())
    assert plan.recompute == tuple((f"blocks.{n}", "full") for n in range(3))
    assert "in the backward pass, as the model asks: blocks.{0..2} (full)" in plan_text(plan)
    other = autoparallel.make_plan(
        Stack(KINDS["by reference"]), 2, example_inputs=batch().float(), recompute="none"
    )
    assert not other.recompute


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_dropped_is_dropped_again(reentrant: bool) -> None:
    """Dropout in a region draws in the second run what it drew in the first."""

    def use(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        def body(x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(block(x), 0.5)

        return checkpoint(body, x, use_reentrant=reentrant)

    torch.manual_seed(0)
    model, x = Stack(each(use)).double(), batch()
    made = [
        autoparallel.simulate(model, 2, example_inputs=x, recompute=recompute)
        for recompute in ("model", "none")
    ]
    torch.testing.assert_close(made[0].output, made[1].output, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        dict(made[0].gradients), dict(made[1].gradients), rtol=1e-10, atol=1e-13
    )


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_a_reentrant_one_that_nothing_trained_enters() -> None:
    """Torch gives the parameters inside no gradient, and so does the split module."""
    torch.manual_seed(0)
    model = Stack(each(lambda b, x: checkpoint(b, x, use_reentrant=True))).double()
    model.entry.requires_grad_(False)
    plan = compared(model, 2, batch())
    assert not plan.breaks


class Normed(nn.Module):
    """A region with a batch norm, whose statistics torch moves twice."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the loss."""
        h = checkpoint(self.norm, self.entry(x), use_reentrant=False)
        return self.out(h).square().mean()


def test_buffers_are_written_as_often_as_by_the_model() -> None:
    torch.manual_seed(0)
    plain, x = Normed().double(), torch.randn(6, WIDTH, dtype=torch.float64)
    split = autoparallel.autoparallelize(copy.deepcopy(plain), 1, example_inputs=x)
    for module in (plain, split):
        module(x).backward()
    torch.testing.assert_close(dict(split.named_buffers()), dict(plain.named_buffers()))


def test_a_context_of_the_users_stays_python() -> None:
    def contexts() -> Any:
        return torch.autocast("cpu", enabled=False), torch.autocast("cpu", enabled=False)

    def use(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(block, x, use_reentrant=False, context_fn=contexts)

    torch.manual_seed(0)
    plan = compared(Stack(each(use)).double(), 2, batch())
    assert "context of its own" in plan.breaks[0].reason


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_transformers_enable_it(reentrant: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=3, n_embd=24, n_head=2, vocab_size=31, n_positions=16, resid_pdrop=0.0
    )
    config.embd_pdrop = config.attn_pdrop = 0.0
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).double().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    inputs = {"input_ids": torch.randint(31, (3, 8)), "use_cache": False}
    whole = copy.deepcopy(model)
    loss = whole(**inputs).logits.square().mean()
    loss.backward()
    plan = autoparallel.make_plan(model, 2, example_inputs=inputs)
    assert [mode for _, mode in plan.recompute] == ["full"] * 3
    made = autoparallel.simulate(
        model, example_inputs=inputs, plan=plan, backward=lambda out: out.logits.square().mean()
    )
    named = whole.named_parameters(remove_duplicate=False)
    expected = {name: p.grad for name, p in named}
    torch.testing.assert_close(dict(made.gradients), expected, rtol=1e-9, atol=1e-12)


class Entered(nn.Module):
    """A part that checkpoints from its own input on, in a model that stays Python."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (Around() for _ in range(2))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the loss. The branch on a value is why the model is not traced whole."""
        h = self.first(x)
        h = self.second(self.out(x) + h)
        return h.square().mean() if float(h.detach().sum()) < 1e9 else h.sum()


class Around(Block):
    """A layer that is a reentrant checkpoint as a whole."""

    def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        """Return a tensor of the same shape."""
        return checkpoint(super().forward, x, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_a_part_is_entered_as_its_caller_calls_it() -> None:
    """The first part's input needs no gradient, and its parameters get none; the second's do."""
    torch.manual_seed(0)
    plan = compared(Entered().double(), 2, batch())
    assert plan.breaks
