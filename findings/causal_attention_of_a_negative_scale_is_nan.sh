#!/usr/bin/env bash
# Causal attention whose scale is zero or negative.
#
# Guess: `scale` is a factor of the scores. Zero gives the running mean of the values, a negative
#        one turns the order of the scores around; the causal mask is what it is for any factor.
# Seen:  with `is_causal=True` the fused kernel of a CPU returns NaN in every row that hides a key,
#        for a scale of zero as for negative ones. The unfused kernel and an explicit mask of
#        booleans give the right values. (The kernel hides keys by minus infinity before it
#        multiplies by the scale: the product is NaN or plus infinity.)
# With:  torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-29.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'EOF'
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as attention

torch.manual_seed(0)
query, key, value = (torch.randn(1, 2, 6, 8, dtype=torch.float64) for _ in range(3))
seen = torch.ones(6, 6, dtype=torch.bool).tril()
for scale in (0.25, 0.0, -0.25):
    scores = (scale * (query @ key.transpose(-1, -2))).masked_fill(~seen, -torch.inf)
    expected = scores.softmax(-1) @ value
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(
            attention(query, key, value, is_causal=True, scale=scale), expected
        )
    masked = attention(query, key, value, attn_mask=seen, scale=scale)
    fused = attention(query, key, value, is_causal=True, scale=scale)
    bad = int(fused.isnan().any(-1)[0, 0].sum())
    print(
        f"scale {scale}: {bad} of 6 rows are NaN where the kernel masks,"
        f" {int(masked.isnan().any(-1)[0, 0].sum())} with an explicit mask"
    )
    torch.testing.assert_close(masked, expected)
    if scale > 0:
        torch.testing.assert_close(fused, expected)
    else:
        assert bad > 0, "the fused kernel behaves otherwise now"
EOF
