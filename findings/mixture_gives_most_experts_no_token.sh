#!/usr/bin/env bash
# A mixture of experts whose router chooses among all of its experts: NLLB-MoE in transformers.
#
# Guess: with hundreds of tokens and random weights, each of eight experts has tokens, and the
#        router's choice says which.
# Seen:  experts 0 and 1 run alone, whatever the router chooses; all others have no gradient, ever.
#        The router returns flags, one for each expert of a token, and the experts take these for
#        the numbers of experts: flag 0 of an expert that was not chosen is a choice of expert 0.
# With:  transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 numpy==2.4.6
cat > "$folder/experts.py" <<'PYTHON'
import torch
from transformers import NllbMoeConfig
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

torch.manual_seed(0)
config = NllbMoeConfig(d_model=16, num_experts=8, expert_capacity=512, router_dtype="float32")
layer = NllbMoeSparseMLP(config, ffn_dim=32)
x = torch.randn(8, 64, 16)
flags, _, _ = layer.router(x.reshape(-1, 16))
print("tokens that the router gives each expert:", flags.sum(0).tolist())
assert (flags.sum(0) > 0).all(), "the router leaves experts out"
layer(x).sum().backward()
trained = {path for path, p in layer.experts.named_parameters() if p.grad is not None}
ran = [at for at in range(8) if f"expert_{at}.fc1.weight" in trained]
print("experts that ran:", ran)
if ran != [0, 1]:
    raise SystemExit("other experts run: outdated")
PYTHON
"$folder/venv/bin/python" "$folder/experts.py"
