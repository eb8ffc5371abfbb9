"""`autoparallel simulate`: runs all ranks in this process, and compares them with the model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoparallel.commands.asked_plan import (
    add_request,
    model_again,
    model_of,
    planned,
    read_plan,
)
from autoparallel.commands.bundled_models import BUNDLED
from autoparallel.commands.command import Command, progress

if TYPE_CHECKING:
    import torch
    from torch import nn

    from autoparallel.plan import Plan

__all__ = ["SIMULATE"]

# The largest error of an output or a gradient, relative to its norm, that rounding explains:
# transformers computes norms and losses in float32, whatever the parameters are.
_ROUNDING = 1e-4


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `simulate`."""
    action = parser.add_argument(
        "model", help="a plan's file, or a model to be planned as the options say"
    )
    vars(action)["completer"] = lambda **_: list(BUNDLED)
    add_request(parser)
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    parser.epilog = (
        "The weights are drawn at random, and dropout is off. Give --layers, --batch and "
        "--sequence for a model that this machine's memory holds."
    )


def _run(options: argparse.Namespace) -> int:
    """Run a step on all ranks and on one; return 1 where they differ by more than rounding."""
    plan: Plan | None = None
    if Path(options.model).is_file():
        plan = read_plan(options.model)
        named = model_again(plan, weights="all")
    else:
        named = model_of(options, weights="all")
    import torch

    from autoparallel.api import make_plan, simulate
    from autoparallel.capture.example_inputs import find_example_inputs, split_example

    torch.manual_seed(0)
    # Dropout of the unsplit model draws from another stream than that of the parts.
    model = named.model.to(torch.float64).eval()
    inputs = find_example_inputs(model) if named.inputs is None else named.inputs
    inputs = _widened(inputs)
    if plan is None:
        plan = planned(options, _with_inputs(named, inputs))
    else:
        progress(f"planning it for {plan.whole_mesh} as it computes here")
        plan = make_plan(
            model,
            mesh=plan.whole_mesh,
            microbatches=None if plan.pipeline is None else plan.pipeline.microbatches,
            schedule=plan.options.order,
            stages_per_rank=plan.options.each_rank,
            example_inputs=inputs,
            hardware=plan.options.hardware,
            sequence_parallel=plan.options.sequence_parallel,
            data_parallel=plan.options.data_parallel,
            constraints=plan.options.constraints,
        )
    progress(f"running {plan.world_size} ranks in this process, and the unsplit model")
    result = simulate(model, plan=plan, example_inputs=inputs)
    args, kwargs = split_example(inputs)
    expected = model(*args, **kwargs)
    rows: dict[str, Any] = {
        "world_size": plan.world_size,
        "output_error": _error_of_outputs(result.output, expected),
        "gradient_error": _error_of_gradients(model, result.gradients, expected),
        "ranks_apart": result.apart,
        "collectives": dict(result.collectives),
    }
    good = rows["output_error"] < _ROUNDING and rows["gradient_error"] < _ROUNDING
    print(json.dumps(rows) if options.json else _text(plan, rows, good))
    return 0 if good else 1


def _with_inputs(named: Any, inputs: Any) -> Any:
    """Return the model with these inputs."""
    from dataclasses import replace

    return replace(named, inputs=inputs)


def _widened(inputs: Any) -> Any:
    """Return the inputs, those of floating point in float64."""
    import torch

    from autoparallel.support.torch_private import tree_map

    def widen(leaf: Any) -> Any:
        floating = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        return leaf.double() if floating else leaf

    return tree_map(widen, inputs)


def _error_of_outputs(actual: Any, expected: Any) -> float:
    """Return the largest relative error of a tensor that the model returns."""
    from autoparallel.support.pytree import flatten

    pairs = zip(flatten(actual)[0], flatten(expected)[0], strict=True)
    return max((_error(one, other) for one, other in pairs), default=0.0)


def _error_of_gradients(model: nn.Module, actual: Any, expected: Any) -> float:
    """Return the largest relative error of a gradient; 0.0 where the model returns no loss."""
    from autoparallel.support.pytree import flatten

    losses = [t for t in flatten(expected)[0] if not t.dim() and t.requires_grad]
    if not losses:
        return 0.0
    losses[0].backward()
    wanted = {path: p.grad for path, p in model.named_parameters() if p.grad is not None}
    return max((_error(actual[path], wanted[path]) for path in wanted), default=0.0)


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return |actual - expected| / |expected|."""
    norm = float(expected.detach().double().norm())
    return float((actual.detach() - expected.detach()).double().norm()) / (norm or 1.0)


def _text(plan: Plan, rows: dict[str, Any], good: bool) -> str:
    """Return the answer in lines."""
    sent = ", ".join(f"{n} {k.replace('_', '-')}" for k, n in rows["collectives"].items()) or "none"
    lines = [
        ("ranks", f"{plan.world_size}, {plan.whole_mesh}"),
        ("outputs", f"within {rows['output_error']:.1e} of the unsplit model's"),
        ("gradients", f"within {rows['gradient_error']:.1e} of the unsplit model's"),
        ("between ranks", f"{rows['ranks_apart']:.1e} where they should hold the same"),
        ("collectives", sent),
        ("answer", "the same, but for rounding" if good else "NOT the same"),
    ]
    return "\n".join(f"{name:14} {text}" for name, text in lines)


SIMULATE = Command(
    "simulate",
    "run all ranks of a plan in this process, and compare with the unsplit model",
    (
        "autoparallel simulate gpt2 --world-size 4 --layers 2 --batch 2 --sequence 32",
        "autoparallel simulate my_module:build --world-size 2",
    ),
    _add_arguments,
    _run,
)
