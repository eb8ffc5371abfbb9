"""Groups of threads that note when collectives begin and are waited for; products are noted too."""

from typing import Any

import torch

from autoparallel.runtime.groups import LocalGroup, Result
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


class NotedProducts(TorchDispatchMode):
    """Notes products of matrices, by the shapes of their results."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__()
        self.notes = notes

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if "mm" in str(function):
            self.notes.append(str(tuple(result.shape)))
        return result
