#!/usr/bin/env bash
# The backward pass of torch's grouped product, under the simplest loss there is.
#
# Guess: whatever has a backward pass takes the gradient that `.sum()` sends, as torch.mm, torch.bmm
#        and torch.einsum do: a check of gradients by `out.sum().backward()` checks the product.
# Seen:  functional.grouped_mm raises "Invalid strides/sizes, got [0, 0] for strides": the gradient
#        of a sum is one number, expanded without memory of its own. With `* 1.0` or `.float()` in
#        between, which most real losses have, the same backward pass runs.
# With:  torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-28.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/grouped.py" <<'PYTHON'
import torch
from torch.nn import functional

x = torch.randn(8, 16, dtype=torch.bfloat16, requires_grad=True)
experts = torch.randn(2, 16, 32, dtype=torch.bfloat16, requires_grad=True)
ends = torch.tensor([4, 8], dtype=torch.int32)


def product() -> torch.Tensor:
    return functional.grouped_mm(x, experts, offs=ends)


try:
    product().sum().backward()
    raise SystemExit("a plain sum has a backward pass: outdated")
except RuntimeError as error:
    print("out.sum().backward():", error)
    assert "stride" in str(error)
(product() * 1.0).sum().backward()
product().float().sum().backward()
(x[:4] @ experts[0]).sum().backward()
print("(out * 1.0).sum(), out.float().sum(), and the sum of a plain product: fine")
PYTHON
"$folder/venv/bin/python" "$folder/grouped.py"
