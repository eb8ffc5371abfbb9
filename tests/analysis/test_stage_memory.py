"""The memory of stages, as it is predicted, against the bytes that are alive on running ranks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from broad_cases import broad
from pipeline_models import Language, batch_of
from processes import run_processes
from torch import nn
from traces import traced_once

import autoparallel
from autoparallel.analysis import stage_memory
from autoparallel.analysis.pipeline_walk import most_held
from autoparallel.analysis.stage_memory import memory_of_pipeline
from autoparallel.errors import MemoryLimitError
from autoparallel.mesh import Mesh
from autoparallel.parallel.stage_module import StageModule
from autoparallel.plan import Plan
from autoparallel.runtime.schedule_orders import schedule_order
from autoparallel.support.torch_private import StorageWeakRef, TorchDispatchMode

MICROBATCHES = 4
# Stages of one rank; of two that split the batch, and add up gradients; and that split tensors.
MESHES: dict[str, dict[str, Any]] = {
    "alone": {"mesh": Mesh(pp=2)},
    "batch": {"mesh": Mesh(pp=2, dp=2)},
    "tensors": {"mesh": Mesh(pp=2, tp=2), "data_parallel": False},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "gpipe": {"schedule": "gpipe"},
    "1f1b": {"schedule": "1f1b"},
    "1f1b, two stages on each": {"schedule": "1f1b", "stages_per_rank": 2},
    "gpipe, two stages on each": {"schedule": "gpipe", "stages_per_rank": 2},
    "zero bubble": {"schedule": "zero_bubble"},
    "zero bubble, a V": {"schedule": "zbv"},
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
def planned(name: str, mesh: str = "alone") -> Plan:
    return autoparallel.make_plan(
        plain(),
        example_inputs=batch(),
        microbatches=MICROBATCHES,
        **SCHEDULES[name],
        **MESHES[mesh],
    )


def plan_all(names: Sequence[str], meshes: Sequence[str]) -> None:
    with traced_once():
        for name, mesh in product(names, meshes):
            planned(name, mesh)


class Alive(TorchDispatchMode):
    """Knows the storages that were made under it, and the most bytes of them that were alive.

    modules: of the stages. gradients: the bytes of gradients of weights, which are counted apart,
    and so is what follows from the inputs alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[Any, int]] = {}
        self.modules: list[StageModule] = []
        self.most = self.gradients = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_key(each) for each in _tensors((args, kwargs))}
        for each in _tensors(result):
            if _key(each) not in given and each.device.type != "meta":
                storage = each.untyped_storage()
                self.storages[_key(each)] = (StorageWeakRef(storage), storage.nbytes())
        self.most = max(self.most, self.nbytes())
        return result

    def nbytes(self) -> int:
        """Return the bytes that are alive."""
        apart = {_key(w.grad) for each in self.modules for w in each.weights if w.grad is not None}
        apart |= {_key(grad) for each in self.modules for grad in each.settled.values()}
        known = {_key(known) for each in self.modules for known in each.known}
        alive = {key: size for key, (ref, size) in self.storages.items() if not ref.expired()}
        held = sum(alive[key] for key in apart & alive.keys())
        if held:
            weights = [
                weight.nbytes
                for each in self.modules
                for place, weight in enumerate(each.weights)
                if weight.grad is not None or place in each.settled
            ]
            self.gradients = max(self.gradients, sum(weights))
        # When all have gone back, they are on their way to the parameters.
        gradients = held or self.gradients
        return sum(size for key, size in alive.items() if key not in known) - gradients


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [
        leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)
    ]


def measure(
    rank: int, names: Sequence[str], meshes: Sequence[str]
) -> dict[tuple[str, str], tuple[int, int]]:
    """Train a step with each of some schedules on each mesh.

    Return the most bytes that are alive in it, and those that are left of it.
    """
    return {case: most_alive(*case) for case in product(names, meshes)}


def most_alive(name: str, mesh: str) -> tuple[int, int]:
    model = autoparallel.apply_plan(plain(), planned(name, mesh))
    begin, inputs, alive = StageModule.begin, batch(), Alive()

    def noting(self: StageModule, *args: Any) -> None:
        begin(self, *args)
        if self not in alive.modules:
            alive.modules.append(self)

    with pytest.MonkeyPatch.context() as patch, alive:
        patch.setattr(StageModule, "begin", noting)
        model.step(**inputs)
    grads = sum(
        parameter.grad.to_local().nbytes
        for parameter in model.parameters()
        if parameter.grad is not None
    )
    return alive.most, alive.nbytes() + alive.gradients - grads


# One of each kind: all micro-batches in flight, few, stages in a V, and blocks that run again.
SOME = ("gpipe", "1f1b", "zero bubble, a V", "gpipe, recomputed")


@pytest.mark.parametrize(
    ("names", "meshes"),
    [(SOME, ("alone",)), *broad((SCHEDULES, ("alone",)), (SCHEDULES, ("batch", "tensors")))],
    ids=["some", "all", "all-batch-tensors"],
)
def test_activations_are_those_alive(names: Sequence[str], meshes: tuple[str, ...]) -> None:
    """With what is received and sent, what comes and goes in a pass, and what gradients are reduced
    in: of each schedule, on each rank, within 5 %; and 1F1B holds less than GPipe. Nothing of a
    step is left after it.
    """
    world_size = MESHES[meshes[0]]["mesh"].world_size
    names = tuple(names)
    measured = run_processes(
        measure, world_size, names, meshes, before=functools.partial(plan_all, names, meshes)
    )
    for rank, case in product(range(world_size), product(names, meshes)):
        plan, (most, left) = planned(*case), measured[rank][case]
        assert plan.pipeline is not None
        account = memory_of_pipeline(plan)[rank * plan.pipeline.ranks // world_size]
        told = account.activations + account.temporary
        assert most == pytest.approx(told, rel=0.05), (case, rank)
        assert left < 100, (case, rank)
    for name in names:
        pipeline = planned(name, meshes[0]).pipeline
        assert pipeline is not None
        order = schedule_order(pipeline.schedule, 2, pipeline.stages // 2, MICROBATCHES)
        assert pipeline.in_flight == most_held(order)
        memory = planned(name, meshes[0]).memory
        assert sum(size for _, size in memory) == max(pipeline.memory)
    for rank in range(2):
        assert measured[rank]["1f1b", meshes[0]] < measured[rank]["gpipe", meshes[0]]
    first = [planned(name, meshes[0]) for name in ("1f1b", "gpipe")]
    assert max(first[0].pipeline.memory) < max(first[1].pipeline.memory)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["gpipe, recomputed", "zero bubble, a V"])
def test_what_has_arrived_is_let_go_of(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Since torch 2.15, by schedules that go by no table: what a stage has sent is then there until
    the last forward pass, and no longer until the last backward pass.
    """
    most = []
    for keeps in (True, False):
        monkeypatch.setattr(stage_memory, "KEEPS_WHAT_IS_SENT", keeps)
        most.append([account.total for account in memory_of_pipeline(planned(name))])
    (first, last), (sooner, same) = most
    assert last == same
    # One micro-batch of hidden states goes from each rank to the next one in each pass.
    assert (sooner < first) == name.startswith("gpipe")


def test_what_a_rank_hands_on_to_itself_is_there_once() -> None:
    """Where a V turns, the next stage reads it where the first one keeps it."""
    first, last = memory_of_pipeline(planned("zero bubble, a V"))
    assert "stage 2" not in {item.where for item in last.items}
    # It comes from another rank here, and there.
    assert "stage 1" in {item.where for item in last.items}
    assert "stage 3" in {item.where for item in first.items}


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
