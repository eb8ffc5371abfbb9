"""`autoparallel measure`: runs a plan's step on the processes there are, beside the prediction."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoparallel.commands.asked_plan import model_again, read_plan
from autoparallel.commands.command import Command, positive, progress
from autoparallel.errors import PlanError, WorldSizeError
from autoparallel.support.written_files import check_folder

if TYPE_CHECKING:
    import torch
    from torch import nn

    from autoparallel.plan import Plan

__all__ = ["MEASURE"]

_TRACE = ".trace.json"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `measure`."""
    parser.add_argument("plan", type=Path, help="a file that `autoparallel plan -o` has written")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="write both steps side by side for ui.perfetto.dev, as step.trace.json",
    )
    parser.add_argument(
        "--warmups", type=positive, default=3, metavar="N", help="steps before it, default 3"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.epilog = (
        "The weights are drawn at random. Times are those of rank 0's calls; on a GPU each call "
        "waits for its kernel, so that nothing overlaps that the prediction has overlapping."
    )


def _run(options: argparse.Namespace) -> int:
    """Run the step on all ranks; rank 0 prints, and writes the trace."""
    if options.output is not None:
        if not options.output.name.endswith(_TRACE):
            raise PlanError(f"{options.output} is no trace", fix=f"end in {_TRACE}")
        check_folder(options.output)
    plan = read_plan(options.plan)
    plan.refuse_stages(
        "a measured step",
        fix="call model.step(...) in a script of your own, and time it; show tells the prediction",
    )
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks != plan.world_size:
        raise WorldSizeError(
            f"the plan is for {plan.world_size} ranks, and {ranks} run{'s' if ranks == 1 else ''}",
            fix=f"torchrun --standalone --nproc-per-node {plan.world_size} -m autoparallel measure "
            f"{options.plan}",
        )
    # Before torch sees the GPU: a call is to end when its kernel does.
    os.environ.setdefault("CUDA_LAUNCH_BLOCKING", "1")
    import torch

    from autoparallel.api import apply_plan, traced_plan
    from autoparallel.capture.example_inputs import find_example_inputs, split_example
    from autoparallel.view.measured_step import measure_step
    from autoparallel.view.measured_text import measured_rows, measured_text
    from autoparallel.view.trace import write_trace

    torch.manual_seed(0)  # all ranks begin with the same weights
    named = model_again(plan, weights="all")
    inputs = find_example_inputs(named.model) if named.inputs is None else named.inputs
    traced = traced_plan(named.model, plan, example_inputs=inputs)
    model = apply_plan(named.model, traced)
    args, kwargs = split_example(inputs)
    step = _step(model, plan, args, kwargs)
    is_first = int(os.environ.get("RANK", "0")) == 0
    if is_first:
        progress(f"running {options.warmups + 1} steps on {plan.whole_mesh}")
    measured = measure_step(step, warmups=options.warmups)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if not is_first:
        return 0
    from autoparallel.planning.predicted_step import timeline

    predicted = timeline(traced, as_given=True)
    if options.output is not None:
        write_trace(predicted, options.output, measured=measured)
        progress(f"written to {options.output}")
    if options.json:
        rows = measured_rows(traced, predicted, measured)
        ops = [{"name": name, "predicted": one, "measured": other} for name, one, other in rows]
        told = {"predicted": predicted.seconds, "measured": measured.seconds, "ops": ops}
        print(json.dumps(told, indent=1))
    else:
        print(measured_text(traced, predicted, measured))
    return 0


def _step(model: nn.Module, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a function that does a step of training; forward alone, where there is no loss."""
    import torch

    from autoparallel.support.pytree import flatten

    parameters = [one for one in model.parameters() if one.requires_grad]
    rate = 1e-6  # the weights are to stay as they are, near enough
    kind = torch.optim.AdamW if "adam" in plan.options.optimizer else torch.optim.SGD
    optimizer: torch.optim.Optimizer = kind(parameters, lr=rate)

    def step() -> None:
        outputs = flatten(model(*args, **kwargs))[0]
        tensors = [leaf for leaf in outputs if isinstance(leaf, torch.Tensor)]
        losses = [leaf for leaf in tensors if not leaf.dim() and leaf.requires_grad]
        if losses:
            losses[0].backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


MEASURE = Command(
    "measure",
    "run a plan's step on the processes that torchrun started, beside the prediction",
    (
        "torchrun --nproc-per-node 2 -m autoparallel measure plan.json -o step.trace.json",
        "autoparallel measure plan_of_one_rank.json",
    ),
    _add_arguments,
    _run,
)
