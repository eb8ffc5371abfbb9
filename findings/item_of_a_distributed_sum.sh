#!/usr/bin/env bash
# `.item()` of a DTensor that is a pending sum.
#
# Guess: a number that is read of a DTensor is that of the whole tensor, as `print(loss.item())` and
#        `float(gradient.norm())` in training scripts take it; where a sum over the ranks is still
#        pending, it is made first, or the read is refused.
# Seen:  the rank's own term is returned, without a word, and every rank has another number: sums,
#        means and norms of sharded tensors are wrong. `.full_tensor().item()` is right.
# With:  torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-28.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/read.py" <<'PYTHON'
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
whole = torch.arange(1.0, 7.0)
split = distribute_tensor(whole, mesh, [Shard(0)])
for name, function in (("sum", torch.sum), ("mean", torch.mean), ("norm", torch.linalg.vector_norm)):
    expected, result = function(whole).item(), function(split)
    numbers = [None, None]
    dist.all_gather_object(numbers, result.item())
    if dist.get_rank() == 0:
        print(f"{name}: {expected:.4g}; .item() on the ranks: {numbers}")
    assert numbers[0] != numbers[1], "the ranks agree: outdated"
    assert expected not in numbers
    assert abs(result.full_tensor().item() - expected) < 1e-5
dist.destroy_process_group()
PYTHON
"$folder/venv/bin/torchrun" --nproc-per-node 2 --master-port 29588 "$folder/read.py" 2>&1 | grep item
