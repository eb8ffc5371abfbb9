#!/usr/bin/env bash
# The table `pipeline_order` of torch.distributed.pipelining's Schedule1F1B.
#
# Guess: it lists what each rank does, as the tables of the other schedules do: the forward and the
#        backward pass of each micro-batch once. So a step can be predicted or drawn from it.
# Seen:  with 2 stages and 4 micro-batches the last rank's forward passes are 1, 2, 3 and 4 in place
#        of 0 to 3: micro-batch 0 goes back without having gone forward, and 4 does not exist. A
#        step of the schedule itself is right: it does not go by the table.
# With:  torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-28.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/order.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe


def forwards(kind: type, stage: PipelineStage) -> dict[int, list[int]]:
    """The micro-batches of each rank's forward passes, by the schedule's table."""
    schedule = kind(stage, 4, loss_fn=lambda output, target: (output - target).square().sum())
    return {
        rank: [action.microbatch_index for action in row if action and str(action)[1] == "F"]
        for rank, row in schedule.pipeline_order.items()
    }


def on_rank(rank: int, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    stage = PipelineStage(nn.Linear(4, 4), rank, 2, torch.device("cpu"))
    gpipe, one = forwards(ScheduleGPipe, stage), forwards(Schedule1F1B, stage)
    if rank == 0:
        print("GPipe:", gpipe)
        print("1F1B: ", one)
    assert gpipe == {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}
    if one != {0: [0, 1, 2, 3], 1: [1, 2, 3, 4]}:
        raise SystemExit("another table: outdated")
    dist.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.spawn(on_rank, (sys.argv[1],), 2)
PYTHON
"$folder/venv/bin/python" "$folder/order.py" "$folder/store"
