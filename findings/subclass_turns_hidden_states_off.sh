#!/usr/bin/env bash
# Hugging Face models whose class is replaced by a subclass at run time.
#
# Guess: a model whose `__class__` becomes a subclass that adds nothing returns what it did.
# Seen:  `output_hidden_states=True` is silently ignored: the library looks up what a class can
#        record by the text of the class, and the subclass's text is another. With the module and
#        the qualified name of the original class it works again.
# With:  transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-28.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'EOF'
import torch
from transformers import LlamaConfig, LlamaModel

config = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2,
)
model = LlamaModel(config).eval()
ids = torch.arange(4)[None]


def states() -> int:
    """How many hidden states come back."""
    return len(model(ids, output_hidden_states=True).hidden_states or ())


assert states() == 3
kind = type(model)
model.__class__ = type("Wrapped", (kind,), {})
assert states() == 0, "hidden states come back: outdated"
model.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__,
                                                "__qualname__": kind.__qualname__})
assert states() == 3
print("as found: 3 hidden states, 0 after a subclass with another name, 3 with the same name")
EOF
