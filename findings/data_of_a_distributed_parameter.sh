#!/usr/bin/env bash
# `parameter.data = tensor` where the parameter is a DTensor.
#
# Guess: as for any parameter, the value is replaced (weight surgery, loading, casting are written
#        so), or the assignment is refused.
# Seen:  it is neither. The DTensor reports the new type and has memory of its own, and every
#        computation and `to_local()` go on with the old numbers. Nothing warns, for a plain tensor
#        and for another DTensor alike.
# With:  torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-28.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'EOF'
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29577", RANK="0", WORLD_SIZE="1")
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (1,))


def parameter() -> nn.Parameter:
    return nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh, [Shard(0)]))


def total(weight: nn.Parameter) -> float:
    return float((weight * 1).full_tensor().detach().sum())


plain = nn.Parameter(torch.ones(2, 2))
plain.data = torch.zeros(2, 2)
assert float(plain.detach().sum()) == 0.0
seen = {}
weight = parameter()
weight.data = torch.zeros(2, 2)
seen["a plain tensor"] = total(weight)
weight = parameter()
weight.data = DTensor.from_local(torch.zeros(2, 2), mesh, [Shard(0)])
seen["a DTensor"] = total(weight)
weight = parameter()
weight.data = weight.data.double() * 3
seen["its own, in another type"] = total(weight)
types = (weight.dtype, weight.to_local().dtype)
print("sums after .data = zeros, zeros, threes:", seen, "types", types)
assert seen == dict.fromkeys(seen, 4.0), "the assignment is followed: outdated"
assert types == (torch.float64, torch.float32)
dist.destroy_process_group()
EOF
