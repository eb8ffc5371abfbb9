#!/usr/bin/env bash
# Two parameters whose gradients are equal because they are added.
#
# Guess: every parameter's .grad is a tensor of its own. Autograd may hand on one gradient to both
#        operands of a sum, but whoever keeps it copies it where it is shared; so it is safe to scale
#        or accumulate gradients in place, as clip_grad_norm_, GradScaler and a second backward do.
# Seen:  it is copied where the parameters are added themselves, and not where views of them are:
#        then both .grad lie in one memory. A second backward adds to that memory twice (12 for 8),
#        and clip_grad_norm_ scales it twice, so that the norm is far below the limit. Nothing is
#        said, in plain torch, on one process. (Issue 34082 of pytorch/pytorch, open since 2020, names
#        the cause: a view of a gradient counts as nobody else's.)
# With:  torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-28.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 2>/dev/null
cat > "$folder/shared.py" <<'PYTHON'
import torch
from torch import nn


def gradients(views: bool, passes: int) -> list[torch.Tensor]:
    p, q = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    for _ in range(passes):
        total = p.flatten() + q.flatten() if views else p + q
        total.pow(2).sum().backward()
    return [p, q]


for views in (False, True):
    p, q = gradients(views, 1)
    shared = p.grad.data_ptr() == q.grad.data_ptr()
    clipped = gradients(views, 1)
    nn.utils.clip_grad_norm_(clipped, 1.0)
    norm = torch.stack([each.grad.norm() for each in clipped]).norm().item()
    twice = gradients(views, 2)[0].grad[0, 0].item()
    what = "views added" if views else "parameters added"
    print(f"{what}: one memory {shared}; clipped to 1: {norm:.3f}; two passes of 4: {twice:.0f}")
    assert shared is views, "outdated"
    assert (twice == 8) is not views
    assert (abs(norm - 1) < 1e-3) is not views
PYTHON
"$folder/venv/bin/python" "$folder/shared.py"
