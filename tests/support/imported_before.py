"""What the ranks of tests need and no test changes, for the server that they are forks of.

This module is imported there once, by its name: to import all of it costs a second and more in each
rank otherwise. Nothing here may start a thread or a process, which forks would be without.
"""

from __future__ import annotations

import importlib

import torch
from garbage import collect_rarely

from autoparallel.support.fake_tensors import start_autograd

_NAMES = ["torch.distributed.tensor", "sympy.tensor.tensor", "networkx", "pytest", "families"]
_NAMES += ["autoparallel", "autoparallel.api", "autoparallel.parallel.checkpoint"]
_NAMES += [f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "bert", "llama")]
for _name in _NAMES:
    importlib.import_module(_name)
# Before export makes the first tensor without data: see there.
start_autograd()
# Export imports most of what it needs when it is first called.
torch.export.export(torch.nn.ReLU(), (torch.ones(2),))
collect_rarely()
