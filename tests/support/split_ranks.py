"""Split modules on all ranks of this process, called several times as a user's script would."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from traces import planned_once

import autoparallel
from autoparallel.parallel.module import parallel_module
from autoparallel.parallel.module_state import state_of
from autoparallel.parallel.seeds import manual_seed
from autoparallel.placement import whole_layout
from autoparallel.planning.replan import Replanner
from autoparallel.runtime.joint_moves import gathered
from autoparallel.runtime.ranks import Ranks, run_ranks, thread_ranks

__all__ = ["as_unsplit", "programs_of", "whole_gradients"]

Script = Callable[[nn.Module], Any]


def whole_gradients(module: nn.Module, ranks: Ranks | None = None) -> dict[str, torch.Tensor]:
    """Return the gradients by path, put together from the ranks' parts."""
    found = {path: p.grad for path, p in module.named_parameters() if p.grad is not None}
    if ranks is None or "_autoparallel" not in vars(module):
        return found
    layouts = state_of(module).parameters
    wholes = gathered(
        list(found.values()),
        [layouts[path].state for path in found],
        [whole_layout(len(ranks.sizes))] * len(found),
        [layouts[path].shape for path in found],
        ranks,
    )
    return dict(zip(found, wholes, strict=True))


def programs_of(module: nn.Module) -> int:
    """Return how many programs a split module has, with those of the modules in it."""
    states = [vars(m)["_autoparallel"] for m in module.modules() if "_autoparallel" in vars(m)]
    return sum(len(several) for state in states for several in state.entries.values())


def as_unsplit(
    model: nn.Module,
    world_size: int,
    inputs: tuple[Any, ...],
    script: Any,
    close: Any = MappingProxyType({"rtol": 1e-10, "atol": 1e-12}),
    **options: Any,
) -> Any:
    """Run a script with the plain model and with the split one, and require equal results.

    script: a generator function of the module, which yields outputs of its calls. After each yield,
    all gradients are compared, too, where there are any. close: how close results must be. Returns
    what rank 0's script returned.
    """
    expected = list(_steps(script, copy.deepcopy(model)))[:-1]
    plan = autoparallel.make_plan(model, world_size, example_inputs=inputs, **options)

    def work(ranks: Ranks) -> list[Any]:
        replan = Replanner(plan.model, plan.mesh, plan.options)
        # Each rank has Python objects of its own, as a process has.
        split = parallel_module(copy.deepcopy(model), plan, ranks, None, replan, 0)
        manual_seed(split, 0)
        return list(_steps(script, split, ranks))

    with planned_once():
        results = run_ranks(thread_ranks(plan.mesh, in_turn=True), work)
    for steps in results:
        assert len(steps) == len(expected) + 1
        for number, (found, wanted) in enumerate(zip(steps[:-1], expected, strict=True)):
            where = functools.partial("step {}: {}".format, number)
            torch.testing.assert_close(found, wanted, msg=where, **close)
    return results[0][-1]


def _steps(script: Any, module: nn.Module, ranks: Ranks | None = None) -> Any:
    running = script(module)
    while True:
        try:
            output = next(running)
        except StopIteration as end:
            yield end.value
            return
        gradients = whole_gradients(module, ranks)
        yield _values(output), {path: grad.clone() for path, grad in gradients.items()}


def _values(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.detach().clone()
    if isinstance(output, (list, tuple)):
        return [_values(item) for item in output]
    return output
