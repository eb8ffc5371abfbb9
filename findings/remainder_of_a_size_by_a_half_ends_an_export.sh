#!/usr/bin/env bash
# A forward that asks whether a size times a scale is a whole number, exported with free sizes.
#
# Guess: `height % 0.5 != 0` is a question about a size like any other: torch.export answers it by
#        the example and keeps a guard, or fixes that size. Vision-language models ask it where they
#        shuffle pixels (InternVL of transformers).
# Seen:  the export ends in sympy's ValueRangeError "Invalid ranges [0:-0.5]", which names neither
#        the line nor the size; with the same question about `height % 2` it keeps a guard.
# With:  torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-28.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/export.py" <<'PYTHON'
import torch
from torch import nn


class Shuffled(nn.Module):
    def __init__(self, step: float) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] % self.step != 0:
            raise ValueError("the height does not divide")
        return x * 2


def export(step: float) -> str:
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    try:
        torch.export.export(Shuffled(step), (torch.ones(2, 8),), dynamic_shapes=(sizes,))
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "exported"


Shuffled(0.5)(torch.ones(2, 8))
for step in (2, 0.5):
    print(f"height % {step}: {export(step)}")
assert export(2) == "exported"
if "ValueRangeError" not in export(0.5):
    raise SystemExit("no such error: outdated")
PYTHON
"$folder/venv/bin/python" "$folder/export.py"
