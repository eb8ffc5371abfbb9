#!/usr/bin/env bash
# Third derivatives through layer norm.
#
# Guess: autograd is right or raises. Layer norm can be differentiated twice, and torch does not
#        refuse a third time, so a loss with second derivatives by the input (the residual of a
#        differential equation, say) trains a network with layer norms rightly.
# Seen:  the second derivative is right, and its own gradient is wrong without a word: by a tenth
#        in this example, against differences. The same norm written out, RMS norm and group norm
#        are right.
# With:  torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-28.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'EOF'
import torch
from torch.nn import functional as F

torch.manual_seed(0)
x = torch.randn(4, 5, dtype=torch.double, requires_grad=True)
weights = torch.arange(1.0, 6.0, dtype=torch.double)


def written_out(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


NORMS = {
    "layer norm": lambda x: F.layer_norm(x, (5,)),
    "layer norm, written out": written_out,
    "RMS norm": lambda x: F.rms_norm(x, (5,)),
    "group norm": lambda x: F.group_norm(x, 1),
}


def first(norm, x):
    return torch.autograd.grad((norm(x).sin() * weights).sum(), x, create_graph=True)[0]


def second(norm, x):
    return torch.autograd.grad((first(norm, x) * weights).sum(), x, create_graph=True)[0]


def error(function, x):
    """Relative error of a gradient against central differences along a random direction."""
    cotangent, direction = torch.randn_like(x), torch.randn_like(x)
    (gradient,) = torch.autograd.grad((function(x) * cotangent).sum(), x)
    step = 1e-5
    ahead, behind = (function(x + way * step * direction) for way in (1, -1))
    expected = ((ahead - behind) * cotangent).sum() / (2 * step)
    return float((((gradient * direction).sum() - expected) / expected).abs().detach())


wrong = set()
for name, norm in NORMS.items():
    errors = [error(lambda x, f=f: f(norm, x), x) for f in (first, second)]
    print(f"{name:24} second derivative off by {errors[0]:.0e}, third by {errors[1]:.0e}")
    assert errors[0] < 1e-6, "second derivatives are wrong, too"
    if errors[1] > 1e-3:
        wrong.add(name)
assert wrong == {"layer norm"}, f"wrong are {wrong or 'none'}: outdated"
EOF
