#!/usr/bin/env bash
# torch.compile(fullgraph=True) of a function that was compiled without it before.
#
# Guess: fullgraph=True is an assertion: a function that needs more than one graph raises, whatever
#        else was compiled earlier in the process.
# Seen:  it is heeded only while code is compiled. Where the same function, or another wrapper of the
#        same class's forward, was compiled without it before, and its guards hold, the cached code
#        with its graph breaks is used, and nothing is raised. A test for "one graph" must begin with
#        torch._dynamo.reset().
# With:  torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-28.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 2>/dev/null
cat > "$folder/cached.py" <<'PYTHON'
import torch


class Model(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.sin()
        torch._dynamo.graph_break()
        return x.cos()


def refused(model: torch.nn.Module, x: torch.Tensor) -> bool:
    try:
        torch.compile(model, backend="eager", fullgraph=True)(x)
    except torch._dynamo.exc.Unsupported:
        return True
    return False


x, model = torch.ones(3), Model()
alone = refused(model, x)
torch._dynamo.reset()
torch.compile(model, backend="eager")(x)
after = refused(model, x)
print(f"a graph break is refused: alone {alone}; after a call compiled without fullgraph: {after}")
assert alone, "graph breaks are no longer refused: outdated"
assert not after, "cached code is checked: outdated"
PYTHON
"$folder/venv/bin/python" "$folder/cached.py"
