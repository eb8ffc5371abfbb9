#!/usr/bin/env bash
# The source lines that torch.export notes with each op, for a model that calls helpers.
#
# Guess: the last line of `node.meta["stack_trace"]` is the one that ran the op, so that a report of
#        a program can point at it, as a profiler or an error would.
# Seen:  without strict mode (the default) only functions that are named "forward" are noted. An op
#        in a helper has the line of the forward that called it, however many helpers lie between,
#        so all ops of one call share a line; the same helper named "forward" is noted. With strict
#        mode the helpers' own lines are there.
# With:  torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-29.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/lines.py" <<'PYTHON'
import re

import torch
from torch import Tensor, nn


class Encoder(nn.Module):
    def encode(self, x: Tensor) -> Tensor:
        doubled = x * 2
        return doubled.relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x)


def renamed(function):
    """Return the function under the name that the tracer looks for."""
    code = function.__code__.replace(co_name="forward")
    return type(function)(code, function.__globals__)


class Renamed(Encoder):
    encode = renamed(Encoder.encode)


def places(model: nn.Module, strict: bool) -> list[str]:
    program = torch.export.export(model, (torch.ones(2, 4),), strict=strict)
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    frames = [re.findall(r"line (\d+), in (\w+)", node.meta["stack_trace"]) for node in nodes]
    return [f"{node.name}: line {rows[-1][0]}, in {rows[-1][1]}" for node, rows in zip(nodes, frames)]


plain, strict, named = places(Encoder(), False), places(Encoder(), True), places(Renamed(), False)
print("default        ", plain)
print("strict         ", strict)
print("helper renamed ", named)
assert all(row.endswith("in encode") for row in strict)
lines = {row.split(": ")[1] for row in plain}
if len(lines) != 1 or not lines.pop().endswith("in forward"):
    raise SystemExit("helpers are noted: outdated")
if len({row.split(": ")[1] for row in named}) != 2:
    raise SystemExit("the name of a function plays no part: outdated")
PYTHON
"$folder/venv/bin/python" "$folder/lines.py"
