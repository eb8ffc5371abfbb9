#!/usr/bin/env bash
# Hugging Face models and the order of a set.
#
# Guess: tracing one model in two processes gives one program, so that all ranks of a launcher can
#        trace by themselves and compare.
# Seen:  Gemma 3's forward goes through `set(config.layer_types)`, a set of texts: the order of its
#        calls follows PYTHONHASHSEED, which each process chooses at random. Two processes trace
#        programs whose ops stand in another order about half the time.
# With:  transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-28.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 numpy==2.4.6
cat > "$folder/trace.py" <<'EOF'
import hashlib

import torch
from transformers import Gemma3TextConfig, Gemma3ForCausalLM

config = Gemma3TextConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=6,
    num_attention_heads=2, num_key_value_heads=1, head_dim=8, use_cache=False,
    layer_types=["sliding_attention"] * 5 + ["full_attention"], attn_implementation="eager",
)
model = Gemma3ForCausalLM(config).eval()
program = torch.export.export(model, (torch.arange(4)[None],), strict=False)
scopes = [
    str(list((node.meta.get("nn_module_stack") or {}).values())[-1:]) + str(node.target)
    + str(node.args)
    for node in program.graph.nodes
]
print(hashlib.sha256("\n".join(scopes).encode()).hexdigest()[:12])
EOF
seen=$(for seed in 0 1 2 3 4 5; do
    PYTHONHASHSEED=$seed "$folder/venv/bin/python" -W ignore "$folder/trace.py" 2>/dev/null | tail -1
done)
again=$(for _ in 1 2; do
    PYTHONHASHSEED=0 "$folder/venv/bin/python" -W ignore "$folder/trace.py" 2>/dev/null | tail -1
done)
[ "$(printf '%s\n' "$again" | sort -u | wc -l)" -eq 1 ] || { echo "differs with one seed"; exit 1; }
kinds=$(printf '%s\n' "$seen" | sort -u | wc -l)
[ "$kinds" -eq 2 ] || { echo "outdated: $kinds program(s) under six seeds"; exit 1; }
echo "as found: one program for one seed, $kinds under six seeds"
