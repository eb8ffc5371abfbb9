"""What the ranks of tests need and no test changes, for the server that they are forks of.

This module is imported there once, by its name: to import all of it costs a second and more in each
rank otherwise, and the first step some tenths of one. Nothing here may start a thread or a process,
which forks would be without.
"""

from __future__ import annotations

import importlib

from garbage import collect_rarely

import autoparallel
from autoparallel.support.fake_tensors import start_autograd
from autoparallel.train.models import GPT, GPTConfig

_NAMES = ["torch.distributed.tensor", "sympy.tensor.tensor", "networkx", "pytest", "families"]
_NAMES += ["autoparallel", "autoparallel.api", "autoparallel.parallel.checkpoint"]
_NAMES += [f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "bert", "llama")]
for _name in _NAMES:
    importlib.import_module(_name)
# Before export makes the first tensor without data: see there.
start_autograd()
# The first step imports what it needs, and finds out of ops what holds for all plans.
_model = GPT(GPTConfig(layers=2, hidden=8, heads=2, vocabulary=8))
_inputs = _model.example_inputs(batch=2, sequence=4)
autoparallel.make_plan(_model, 2, example_inputs=_inputs)
autoparallel.autoparallelize(_model, 1, example_inputs=_inputs)(**_inputs).loss.backward()
collect_rarely()
