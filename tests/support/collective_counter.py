"""Count the collectives that a running module issues."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operator of the c10d library, and which of its arguments is the tensor that is moved. For
# all_gather and reduce_scatter that is the whole tensor, not the part.
_OPERATORS = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "allgather_": ("all_gather", 0),
    "reduce_scatter_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "broadcast_": ("broadcast", 0),
}


class CollectiveCounter(TorchDispatchMode):
    """A CollectiveCounter mode has in `counts` the number of calls of each (collective, elements).

    Elements are those of the whole tensor.

    Raises NotImplementedError at a c10d operator that it does not know, so that none is missed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        arguments: tuple[Any, ...] = (),
        keywords: dict[str, Any] | None = None,
    ) -> Any:
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::")
            if name not in _OPERATORS:
                raise NotImplementedError(f"a collective that the counter does not know: {name}")
            collective, position = _OPERATORS[name]
            self.counts[collective, _elements(arguments[position])] += 1
        return function(*arguments, **(keywords or {}))


def _elements(value: Tensor | Sequence[Any]) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel()
    return sum(_elements(item) for item in value)
