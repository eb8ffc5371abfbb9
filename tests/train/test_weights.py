"""Weights go out as safetensors under the model's own names, and come in again at any split."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from broad_cases import broad
from processes import run_processes
from traces import trace_ahead
from transformers import GPT2Config, GPT2LMHeadModel

import autoparallel
from autoparallel.train import weights
from autoparallel.train.config import TrainingError
from autoparallel.train.models import GPT, GPTConfig
from autoparallel.train.weights import export_weights, import_weights

pytestmark = pytest.mark.usefixtures("one_trace")


def gpt(seed: int) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(2, 24, 3, 61, positions=8, dropout=0.0))


def gpt2(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(
        n_layer=1, n_embd=24, n_head=3, vocab_size=61, n_positions=8,
        bos_token_id=None, eos_token_id=None,
    ))  # fmt: skip


def tokens() -> torch.Tensor:
    return torch.arange(16).view(2, 8) * 3


def traced() -> None:
    """Both models, as each rank would trace them twice."""
    for make in (gpt, gpt2):
        autoparallel.make_plan(make(1), 3, example_inputs=(tokens(),))


def exported(rank: int, folder: Path, shard_bytes: int) -> list[dict[str, Any]]:
    """Write both models from three ranks; read the first again into a model of other weights."""
    weights.SHARD_BYTES = shard_bytes
    results = []
    for name, make in (("gpt", gpt), ("gpt2", gpt2)):
        split = autoparallel.autoparallelize(make(1), 3, example_inputs=(tokens(),))
        export_weights(split, folder / name, {"tokenizer.json": "{}"})
        other = autoparallel.autoparallelize(make(2), 3, example_inputs=(tokens(),))
        import_weights(other, folder / name)
        results.append(autoparallel.full_state_dict(other))
    return results


@pytest.mark.parametrize(
    "shard_bytes", [10_000, *broad(5_000_000)], ids=["several files", "one file"]
)
def test_weights_go_out_and_come_in(tmp_path, shard_bytes):
    for states in run_processes(
        exported, 3, tmp_path, shard_bytes, before=partial(trace_ahead, traced)
    ):
        for state, make in zip(states, (gpt, gpt2), strict=True):
            for name, value in make(1).state_dict().items():
                assert torch.equal(state[name], value), name
    files = sorted(path.name for path in (tmp_path / "gpt").glob("*.safetensors"))
    assert (len(files) > 3) == (shard_bytes == 10_000)
    assert (tmp_path / "gpt" / "tokenizer.json").read_text() == "{}"
    # Hugging Face reads its own, and a single process reads what three have written.
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    assert torch.equal(loaded(tokens()).logits, gpt2(1).eval()(tokens()).logits)
    alone = autoparallel.autoparallelize(gpt(2), 1, example_inputs=(tokens(),))
    import_weights(alone, tmp_path / "gpt")
    assert torch.equal(alone.blocks[1].feed_forward.expand.weight,
                       gpt(1).blocks[1].feed_forward.expand.weight)  # fmt: skip


def test_other_weights_are_refused_and_nothing_is_filled(tmp_path):
    state = gpt(1).state_dict()
    del state["blocks.0.attention.projection.bias"]
    state["final_norm.weight"] = torch.zeros(3)
    state["strange"] = torch.zeros(3)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    split = autoparallel.autoparallelize(gpt(2), 1, example_inputs=(tokens(),))
    with pytest.raises(TrainingError, match="of another model") as caught:
        import_weights(split, tmp_path)
    for words in ("projection.bias is missing", "final_norm.weight is (3,)", "strange is not"):
        assert words in caught.value.why
    assert torch.equal(split.token_embedding.weight, gpt(2).token_embedding.weight)
