#!/usr/bin/env bash
# torch.export (non-strict) and forwards that write to parameters.
#
# Guess: a write to a parameter is in the exported program, or refused, however it is made.
# Seen:  `copy_` is an op of the program. `parameter.data = t` is nowhere: the program computes with
#        the new value in that call and writes nothing, so that whoever runs it never updates the
#        parameter.
# With:  torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-28.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'EOF'
import torch
from torch import nn


class Teacher(nn.Module):
    """An average of weights that moves at every call, as momentum encoders have."""

    def __init__(self, by_data: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3), requires_grad=False)
        self.by_data = by_data

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            moved = self.weight * 0.5
            if self.by_data:
                self.weight.data = moved
            else:
                self.weight.copy_(moved)
        return x * self.weight


def writes(by_data: bool) -> list[str]:
    """Ops of the program that write to their operands, and writes that its signature reports."""
    program = torch.export.export(Teacher(by_data), (torch.ones(3),), strict=False)
    modules = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    calls = [node for m in modules for node in m.graph.nodes if node.op == "call_function"]
    ops = [n.target for n in calls if isinstance(n.target, torch._ops.OpOverload)]
    kinds = [spec.kind.name for spec in program.graph_signature.output_specs]
    reported = [kind for kind in kinds if kind != "USER_OUTPUT"]
    return [str(op) for op in ops if op._schema.is_mutable] + reported


plain = Teacher(True)
plain(torch.ones(3))
assert plain.weight.tolist() == [0.5] * 3, "the module itself does write"
assert writes(by_data=False), "copy_ is in the program"
assert writes(by_data=True) == [], "the assignment of .data is in the program: outdated"
print("as found: .data = t is nowhere in the program, copy_ is:", writes(by_data=False))
EOF
