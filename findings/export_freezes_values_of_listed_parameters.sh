#!/usr/bin/env bash
# torch.export (non-strict) and the value of a parameter read in Python.
#
# Guess: `float(parameter)` in a forward is a data-dependent read and is refused (or becomes an
#        op), however the forward reaches the parameter.
# Seen:  for an attribute of the module it is refused. For the very same, registered parameter
#        reached through a plain list that the module keeps, it is baked into the program as a
#        number: training the parameter later changes nothing, without a word.
# With:  torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-28.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'EOF'
import torch
from torch import nn


class Scaled(nn.Module):
    """A learned scale, also kept in a list as optimizer groups or schedules do."""

    def __init__(self, through_list: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 3.0))
        self.scales = [self.scale]
        self.through_list = through_list

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(self.scales[0] if self.through_list else self.scale)


x = torch.ones(2)
try:
    torch.export.export(Scaled(False), (x,), strict=False)
    refused = False
except Exception:
    refused = True
assert refused, "reading the attribute's value was exported"
model = Scaled(True)
program = torch.export.export(model, (x,), strict=False).module()
with torch.no_grad():
    model.scale.fill_(7.0)
    for parameter in program.parameters():
        parameter.fill_(7.0)
assert model(x).tolist() == [7.0, 7.0]
assert program(x).tolist() == [3.0, 3.0], "the value is read at run time: outdated"
print("as found: the program multiplies by 3.0 for ever; the module by", model.scale.item())
EOF
