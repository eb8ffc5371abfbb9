#!/usr/bin/env bash
# A wrapper in the place of a function of torch.nn.functional, called under a device context.
#
# Guess: after `F.softmax = doubled`, where `doubled` calls torch's own softmax once and doubles what
#        it returns, `F.softmax(x)` is twice the softmax, also within `with torch.device("cpu"):`,
#        which only says where new tensors are made.
# Seen:  within the context it is four times the softmax. Under a mode torch's own function hands
#        the call over by its name, and under that name the wrapper stands: it runs once more. In two
#        contexts it is eight times. A wrapper around F.linear, which is none in Python, runs once.
# With:  torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-29.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'EOF'
from contextlib import ExitStack

import torch
from torch.nn import functional as F

x, weight = torch.ones(1, 2), torch.eye(2)
softmax, linear = F.softmax, F.linear
F.softmax = lambda *args, **kwargs: 2 * softmax(*args, **kwargs)
F.linear = lambda *args, **kwargs: 2 * linear(*args, **kwargs)

for contexts, times in ((0, 2.0), (1, 4.0), (2, 8.0)):
    with ExitStack() as stack:
        for _ in range(contexts):
            stack.enter_context(torch.device("cpu"))
        soft, product = F.softmax(x, dim=-1), F.linear(x, weight)
    print(f"{contexts} contexts: softmax times {soft[0, 0] / 0.5:g}, linear times {product[0, 0]:g}")
    assert soft[0, 0] / 0.5 == times, "the wrapper runs another number of times now"
    assert product[0, 0] == 2.0
EOF
