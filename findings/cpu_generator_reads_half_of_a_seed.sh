#!/usr/bin/env bash
# Seeds of torch's CPU generator that differ only above their 32nd bit.
#
# Guess: seeds are numbers of 64 bits (torch.manual_seed accepts them, and initial_seed() returns
#        them), so two different ones give different streams, as they do on a GPU. Seeds that are
#        put together as `(rank << 32) + step`, or cut out of a hash of 64 bits, do not collide.
# Seen:  the CPU generator's Mersenne twister is started from the lower 32 bits alone: seeds that
#        agree there give the same numbers, bit for bit, though initial_seed() tells them apart. Of
#        a million random seeds of 64 bits about a hundred pairs draw alike.
# With:  torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-28.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/seeds.py" <<'PYTHON'
import torch


def drawn(seed: int) -> torch.Tensor:
    return torch.rand(1000, generator=torch.Generator().manual_seed(seed))


step = 7
ranks = [drawn((rank << 32) + step) for rank in range(4)]
alike = [bool(torch.equal(ranks[0], other)) for other in ranks]
print("seeds (rank << 32) + 7 draw what rank 0 draws:", alike)
assert all(alike), "the upper half counts: outdated"
assert not torch.equal(drawn(7), drawn(8))
told = {torch.Generator().manual_seed((rank << 32) + step).initial_seed() for rank in range(4)}
print("initial_seed() of the four:", sorted(told))
assert len(told) == 4
PYTHON
"$folder/venv/bin/python" "$folder/seeds.py"
