"""Text is the same from a split model, with a cache and without."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from broad_cases import broad
from processes import run_processes
from traces import trace_ahead
from transformers import LlamaConfig, LlamaForCausalLM

import autoparallel
from autoparallel.train.config import TrainingError
from autoparallel.train.generation import Sampling, generate
from autoparallel.train.models import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures("one_trace")

WAYS = (Sampling(), Sampling(temperature=0.8, top_k=20, top_p=0.95, seed=3))
COUNT = 8


def gpt() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(2, 24, 3, 61, positions=24, dropout=0.1)).double().eval()
    # Weights as they are drawn give one token again and again.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    return model


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=3, vocab_size=61, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(sizes).double().eval()


def prompt() -> torch.Tensor:
    return torch.tensor([[5, 9, 1], [7, 7, 30]])


def texts(model: Any) -> list[torch.Tensor]:
    return [torch.stack([*generate(model, prompt(), COUNT, way)], dim=1) for way in WAYS]


def without_cache(model: Any) -> list[torch.Tensor]:
    """The same, by reading the whole text for each token."""
    made = []
    for way in WAYS:
        generator, tokens = torch.Generator().manual_seed(way.seed), prompt()
        for _ in range(COUNT):
            chosen = way.choose(model(tokens).logits[:, -1].detach(), generator)
            tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        made.append(tokens[:, 3:])
    return made


def on_ranks(build: Callable[[], Any], count: int) -> list[torch.Tensor]:
    return texts(autoparallel.autoparallelize(build(), count, example_inputs=(prompt(),)))


def on_rank(_: int, build: Callable[[], Any]) -> list[torch.Tensor]:
    return on_ranks(build, 2)


@pytest.mark.parametrize("build", [gpt, *broad(llama)])
def test_ranks_write_what_the_unsplit_model_writes(build: Callable[[], Any]) -> None:
    expected = [text.tolist() for text in without_cache(build())]
    assert [text.tolist() for text in texts(build())] == expected
    assert len({tuple(row) for text in expected for row in text}) == 4
    # One process has traced what all write.
    before = partial(trace_ahead, on_ranks, build, 1)
    for result in run_processes(on_rank, 2, build, before=before):
        assert [text.tolist() for text in result] == expected


def test_a_row_that_has_ended_stays_so():
    end = int(texts(gpt())[0][0, 1])
    tokens = torch.stack([*generate(gpt(), prompt(), COUNT, Sampling(), end=end)], dim=1)
    assert tokens[0, 1:].tolist() == [end] * (tokens.shape[1] - 1)


def test_multiple_choice_are_among_the_likeliest():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).expand(400, 4)
    generator = torch.Generator().manual_seed(0)
    assert set(Sampling(1.0, top_k=2).choose(logits, generator).tolist()) == {0, 1}
    # 0.64 and 0.24 of the probability: the second one is needed for 0.7.
    assert set(Sampling(1.0, top_p=0.7).choose(logits, generator).tolist()) == {0, 1}
    assert set(Sampling(1.0).choose(logits, generator).tolist()) == {0, 1, 2, 3}
    shares = Sampling(1.0).choose(logits[:1].expand(20_000, 4), generator).bincount() / 20_000
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=0.01, rtol=0)


@pytest.mark.parametrize("numbers", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}])
def test_senseless_choices_are_refused(numbers):
    with pytest.raises(TrainingError, match="temperature 0 is greedy"):
        Sampling(**numbers)
