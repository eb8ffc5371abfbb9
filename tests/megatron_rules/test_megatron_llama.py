"""The hand-written Llama gives Hugging Face's numbers, and communicates what it claims."""

from typing import Any

import pytest
import torch
from collective_counter import CollectiveCounter
from processes import run_processes
from torch import Tensor

from megatron_rules.llama import ParallelLlama
from megatron_rules.regions import Split

# Hugging Face's norms, rotations and loss are in single precision, whatever the model is.
SINGLE = 2e-6
BATCH, SEQUENCE, LAYERS, HIDDEN, VOCABULARY = 3, 8, 2, 24, 101
OPTIONS: dict[str, dict[str, Any]] = {
    "whole sequence": {},
    "sequence parallel": {"sequence_parallel": True},
    "gathered once": {"sequence_parallel": True, "keep_gathered": True},
}


def llama(**changed: Any) -> Any:
    """Hugging Face's model and its configuration; three heads of keys, for two ranks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 22,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": 16,
        "use_cache": False,
    }
    config = LlamaConfig(**sizes | changed)
    torch.manual_seed(7)
    return LlamaForCausalLM(config).double(), config


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest number expected."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def compare(rank: int) -> dict[str, Any]:
    """Errors against the plain model and collectives of the passes, by the options."""
    plain, config = llama()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE))
    labels = tokens.clone()
    labels[0, 3] = labels[2, 5] = -100
    expected = plain(tokens, labels=labels)
    expected.loss.backward()
    results: dict[str, Any] = {}
    for name, options in OPTIONS.items():
        model = ParallelLlama(config, **options).double()
        model.load_plain(plain.state_dict())
        with CollectiveCounter() as forward:
            found = model(tokens, labels)
        with CollectiveCounter() as backward:
            found.loss.backward()
        with CollectiveCounter() as finish:
            model.finish_gradients()
        gradients, state = model.gathered_gradients(), model.gathered_state()
        assert found.loss is not None
        errors = {n: error(gradients.pop(n), p.grad) for n, p in plain.named_parameters()}
        errors["loss"] = error(found.loss, expected.loss)
        errors["logits"] = error(Split(2, VOCABULARY).gather(found.logits), expected.logits)
        results[name] = {
            "errors": errors,
            "left over": list(gradients),
            "state": all(torch.equal(state[n], whole) for n, whole in plain.state_dict().items()),
            "counts": [dict(counter.counts) for counter in (forward, backward, finish)],
        }
    return results


@pytest.fixture(scope="module")
def compared() -> list[dict[str, Any]]:
    return run_processes(compare, 2)


@pytest.mark.parametrize("name", OPTIONS)
def test_llama_gives_the_plain_numbers(compared: list[dict[str, Any]], name: str) -> None:
    """Loss, logits, every weight and every gradient, under Hugging Face's names, on both ranks."""
    for results in compared:
        outcome = results[name]
        assert not {n: e for n, e in outcome["errors"].items() if not e < SINGLE}
        assert not outcome["left over"]
        assert outcome["state"]


def test_two_products_of_a_block_communicate_and_no_more(compared: list[dict[str, Any]]) -> None:
    """Queries, keys and values are gathered for once, and so are the gate and what it multiplies.

    Once more there are the embedding, the head, and the loss's three numbers for each token.
    """
    products, activation = 2 * LAYERS, BATCH * SEQUENCE * HIDDEN
    reduced, scattered = ("all_reduce", activation), ("reduce_scatter", activation)
    gathered, of_tokens = ("all_gather", activation), {("all_reduce", BATCH * SEQUENCE): 3}
    norms = {("all_reduce", (2 * LAYERS + 1) * HIDDEN): 1}
    for results in compared:
        assert results["whole sequence"]["counts"] == [
            {reduced: products + 1, **of_tokens},
            {reduced: products + 1},
            {},
        ]
        assert results["gathered once"]["counts"] == [
            {reduced: 1, gathered: products + 1, scattered: products, **of_tokens},
            {gathered: products + 1, scattered: products + 1},
            norms,
        ]


def test_what_the_layers_do_not_compute_is_refused() -> None:
    """A bias, tied embeddings and a state of other names would give other numbers."""
    for changed in ({"tie_word_embeddings": True}, {"attention_bias": True}, {"mlp_bias": True}):
        with pytest.raises(ValueError, match="without dropout, biases"):
            ParallelLlama(llama(**changed)[1])
    plain, config = llama()
    state = plain.state_dict()
    del state["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(ValueError, match=r"missing .*layers\.1\.self_attn\.k_proj"):
        ParallelLlama(config).load_plain(state)
