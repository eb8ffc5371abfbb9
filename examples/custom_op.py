"""Splits and trains a model with ops of its own, for which nobody wrote a sharding rule.

    python examples/custom_op.py                                    both ranks in this process
    torchrun --standalone --nproc-per-node 2 examples/custom_op.py  a process each

The model mixes positions by a running sum that fades, and features by a gate. Both are custom ops,
opaque to torch and to the planner. The planner runs them on small tensors to find out how they may
be split, and proves each rule that it finds before it uses it.
"""

import argparse
import os

import torch
from torch import nn
from torch.nn import functional

import autoparallel
from autoparallel.placement import layout_text
from autoparallel.plan import Plan

WORLD_SIZE = 2
VOCABULARY, WIDTH, INNER, LAYERS = 61, 24, 40, 2
BATCH, SEQUENCE, LEARNING_RATE = 4, 12, 0.02


@torch.library.custom_op("examples::gated", mutates_args=())
def gated(x: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up of (..., 2 n): gate and up lie side by side, as one product made
    them.
    """
    gate, up = x.chunk(2, -1)
    return functional.silu(gate) * up


@gated.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def _gated_backward(ctx, grad):  # type: ignore[no-untyped-def]
    """Return the gradient of (..., 2 n), by the derivative of silu."""
    gate, up = ctx.saved_tensors[0].chunk(2, -1)
    share = torch.sigmoid(gate)
    slope = share * (1 + gate * (1 - share))
    return torch.cat([grad * up * slope, grad * gate * share], -1)


def _gated_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    """Save the input for the backward pass."""
    ctx.save_for_backward(*inputs)


gated.register_autograd(_gated_backward, setup_context=_gated_setup)


@torch.library.custom_op("examples::fading_sum", mutates_args=())
def fading_sum(x: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """Return y[b, t, c] = decay[c] y[b, t-1, c] + x[b, t, c]: a linear recurrence over time."""
    rows, state = [], torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        state = decay * state + x[:, t]
        rows.append(state)
    return torch.stack(rows, 1)


@fading_sum.register_fake
def _(x: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _fading_backward(ctx, grad):  # type: ignore[no-untyped-def]
    """Return the gradients of x (b, t, c) and of decay (c)."""
    decay, y = ctx.saved_tensors
    rows, state = [], torch.zeros_like(grad[:, 0])
    # The gradient obeys the same recurrence, run backwards in time.
    for t in reversed(range(grad.shape[1])):
        state = decay * state + grad[:, t]
        rows.append(state)
    grad_x = torch.stack(rows[::-1], 1)
    return grad_x, (grad_x[:, 1:] * y[:, :-1]).sum((0, 1))


def _fading_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    """Save decay and the output for the backward pass."""
    ctx.save_for_backward(inputs[1], output)


fading_sum.register_autograd(_fading_backward, setup_context=_fading_setup)


class Block(nn.Module):
    """One layer, in which positions are mixed by `fading_sum`, and features by `gated`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.entry = nn.Linear(WIDTH, 2 * INNER)
        self.decay = nn.Parameter(torch.rand(INNER))
        self.out = nn.Linear(INNER, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (b, t, WIDTH) to the same shape."""
        y = fading_sum(gated(self.entry(self.norm(x))), self.decay)
        return x + self.out(y)


class Model(nn.Module):
    """A language model of such layers, which returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of tokens (b, t) with labels (b, t)."""
        logits = self.head(self.blocks(self.embedding(tokens)))
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def build() -> Model:
    """Return the model, with the same weights at every call, in float64."""
    torch.manual_seed(0)
    return Model().double()


def batch(step: int) -> dict[str, torch.Tensor]:
    """Return the sequences of a step, in which every token is three more than the one before."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(VOCABULARY, (BATCH, 1), generator=generator)
    tokens = (starts + 3 * torch.arange(SEQUENCE + 1)) % VOCABULARY
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}


def train_whole(steps: int) -> list[float]:
    """Return the losses of the unsplit model."""
    return train(build(), steps)


def train(model: nn.Module, steps: int) -> list[float]:
    """Return the losses of `steps` steps of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(**batch(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_simulated(plan: Plan, steps: int) -> list[float]:
    """Return the losses by the plan, with all ranks in this process: only its gradients are
    used.
    """
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for step in range(steps):
        result = autoparallel.simulate(model, WORLD_SIZE, example_inputs=batch(step), plan=plan)
        for path, parameter in model.named_parameters():
            parameter.grad = result.gradients[path].to(parameter.dtype)
        optimizer.step()
        losses.append(result.output.item())
    return losses


def show(plan: Plan) -> None:
    """Print the rules that were found for the custom ops, and the plan's use of them."""
    for target in dict.fromkeys(op.target for op in plan.ops if op.discovered):
        calls = [op for op in plan.ops if op.target == target]
        print(f"\n{target}, {len(calls)} calls")
        for rule in dict.fromkeys(op.discovered for op in calls):
            print(f"  found:    {rule}")
        for op in calls:
            sides = (", ".join(map(layout_text, side)) for side in (op.operands, op.results))
            print(f"  planned:  {op.name}: {' -> '.join(sides)}")
    split = [p.path for p in plan.parameters if not p.reason]
    print(f"\nSplit over {plan.world_size} ranks: {', '.join(split)}")


def main() -> int:
    """Return the exit status: 0 if the split model's losses are those of the whole one, and
    fall.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40, help="of training (default: 40)")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    # Planning needs no process group: every rank makes the same plan.
    plan = autoparallel.make_plan(build(), WORLD_SIZE, example_inputs=batch(0))
    first = os.environ.get("RANK", "0") == "0"
    if first:
        show(plan)
    if "RANK" in os.environ:
        model = autoparallel.autoparallelize(build(), WORLD_SIZE, example_inputs=batch(0))
        losses, where = train(model, steps), f"{WORLD_SIZE} processes"
        torch.distributed.destroy_process_group()
    else:
        losses, where = train_simulated(plan, steps), "all ranks in one process"
    whole = train_whole(steps)
    apart = max(abs(one - two) for one, two in zip(losses, whole, strict=True))
    if first:
        print(f"\n{steps} steps, {where}: loss {losses[0]:.4f} to {losses[-1]:.4f}")
        print(f"Furthest from the losses of the unsplit model: {apart:.1e}")
    return 0 if apart < 1e-9 and losses[-1] < losses[0] else 1


if __name__ == "__main__":
    raise SystemExit(main())
