#!/usr/bin/env bash
# all_gather_single (all_gather_into_tensor before) with an output that is a stack of the ranks' tensors, on CPU.
#
# Guess: both forms of the output that its documentation names work on each backend: the ranks'
#        tensors one after the other, (ranks * n,), and their stack, (ranks, n).
# Seen:  gloo takes the first one only. Of the second it says "invalid tensor size at index 0",
#        though both are the same memory; a view of the stack, flattened, is accepted. So code that
#        was written on GPUs fails in tests on CPU.
# With:  torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-29.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/gather.py" <<'PYTHON'
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as processes


def gather(output: torch.Tensor, own: torch.Tensor) -> str:
    try:
        dist.all_gather_single(output, own)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "gathered"


def run(rank: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    own = torch.full((3,), float(rank))
    stack = torch.empty(2, 3)
    rows = {"(6,)": gather(torch.empty(6), own), "(2, 3)": gather(stack, own)}
    rows["(2, 3) flattened"] = gather(stack.view(-1), own)
    if rank == 0:
        for shape, found in rows.items():
            print(f"{shape}: {found}")
    assert rows["(6,)"] == rows["(2, 3) flattened"] == "gathered"
    assert stack.tolist() == [[0.0] * 3, [1.0] * 3]
    if "invalid tensor size" not in rows["(2, 3)"]:
        raise SystemExit("a stack is taken: outdated")
    dist.destroy_process_group()


if __name__ == "__main__":
    described = " ".join(dist.all_gather_single.__doc__.split())
    assert "a stack of all the input tensors" in described
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(run, (f"{folder}/meeting",), 2)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/gather.py"
