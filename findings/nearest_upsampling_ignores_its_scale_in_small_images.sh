#!/usr/bin/env bash
# Nearest upsampling by a scale that gives exactly twice the size.
#
# Guess: `interpolate(x, scale_factor=2.02)` reads pixel floor(i / 2.02), as its documentation says
#        of a scale that is given; whether it does is no matter of an image's size or of its order
#        in memory.
# Seen:  it does in one dim and in three, and for large images in two dims. For images of up to
#        32 x 32, which 2.02 makes exactly twice as large, and for all that are channels-last, a CPU
#        reads pixel i // 2: the scale is ignored. So converting a model to channels-last, or
#        cutting an image into pieces, changes which pixels are read.
# With:  torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-29.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'EOF'
import torch
from torch.nn.functional import interpolate

SCALE = 2.02


def read(size: int, dims: int, memory_format: torch.memory_format) -> torch.Tensor:
    """Return which rows are read along the first dim of an image of equal sides."""
    rows = torch.arange(size, dtype=torch.float32).view(1, 1, size, *(1,) * (dims - 1))
    image = rows.expand(1, 4, *(size,) * dims).contiguous(memory_format=memory_format)
    found = interpolate(image, scale_factor=SCALE)[0, 0]
    return found.reshape(len(found), -1)[:, 0]


for dims, size, memory_format, honoured in (
    (1, 20, torch.contiguous_format, True),
    (3, 20, torch.contiguous_format, True),
    (2, 40, torch.contiguous_format, True),
    (2, 20, torch.contiguous_format, False),
    (2, 40, torch.channels_last, False),
):
    found = read(size, dims, memory_format)
    assert len(found) == 2 * size
    places = torch.arange(2 * size)
    by_scale = torch.equal(found, (places / SCALE).floor())
    by_size = torch.equal(found, (places // 2).float())
    print(f"{size} in {dims} dims, {memory_format}: {'the scale' if by_scale else 'the size'} decides")
    assert (by_scale, by_size) == (honoured, not honoured), "torch reads other pixels now"
EOF
