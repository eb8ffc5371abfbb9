#!/usr/bin/env bash
# A rank of a data-parallel group has no rows of the last, short batch, and its loss has a penalty on
# gradients. Ranks meet in collectives of the backward pass, and in those of its own backward pass.
#
# Guess: fused attention of no rows is attention: its gradients are empty, and depend on queries, keys
#        and values as they do elsewhere, so that all ranks go the same way back.
# Seen:  gradients of its sum depend on nothing (requires_grad is False), in contrast to those of the
#        same formula in products and a softmax: such a rank leaves out what comes before, with every
#        collective there, which the others wait in.
# With:  torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/nothing.py" <<'PYTHON'
from collections.abc import Callable

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel


def formula(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return (query @ key.mT / query.size(-1) ** 0.5).softmax(-1) @ value


def depends(attend: Callable[..., torch.Tensor], rows: int) -> list[bool]:
    """Say of the gradients of queries, keys and values whether they can be differentiated again."""
    inputs = [torch.ones(rows, 2, 5, 4, requires_grad=True) for _ in range(3)]
    with sdpa_kernel(SDPBackend.MATH):
        result = attend(*inputs)
    gradients = torch.autograd.grad(result.sum(), inputs, create_graph=True)
    return [each.requires_grad for each in gradients]


fused = functional.scaled_dot_product_attention
for name, attend in (("fused", fused), ("formula", formula)):
    print(f"{name:8} two rows {depends(attend, 2)}, none {depends(attend, 0)}")
assert depends(fused, 2) == depends(formula, 2) == depends(formula, 0) == [True] * 3
if depends(fused, 0) != [False] * 3:
    raise SystemExit("gradients of attention of no rows have a graph: outdated")
PYTHON
"$folder/venv/bin/python" "$folder/nothing.py"
