#!/usr/bin/env bash
# A forward that looks something up by the text of a size, and torch.export with that size dynamic.
#
# Guess: f"{x.shape[0]}" in a traced forward is "3" for three rows, as int(x.shape[0]) is 3, and the
#        exported program is guarded to three rows; or the export says that it cannot write a size.
# Seen:  the text is the symbol's name, such as "s77". The look-up finds nothing and takes the
#        default, no guard is made, and the exported program computes something else than the module
#        even for the inputs that it was exported with. "%d" and str.format() write the number.
# With:  torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-29.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/texts.py" <<'PYTHON'
import torch

SCALES = {"3": 10.0}


class Scaled(torch.nn.Module):
    def __init__(self, text):
        super().__init__()
        self.text = text

    def forward(self, x):
        return x * SCALES.get(self.text(x.shape[0]), 1.0)


x = torch.ones(3, 2)
rows = torch.export.Dim.AUTO
for name, text in {
    "f-string": lambda size: f"{size}",
    "str": str,
    "percent d": lambda size: "%d" % size,
}.items():
    model = Scaled(text)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},), strict=False).module()
    print(name, "module", model(x)[0, 0].item(), "program", program(x)[0, 0].item())
PYTHON
found=$("$folder/venv/bin/python" "$folder/texts.py")
echo "$found"
for name in f-string str; do
    grep -q "^$name module 10.0 program 1.0$" <<< "$found" || { echo "$name: outdated"; exit 1; }
done
grep -q "^percent d module 10.0 program 10.0$" <<< "$found" || { echo "%d: outdated"; exit 1; }
