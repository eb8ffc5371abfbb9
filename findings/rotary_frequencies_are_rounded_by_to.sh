#!/usr/bin/env bash
# Two ways to a Llama in bfloat16: model.to(torch.bfloat16), and from_pretrained(dtype=...).
#
# Guess: they give the same model. The rotary frequencies are no weights: they are computed from the
#        configuration, in no checkpoint, and meant to be float32.
# Seen:  from_pretrained leaves them in float32. `.to(torch.bfloat16)`, as in training scripts that
#        build a model from its configuration, rounds them with everything else, because they are a
#        buffer: at position 4095 of a model with heads of 32 the angles are off by 0.73 radians.
# With:  transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-28.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cat > "$folder/rotary.py" <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=4096,
)
plain = LlamaForCausalLM(config)
plain.save_pretrained(sys.argv[1])
exact = plain.model.rotary_emb.inv_freq
loaded = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
assert loaded.lm_head.weight.dtype == torch.bfloat16
print("from_pretrained(dtype=bfloat16):", loaded.model.rotary_emb.inv_freq.dtype)
assert torch.equal(loaded.model.rotary_emb.inv_freq, exact), "outdated"
cast = LlamaForCausalLM(config).to(torch.bfloat16)
rounded = cast.model.rotary_emb.inv_freq
apart = float(((rounded.float() - exact).abs() * 4095).max())
print(f".to(bfloat16): {rounded.dtype}, angles at position 4095 off by up to {apart:.2f} radians")
assert rounded.dtype == torch.bfloat16 and apart > 0.5, "the frequencies are kept: outdated"
PYTHON
"$folder/venv/bin/python" "$folder/rotary.py" "$folder/model"
