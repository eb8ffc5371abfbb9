#!/usr/bin/env bash
# Fine-tuning with a frozen first stage, under a schedule that halves backward passes.
#
# Guess: a schedule changes when gradients are computed, not which: with the first stage frozen, the
#        second one gets the gradients that it has under interleaved 1F1B and without a pipeline.
# Seen:  under ScheduleInterleavedZeroBubble no parameter of the second stage has a gradient, and
#        nothing says so: a stage none of whose inputs needs a gradient has no first half to go
#        back, and the second half, for its weights, finds nothing put off.
# With:  torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-28.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/frozen.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)


def trained(kind: type, frozen: bool) -> list[bool]:
    """Which parameters have a gradient after a step."""
    torch.manual_seed(0)
    modules = [nn.Linear(4, 4), nn.Linear(4, 4)]
    modules[0].requires_grad_(not frozen)
    stages = [PipelineStage(m, i, 2, torch.device("cpu")) for i, m in enumerate(modules)]
    schedule = kind(stages, 2, loss_fn=lambda output, target: (output - target).square().sum())
    schedule.step(torch.randn(4, 4), target=torch.ones(4, 4))
    return [parameter.grad is not None for m in modules for parameter in m.parameters()]


dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
seen = {
    (kind.__name__, frozen): trained(kind, frozen)
    for kind in (ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble)
    for frozen in (False, True)
}
for (name, frozen), has in seen.items():
    print(f"{name:30} first stage {'frozen' if frozen else 'trained'}: gradients {has}")
assert seen["ScheduleInterleaved1F1B", False] == [True] * 4
assert seen["ScheduleInterleaved1F1B", True] == [False, False, True, True]
assert seen["ScheduleInterleavedZeroBubble", False] == [True] * 4
if seen["ScheduleInterleavedZeroBubble", True] != [False] * 4:
    raise SystemExit("the second stage is trained: outdated")
dist.destroy_process_group()
PYTHON
"$folder/venv/bin/python" "$folder/frozen.py" "$folder/store"
