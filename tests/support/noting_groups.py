"""Groups of threads that note when collectives begin and are waited for; products are noted too."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from autoparallel.parallel.simulate import take_layout_part
from autoparallel.plan import Plan
from autoparallel.rewrite.emit import emit
from autoparallel.runtime.groups import LocalGroup, Result
from autoparallel.runtime.ranks import Ranks, run_ranks, thread_ranks
from autoparallel.support.torch_private import TorchDispatchMode


class NotingGroup(LocalGroup):
    """A group whose collectives that can be started and waited for apart are noted.

    group: whose place it takes. notes: the list to which it adds "start all_reduce" and the like.
    """

    def __init__(self, group: LocalGroup, notes: list[str]) -> None:
        super().__init__(group.meeting, group.rank, group.world_size)
        self.notes = notes

    def noted(self, name: str, wait: Result) -> Result:
        """Note the start now, and the wait when it is made."""
        self.notes.append(f"start {name}")

        def waited() -> torch.Tensor:
            self.notes.append(f"wait {name}")
            return wait()

        return waited

    def start_all_reduce(self, tensor: torch.Tensor) -> Result:
        return self.noted("all_reduce", super().start_all_reduce(tensor))

    def start_all_reduce_(self, tensor: torch.Tensor) -> Result:
        return self.noted("all_reduce", super().start_all_reduce_(tensor))

    def start_all_gather(self, tensor: torch.Tensor) -> Result:
        return self.noted("all_gather", super().start_all_gather(tensor))

    def start_reduce_scatter(self, tensor: torch.Tensor) -> Result:
        return self.noted("reduce_scatter", super().start_reduce_scatter(tensor))

    def all_to_all(
        self, sent: list[torch.Tensor], shapes: list[tuple[int, ...]]
    ) -> list[torch.Tensor]:
        """It is waited for at once, whoever begins it."""
        self.notes.append("start all_to_all")
        received = super().all_to_all(sent, shapes)
        self.notes.append("wait all_to_all")
        return received


class NotedOps(TorchDispatchMode):
    """Notes the names of all ops."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__()
        self.notes = notes

    def note(self, function: Any, result: Any) -> None:
        self.notes.append(str(function))

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self.note(function, result)
        return result


class NotedProducts(NotedOps):
    """Notes products of matrices, by the shapes of their results."""

    def note(self, function: Any, result: Any) -> None:
        if "mm" in str(function):
            self.notes.append(str(tuple(result.shape)))


def noted_pass(
    model: nn.Module, plan: Plan, inputs: Sequence[torch.Tensor], forward: bool
) -> list[list[str]]:
    """Return the notes of each rank of a plan on one axis: starts, waits and products of a pass.

    inputs: of the model, each rank's alike. forward: whether of the forward pass, or of the
    backward pass of the first output after it.
    """

    def work(rank: Any) -> list[str]:
        notes: list[str] = []
        noting = NotingGroup(rank.groups[0], notes)
        assert plan.captured is not None
        program = emit(plan.captured.graph, plan, Ranks(rank.names, (noting,), noting))
        weights = dict(model.named_parameters())
        sizes = tuple(size for _, size in plan.mesh.axes)
        leaves = [
            take_layout_part(weights[path].detach(), plan.storage[path], sizes, rank.coordinates)
            .clone()
            .requires_grad_()
            for path in program.parameters
        ]
        with NotedProducts(notes):
            outputs, _ = program.run(leaves, [], [], [*inputs], torch.device("cpu"))
        if not forward:
            notes.clear()
            with NotedProducts(notes):
                outputs[0].backward()
        return notes

    return run_ranks(thread_ranks(plan.mesh), work)
