#!/usr/bin/env bash
# An error that a user's module raises inside of a pipeline of torch.distributed.pipelining.
#
# Guess: schedule.step(...) raises the module's own error, as calling the module does: a script that
#        catches its own exception class (bad data: skip the batch) goes on working.
# Seen:  a RuntimeError "failed to run forward" with the shapes and dtypes of the arguments. Neither
#        the class nor the words of the module's error are in it: they are in __cause__ alone.
# With:  torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-28.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/stage.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe


class BadBatchError(Exception):
    pass


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x > 100).any()):
            raise BadBatchError("a value above 100")
        return self.inner(x)


dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
module, sample = Stage(), torch.ones(2, 4)
stage = PipelineStage(module, 0, 1, torch.device("cpu"), input_args=(sample,), output_args=(sample,))
schedule = ScheduleGPipe(stage, 2, loss_fn=lambda output, target: output.sum())
batch, target = torch.ones(4, 4), torch.ones(4, 4)
schedule.step(batch, target=target)
batch[0, 0] = 1000
try:
    module(batch)
except BadBatchError as error:
    print("the module:  ", repr(error))
try:
    schedule.step(batch, target=target)
    raise SystemExit("no error: outdated")
except BadBatchError:
    raise SystemExit("the module's own error arrives: outdated") from None
except RuntimeError as error:
    print("the schedule:", " ".join(str(error).split())[:100])
    print("its cause:   ", repr(error.__cause__))
    assert "above 100" not in str(error) and isinstance(error.__cause__, BadBatchError)
dist.destroy_process_group()
PYTHON
"$folder/venv/bin/python" "$folder/stage.py" "$folder/store"
