#!/usr/bin/env bash
# Schemas of batch norm and what they say about writes.
#
# Guess: an op that changes an argument says so in its schema (`alias_info.is_write`), so that a
#        dispatch mode can find all writes by reading schemas.
# Seen:  `aten::native_batch_norm` in training writes to `running_mean` and `running_var`, and its
#        schema calls it free of writes. The other ops of the family are alike.
# With:  torch 2.13.0 (CPU), Python 3.11. Date: 2026-11-28.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'EOF'
import torch

operator = torch.ops.aten.native_batch_norm.default
torch.manual_seed(0)
x = torch.randn(8, 3) + 5
mean, variance = torch.zeros(3), torch.ones(3)
versions = (mean._version, variance._version)
operator(x, None, None, mean, variance, True, 0.1, 1e-5)
assert mean.abs().min() > 0.1, "running_mean was written to"
declared = [
    argument.name
    for argument in operator._schema.arguments
    if argument.alias_info is not None and argument.alias_info.is_write
]
assert declared == [] and not operator._schema.is_mutable, "the schema tells: outdated"
print("as found: writes to running_mean and running_var, schema declares", declared or "nothing")
print("version counters moved:", (mean._version, variance._version) != versions)
EOF
