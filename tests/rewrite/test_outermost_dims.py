"""Split dims that lie outermost in memory: where programs have them; nothing else changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from broad_cases import broad
from families import Float64
from torch import nn

import autoparallel
from autoparallel.train.models import GPT, GPTConfig

SEQUENCE = 6


def gpt() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"layers": 2, "hidden": 24, "heads": 6, "vocabulary": 31, "positions": SEQUENCE}
    return GPT(GPTConfig(**sizes, dropout=0.1)).double()


@torch.library.custom_op("outermost_dims::weighted", mutates_args=())
def weighted(x: torch.Tensor) -> torch.Tensor:
    """Weigh elements by their places in memory, as kernels do that are given no strides."""
    flat = torch.as_strided(x, (x.numel(),), (1,), x.storage_offset())
    return (flat * torch.arange(x.numel(), dtype=x.dtype)).view(x.shape)


@weighted.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class Frozen(nn.Module):
    """A model without gradients, with an op that counts on the order in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = gpt().eval()
        self.norm, self.up, self.down = nn.LayerNorm(24), nn.Linear(24, 48), nn.Linear(48, 24)
        self.double().requires_grad_(requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.inner.token_embedding(ids)
        for block in self.inner.blocks:
            x = block(x)
        x = self.down(self.up(weighted(self.norm(x)) / 100).relu())
        return x.sin().cos().exp().tanh().sin().sum(1)


class Convolved(nn.Module):
    """A sequence between products, with an op that torch computes in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.mix = nn.Conv1d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.down(self.up(self.norm(x)).relu())
        return (self.mix(x.transpose(1, 2)) ** 2).sum()


def llama() -> nn.Module:
    """Heads of keys are repeated for the heads of queries that read them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 6}
    sizes |= {"num_key_value_heads": 3, "intermediate_size": 36, "vocab_size": 31}
    config = LlamaConfig(**sizes, max_position_embeddings=SEQUENCE, use_cache=False)
    with Float64():
        return LlamaForCausalLM(config).double()


def tokens() -> torch.Tensor:
    return torch.randint(31, (3, SEQUENCE), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("ranks", [*broad(2), 3])
@pytest.mark.parametrize("make", [gpt, llama])
def test_the_split_model_is_the_unsplit_one(make: Callable[[], nn.Module], ranks: int) -> None:
    """With dropout, whose mask does not depend on the order in memory."""
    model, inputs = make(), {"input_ids": tokens(), "labels": tokens()}
    with Float64():  # norms and the loss are in single precision otherwise, whatever the model is
        plan = autoparallel.make_plan(model, ranks, example_inputs=inputs)
        split = autoparallel.simulate(model, plan=plan, example_inputs=inputs)
        whole = autoparallel.simulate(model, 1, example_inputs=inputs)
    source = autoparallel.emitted_program(plan)
    assert "S1_outer" in source
    if make is llama:  # products that read one gathered sequence are one node, in its gap
        joined = [line for line in source.splitlines() if "convert_then_linear(" in line]
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            assert sum(all(name in line for name in names) for line in joined) == 2
    torch.testing.assert_close(split.output.loss, whole.output.loss, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(split.output.logits, whole.output.logits, rtol=1e-12, atol=1e-12)
    for path, gradient in whole.gradients.items():
        torch.testing.assert_close(split.gradients[path], gradient, rtol=1e-11, atol=1e-13)


def test_outputs_lie_in_the_order_of_their_dims() -> None:
    class Hidden(nn.Module):
        """A model that returns what is split along the sequence, and matrices made of it."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = gpt()

        def forward(self, ids: torch.Tensor) -> Any:
            x = self.inner.token_embedding(ids)
            for block in self.inner.blocks:
                x = block(x)
            y = x.sin().cos().exp().tanh().sin().cos()
            return x, y[0], y.sum(2)

    plan = autoparallel.make_plan(Hidden(), 2, example_inputs=tokens())
    source = autoparallel.emitted_program(plan)
    returned = source[source.rindex("return [") :]
    assert "_outer" in source
    assert returned.count(".contiguous()") == 3


def test_a_program_with_other_ops_keeps_the_usual_order() -> None:
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(2))
    plan = autoparallel.make_plan(Convolved(), 2, example_inputs=x)
    assert "_outer" not in autoparallel.emitted_program(plan)


def test_an_op_that_no_gradient_reaches_is_given_the_usual_order() -> None:
    model = Frozen()
    plan = autoparallel.make_plan(model, 3, example_inputs=tokens())
    split = autoparallel.simulate(model, plan=plan, example_inputs=tokens())
    torch.testing.assert_close(split.output, model(tokens()), rtol=1e-12, atol=1e-12)
