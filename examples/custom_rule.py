"""A sharding rule written by hand, for an op of one's own: proven, planned with, and obeyed.

    python examples/custom_rule.py

A rule says of which loops an op is made, and nothing else; every way to split the op follows.
Before a plan uses a rule, all of them are run on small tensors: split, run and joined, they must
equal the unsplit op, forward and backward. A wrong rule is an error that shows the first way that
fails.
"""

import torch
from torch import nn
from torch.nn import functional

import autoparallel
from autoparallel import OpCall, ShardingRule
from autoparallel.errors import RuleError
from autoparallel.placement import layout_text

WORLD_SIZE = 2
VOCABULARY, WIDTH, INNER = 61, 24, 40
BATCH, SEQUENCE = 4, 12


@torch.library.custom_op("examples::decayed_sum", mutates_args=())
def decayed_sum(x: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """y[b, t, c] = decay[c] y[b, t-1, c] + x[b, t, c]: a linear recurrence over time."""
    rows, state = [], torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        state = decay * state + x[:, t]
        rows.append(state)
    return torch.stack(rows, 1)


@decayed_sum.register_fake
def _(x: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    decay, y = ctx.saved_tensors
    rows, state = [], torch.zeros_like(grad[:, 0])
    for t in reversed(range(grad.shape[1])):
        state = decay * state + grad[:, t]
        rows.append(state)
    grad_x = torch.stack(rows[::-1], 1)
    return grad_x, (grad_x[:, 1:] * y[:, :-1]).sum((0, 1))


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[1], output)


decayed_sum.register_autograd(_backward, setup_context=_setup)


@autoparallel.register_rule("examples.decayed_sum.default")
def decayed_sum_rule(call: OpCall) -> ShardingRule:
    """Sequences (b) and features (c) are independent of each other; time (t) is not.

    The op is linear in x, so that a sum over ranks may still be pending when it runs.
    """
    return ShardingRule.parse("b t c, c -> b t c", call, whole="t", linear=[{0}])


def too_hopeful_rule(call: OpCall) -> ShardingRule:
    """Wrong: it lets time be split, as if every position could begin anew."""
    return ShardingRule.parse("b t c, c -> b t c", call, linear=[{0}])


class Model(nn.Module):
    """A language model of one layer that mixes positions by `decayed_sum`; returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.entry = nn.Linear(WIDTH, INNER)
        self.decay = nn.Parameter(torch.rand(INNER))
        self.out = nn.Linear(INNER, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """tokens, labels: (b, t)."""
        x = self.embedding(tokens)
        x = x + self.out(functional.silu(decayed_sum(self.entry(x), self.decay)))
        return functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def main() -> int:
    """Exit status: 0 if the split model equals the whole one, and the wrong rule is refused."""
    torch.manual_seed(0)
    model = Model().double()
    tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE + 1))
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}

    plan = autoparallel.make_plan(model, WORLD_SIZE, example_inputs=batch)
    for op in plan.ops:
        if op.target == "examples.decayed_sum.default":
            sides = (", ".join(map(layout_text, side)) for side in (op.operands, op.results))
            print(f"planned:  {op.name}: {' -> '.join(sides)}")

    result = autoparallel.simulate(model, example_inputs=batch, plan=plan)
    loss = model(**batch)
    loss.backward()
    apart = max(
        (result.gradients[path] - parameter.grad).abs().max().item()  # type: ignore[operator]
        for path, parameter in model.named_parameters()
    )
    apart = max(apart, abs(result.output.item() - loss.item()))
    print(
        f"on {WORLD_SIZE} ranks loss and gradients differ from the unsplit model's by {apart:.1e}"
    )

    autoparallel.register_rule("examples.decayed_sum.default", replace=True)(too_hopeful_rule)
    try:
        autoparallel.make_plan(model, WORLD_SIZE, example_inputs=batch)
    except RuleError as error:
        print(f"\nA wrong rule is refused:\n{error}")
        return 0 if apart < 1e-9 else 1
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
