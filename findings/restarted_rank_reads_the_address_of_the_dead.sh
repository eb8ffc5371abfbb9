#!/usr/bin/env bash
# A gloo group after torchrun has restarted its workers.
#
# Guess: torchrun --max-restarts makes every attempt a fresh start: init_process_group waits until
#        all ranks of this attempt are there.
# Seen:  with --standalone all attempts share one store without a prefix of their own. A restarted
#        rank that comes first finds the address that a rank of the attempt before has left, and
#        connects to that: in about half of the runs below it fails ("connectFullMesh failed"), and
#        the restart is lost. With TORCHELASTIC_RESTART_COUNT in the store's prefix none fails.
#        On several machines the store is kept as well, and the count is of an agent's own workers:
#        after two deaths on the second machine it is 0 on the first one and 2 there.
# With:  torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-28.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/worker.py" <<'PYTHON'
import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
world_size, patience = int(os.environ["WORLD_SIZE"]), timedelta(seconds=20)
if attempt and rank == 0:
    time.sleep(3)  # the ranks of an attempt never start at the same moment
if sys.argv[1] == "prefix":
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.PrefixStore(f"attempt {attempt}", dist.TCPStore(host, port, timeout=patience))
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=patience
    )
else:
    dist.init_process_group("gloo", timeout=patience)
dist.all_reduce(torch.ones(1))
if not attempt and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
dist.barrier()
print(f"attempt {attempt}, rank {rank}: done", flush=True)
os._exit(0)
PYTHON
run() {
    "$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node 2 \
        --max-restarts 1 "$folder/worker.py" "$1" > "$folder/$1.txt" 2>&1
}
lost=0
for number in 1 2 3 4 5 6; do
    if ! run plain; then
        grep --quiet "connectFullMesh failed" "$folder/plain.txt"
        lost=$((lost + 1))
    fi
    run prefix  # ends the script where it fails
done
echo "restarts that failed, of 6: $lost as torchrun does it, 0 with a prefix for each attempt"
if [ "$lost" = 0 ]; then
    echo "no restart failed: outdated"
    exit 1
fi
