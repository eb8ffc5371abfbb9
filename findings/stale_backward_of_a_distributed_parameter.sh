#!/usr/bin/env bash
# The backward pass of a loss from before an optimizer's step, with a parameter that is a DTensor.
#
# Guess: torch notices that a tensor which a backward pass needs was written to since, by the
#        version that every in-place op counts up: a second backward pass after optimizer.step()
#        raises "modified by an inplace operation", for a DTensor as for a plain parameter.
# Seen:  where the forward computed with the parameter's local part (`to_local()`), no error comes,
#        and the gradients are those of the old activations with the new weights. The step raises the
#        version of the DTensor and leaves that of its local part, whose numbers it changes, at 0.
# With:  torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-28.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/stale.py" <<'PYTHON'
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))


def outcome(weight: torch.Tensor) -> str:
    parameter = torch.nn.Parameter(weight)
    x = torch.ones(2, 4, requires_grad=True)
    local = parameter.to_local() if isinstance(weight, DTensor) else parameter
    loss = (x @ local).sin().sum()
    loss.backward(retain_graph=True)
    torch.optim.SGD([parameter], lr=1.0).step()
    try:
        torch.autograd.grad(loss, x)
    except RuntimeError as error:
        return "an error" if "modified by an inplace operation" in str(error) else "another error"
    return f"no error; versions {parameter._version} and {local._version}"


plain = outcome(torch.ones(4, 4))
split = outcome(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]))
if dist.get_rank() == 0:
    print(f"a plain parameter: {plain}; a DTensor: {split}")
assert plain == "an error"
assert split == "no error; versions 1 and 0", "the write is noticed: outdated"
dist.destroy_process_group()
PYTHON
"$folder/venv/bin/torchrun" --nproc-per-node 2 --master-port 29589 "$folder/stale.py" 2>&1 | grep parameter
