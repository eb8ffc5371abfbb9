"""The memory of stages, as it is predicted, against the bytes that are alive on running ranks."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pipeline_models import Language, batch_of
from processes import run_processes
from torch import nn
from traces import traced_once

import autoparallel
from autoparallel.analysis.pipeline_walk import held, most_held
from autoparallel.analysis.stage_memory import memory_of_stages
from autoparallel.errors import MemoryLimitError
from autoparallel.mesh import Mesh
from autoparallel.parallel.stage_module import StageModule
from autoparallel.plan import Plan
from autoparallel.rewrite.stages import cut_plan
from autoparallel.runtime.schedule_orders import schedule_order
from autoparallel.support.torch_private import StorageWeakRef, TorchDispatchMode

MICROBATCHES = 4
SCHEDULES: dict[str, dict[str, Any]] = {
    "gpipe": {"schedule": "gpipe"},
    "1f1b": {"schedule": "1f1b"},
    "1f1b, two stages on each": {"schedule": "1f1b", "stages_per_rank": 2},
    "gpipe, recomputed": {"schedule": "gpipe", "recompute": "full"},
}


class Loss(nn.Module):
    """A model that returns its loss alone."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Language(4)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.model(tokens, labels)["loss"]
        return loss


def plain() -> nn.Module:
    torch.manual_seed(8)
    return Loss().double()


def batch() -> dict[str, torch.Tensor]:
    rows = batch_of("Language")
    return {name: torch.cat([value, value])[:8] for name, value in rows.items()}


@cache
def planned(name: str) -> Plan:
    return autoparallel.make_plan(
        plain(),
        mesh=Mesh(pp=2),
        example_inputs=batch(),
        microbatches=MICROBATCHES,
        **SCHEDULES[name],
    )


def plan_all() -> None:
    with traced_once():
        for name in SCHEDULES:
            planned(name)


class Alive(TorchDispatchMode):
    """Knows the storages that were made under it, and how many bytes of them are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_key(each) for each in _tensors((args, kwargs))}
        for each in _tensors(result):
            if _key(each) not in given:
                storage = each.untyped_storage()
                self.storages[_key(each)] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def nbytes(self, without: set[int]) -> int:
        alive = [(key, size) for key, (ref, size) in self.storages.items() if not ref.expired()]
        return sum(size for key, size in alive if key not in without)


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [
        leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)
    ]


def measure(rank: int) -> dict[str, int]:
    """Train a step with each schedule; return the most bytes that are alive after a pass."""
    return {name: most_alive(name) for name in SCHEDULES}


def most_alive(name: str) -> int:
    model = autoparallel.apply_plan(plain(), planned(name))
    model.step(**batch())  # buffers of what is sent are made in the first step
    forward, operation = StageModule.forward, dist.P2POp
    inputs, alive = batch(), Alive()
    seen: list[int] = []
    modules: list[StageModule] = []
    passed: set[int] = set()

    class Noted(operation):  # type: ignore[misc, valid-type]
        """A send or receive that says which memory it uses.

        Buffers for what is received are made before the first step up to torch 2.13, and for each
        step in torch 2.15.
        """

        def __init__(self, op: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            super().__init__(op, tensor, *args, **kwargs)
            passed.add(_key(tensor))

    def noting(self: StageModule, *args: Any, **kwargs: Any) -> Any:
        result = forward(self, *args, **kwargs)
        if self not in modules:
            modules.append(self)
        # Gradients of weights are counted apart, and so is what follows from the inputs alone.
        grads = {_key(w.grad) for m in modules for w in m.weights if w.grad is not None}
        apart = {_key(each) for each in (*_tensors(result), *self.known)}
        seen.append(alive.nbytes(grads | passed | apart))
        return result

    with pytest.MonkeyPatch.context() as patch, alive:
        patch.setattr(StageModule, "forward", noting)
        patch.setattr(dist, "P2POp", Noted)
        model.step(**inputs)
    return max(seen)


def test_activations_are_those_alive() -> None:
    """Of every schedule, on each rank, within 5 %; and 1F1B holds less than GPipe."""
    measured = run_processes(measure, 2, before=plan_all)
    for name in SCHEDULES:
        plan = planned(name)
        assert plan.captured is not None
        assert plan.pipeline is not None
        each = memory_of_stages(cut_plan(plan.captured.graph, plan))
        options = SCHEDULES[name]
        order = schedule_order(
            options["schedule"], 2, options.get("stages_per_rank", 1), MICROBATCHES
        )
        # Memory of what is sent and received is not counted.
        own = [stage.activations - stage.kept - stage.sent for stage in each]
        for rank, moment in enumerate(held(order, own)):
            assert measured[rank][name] == pytest.approx(moment.nbytes, rel=0.05), (name, rank)
        assert plan.pipeline.in_flight == most_held(order)
        assert sum(size for _, size in plan.memory) == max(plan.pipeline.memory)
    for rank in range(2):
        assert measured[rank]["1f1b"] < measured[rank]["gpipe"]
    first = [planned(name) for name in ("1f1b", "gpipe")]
    assert max(first[0].pipeline.memory) < max(first[1].pipeline.memory)  # type: ignore[union-attr]


def test_stages_fit_in_a_limit() -> None:
    """And what does not fit is told by the stage, with what it would take."""
    roomy = planned("gpipe")
    assert roomy.pipeline is not None
    limit = int(0.8 * max(roomy.pipeline.memory))
    options: dict[str, Any] = {"mesh": Mesh(pp=2), "example_inputs": batch(), "schedule": "gpipe"}
    tight = autoparallel.make_plan(plain(), memory_limit=limit, microbatches=4, **options)
    assert tight.pipeline is not None
    assert max(tight.pipeline.memory) <= limit
    assert tight.recompute
    with pytest.raises(MemoryLimitError, match=r"stage [01] of 2, with 4 micro-batches in flight"):
        autoparallel.make_plan(plain(), memory_limit="4KiB", microbatches=4, **options)
