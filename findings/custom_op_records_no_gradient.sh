#!/usr/bin/env bash
# Autograd inside of an op that is made with torch.library.custom_op.
#
# Guess: a custom op that needs a derivative of its own, such as a backward op that runs a forward
#        again, may compute it under torch.enable_grad(), as the backward of an autograd.Function
#        and every checkpoint do. In it, torch.is_grad_enabled() is True.
# Seen:  nothing is recorded: the result of an op on a leaf that requires a gradient requires none,
#        and torch.autograd.grad raises. The kernel runs below autograd, whatever the mode says. The
#        same lines in a plain function work.
# With:  torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-28.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/inside.py" <<'PYTHON'
import torch


def derivative(x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        square = leaf * leaf
        enabled = torch.is_grad_enabled()
    print(f"gradients are on: {enabled}; recorded: {square.requires_grad}")
    return torch.autograd.grad(square.sum(), leaf)[0] if square.requires_grad else x * 0


@torch.library.custom_op("demo::derivative", mutates_args=())
def op(x: torch.Tensor) -> torch.Tensor:
    return derivative(x)


x = torch.ones(3)
assert derivative(x).tolist() == [2.0, 2.0, 2.0]
assert op(x).tolist() == [0.0, 0.0, 0.0], "the op records gradients: outdated"
PYTHON
"$folder/venv/bin/python" "$folder/inside.py"
