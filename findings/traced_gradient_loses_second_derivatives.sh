#!/usr/bin/env bash
# A gradient that a function takes by autograd, with create_graph, is traced into a program of ops.
#
# Guess: the program is what the function computed: its result can be differentiated once more, as
#        the function's own can, whether the gradient was taken by torch.autograd.grad or by
#        torch.func.grad.
# Seen:  values are equal both ways, and so are the derivatives of the program traced with
#        torch.func.grad. Those of the one traced with torch.autograd.grad are others, and nothing
#        says so: what the forward saved of its results is read by the backward pass through a
#        detach, which stands in the program, and the derivative ends there.
# With:  torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/traced.py" <<'PYTHON'
from collections.abc import Callable

import torch
from torch.fx.experimental.proxy_tensor import make_fx

Function = Callable[[torch.Tensor], torch.Tensor]
torch.manual_seed(0)
x = torch.randn(4, 6, dtype=torch.float64)
start = torch.randn(6, 6, dtype=torch.float64)


def energy(weight: torch.Tensor) -> torch.Tensor:
    y = x @ weight
    return (y.square() + 10 * y.tanh()).sum()


def by_autograd(weight: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(energy(weight), weight, create_graph=True)[0]


def by_transform(weight: torch.Tensor) -> torch.Tensor:
    return torch.func.grad(energy)(weight)


def twice(function: Function) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient that a function returns, and the gradient of its squares."""
    weight = start.clone().requires_grad_()
    first = function(weight)
    (second,) = torch.autograd.grad(first.square().sum(), weight)
    return first.detach(), second


wrong = {}
for function in (by_autograd, by_transform):
    program = make_fx(function)(start.clone().requires_grad_())
    (one, two), (same, other) = twice(function), twice(program)
    torch.testing.assert_close(one, same)
    wrong[function.__name__] = float((two - other).norm() / two.norm())
    print(f"{function.__name__:12} second derivatives of the program are off by", end=" ")
    print(f"{wrong[function.__name__]:.1%}")
assert wrong["by_transform"] < 1e-12
if wrong["by_autograd"] < 0.01:
    raise SystemExit("both programs are differentiated alike: outdated")
PYTHON
"$folder/venv/bin/python" "$folder/traced.py"
