#!/usr/bin/env bash
# Gradients of attention in a row that is masked everywhere by the least number.
#
# Guess: additive masks of padding hide a row by the least number that there is. Softmax of equal
#        scores is a mean over all n values, so each gets 1 / n of the row's gradient, whichever
#        kernel computes it.
# Seen:  the fused kernel of a CPU returns that mean, and gives every value the whole gradient: n
#        times too much, without a word. The same call gives 1 / n where the mask itself needs a
#        gradient, because that takes the unfused path. (Scores that low forget how many they were
#        in the log-sum-exp that is saved for the backward pass.)
# With:  torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-29.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'EOF'
import torch
from torch.nn import functional


def share(keys: int, trained_mask: bool) -> float:
    """Return which part of a hidden row's gradient each of so many values gets."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, keys, 4, dtype=torch.float64) for _ in range(3))
    value.requires_grad_()
    mask = torch.zeros(keys, keys, dtype=torch.float64)
    mask[1] = torch.finfo(torch.float64).min
    mask.requires_grad_(trained_mask)
    out = functional.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(out[..., 1, :], value.mean(-2))
    out[..., 1, :].sum().backward()
    return float(value.grad.mean())


for keys in (3, 5, 8):
    fused, unfused = share(keys, False), share(keys, True)
    print(f"{keys} keys: fused {fused:.4f}, unfused {unfused:.4f}, expected {1 / keys:.4f}")
    assert abs(unfused - 1 / keys) < 1e-12
    assert abs(fused - 1) < 1e-12, "the fused kernel behaves otherwise now"
EOF
