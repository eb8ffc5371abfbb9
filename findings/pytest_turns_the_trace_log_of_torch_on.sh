#!/usr/bin/env bash
# A test that calls torch.export under pytest, and the log that torch writes while it traces.
#
# Guess: torch's structured log of traces is off unless TORCH_TRACE names a folder, in tests as in
#        programs: pytest only collects what loggers say anyway.
# Seen:  pytest puts its handlers on every logger that does not propagate, and "torch.__trace" is
#        one. Torch takes a handler there for a reader: it writes records, with the stack of each
#        step, into what pytest captures: 21 for one layer. The same file run by itself has no
#        handler, and makes 2 records, which nobody gets.
# With:  torch 2.13.0 (CPU), pytest 9.2.0, Python 3.11. Date: 2026-11-29.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 pytest==9.2.0
cat > "$folder/test_records.py" <<'PYTHON'
import logging
import sys

import torch

records = []
make = logging.getLogRecordFactory()


def counted(name, *args, **options):
    if name == "torch.__trace":
        records.append(name)
    return make(name, *args, **options)


def test_export():
    logging.setLogRecordFactory(counted)
    torch.export.export(torch.nn.Linear(2, 2), (torch.ones(2, 2),))
    handlers = logging.getLogger("torch.__trace").handlers
    print(f"{len(handlers)} handlers, {len(records)} records", file=sys.__stdout__)


if __name__ == "__main__":
    test_export()
PYTHON
cd "$folder"
alone=$("$folder/venv/bin/python" test_records.py)
tested=$("$folder/venv/bin/python" -m pytest -q -s -p no:cacheprovider test_records.py | grep handlers)
echo "alone:  $alone"
echo "pytest: $tested"
count() { sed "s/.*, \([0-9]*\) records/\1/" <<< "$1"; }
[[ "$alone" == "0 handlers"* ]] || { echo "a program has a handler too: outdated"; exit 1; }
[[ "$tested" != "0 handlers"* ]] || { echo "pytest adds no handler: outdated"; exit 1; }
(( $(count "$tested") > 2 * $(count "$alone") )) || { echo "no more is said: outdated"; exit 1; }
