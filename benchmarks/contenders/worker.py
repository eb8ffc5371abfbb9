"""One process of the benchmark: it makes contenders and steps them, as it is told on its stdin.

Every line that it reads is an order in JSON, and is answered by a line in JSON. Between two orders
it waits for the pipe and takes no time of a processor.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from contenders.by_hand import BY_HAND
from contenders.contender import AbsentError, Contender
from contenders.libraries import LIBRARIES
from contenders.measuring import collectives, peak_nbytes, seconds
from contenders.ours import OURS
from contenders.workloads import WORKLOADS

CONTENDERS: dict[str, Contender] = {each.name: each for each in (*OURS, *BY_HAND, *LIBRARIES)}
TIMEOUT = timedelta(seconds=300)


class Worker:
    """The contenders that this process has made, by name."""

    def __init__(self) -> None:
        self.steps: dict[str, Any] = {}

    def make(self, name: str, workload: str) -> dict[str, Any]:
        """Make a contender and run two steps; the second one's loss tells that it trains rightly.

        What a first step sets up, such as the optimizer's state, is there after these.
        """
        torch.manual_seed(0)
        trained = CONTENDERS[name].make(WORKLOADS[workload])
        step = trained.stepper()
        losses = [float(step()) for _ in range(3)]
        self.steps[name] = step
        return {"losses": losses}

    def time(self, name: str, count: int) -> dict[str, Any]:
        """Make some steps, and say how long one takes."""
        cpu, wall = seconds(self.steps[name], count)
        return {"cpu": cpu, "wall": wall}

    def count(self, name: str) -> dict[str, Any]:
        """Say what one step sends, and the bytes that are held at its worst moment."""
        if name.endswith("compiled"):
            return {}  # what counts sees each operator, and compiled code calls none
        step = self.steps[name]
        calls, nbytes = collectives(step)
        optimizer = step.optimizer
        held = [item for group in optimizer.param_groups for item in group["params"]]
        for state in optimizer.state.values():
            held += [value for value in state.values() if isinstance(value, torch.Tensor)]
        gc.collect()
        return {"collectives": calls, "nbytes": nbytes, "peak": peak_nbytes(step, held)}

    def forget(self) -> dict[str, Any]:
        """Free all contenders."""
        self.steps.clear()
        torch.compiler.reset()
        gc.collect()
        return {}


def answer(worker: Worker, order: dict[str, Any]) -> dict[str, Any]:
    """Carry out an order, and return what is to be said."""
    method: Callable[..., dict[str, Any]] = getattr(worker, order.pop("do"))
    try:
        return method(**order)
    except AbsentError as reason:
        return {"absent": str(reason)}
    except Exception as error:
        traceback.print_exc()
        first = next(iter(str(error).strip().splitlines()), "")
        return {"absent": f"{type(error).__name__}: {first}"}


def main() -> None:
    """Join the group that the environment names, if any, and answer orders until stdin ends."""
    # Libraries print; what is said here must be JSON alone.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    if "ALONE" in os.environ:
        # Builds from before do not have it, and take no part.
        from autoparallel.support.torch_private import fake_process_group

        fake_process_group(0, int(os.environ["WORLD_SIZE"]))
    elif "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    worker = Worker()
    for line in sys.stdin:
        order = json.loads(line)
        gc.collect()
        gc.disable()  # a collection in the middle of a step would count for whoever steps then
        reply = answer(worker, order)
        gc.enable()
        print(json.dumps(reply), file=out, flush=True)
    # Without the tear-down: gloo's threads now and then abort a process that is ending.
    os._exit(0)


if __name__ == "__main__":
    main()
