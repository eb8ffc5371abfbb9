"""Counts the collectives that really run, whoever starts them: by hand, DTensor or emitted code."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from autoparallel.support.torch_private import TorchDispatchMode, schema_of

__all__ = ["CollectiveCounter", "CollectiveEvent"]

# Operators of torch.distributed (c10d) and of its functional form, as of torch 2.13, and the kind
# that each one is.
_KINDS = {
    "c10d::allreduce_": "all_reduce",
    "c10d::allreduce_coalesced_": "all_reduce",
    "c10d::allgather_": "all_gather",
    "c10d::_allgather_base_": "all_gather",
    "c10d::allgather_coalesced_": "all_gather",
    "c10d::allgather_into_tensor_coalesced_": "all_gather",
    "c10d::reduce_scatter_": "reduce_scatter",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "c10d::alltoall_": "all_to_all",
    "c10d::alltoall_base_": "all_to_all",
    "c10d::broadcast_": "broadcast",
    "c10d::reduce_": "reduce",
    "c10d::gather_": "gather",
    "c10d::gather_into_tensor_": "gather",
    "c10d::scatter_": "scatter",
    "c10d::send": "send",
    "_c10d_functional::all_reduce": "all_reduce",
    "_c10d_functional::all_reduce_": "all_reduce",
    "_c10d_functional::all_reduce_coalesced": "all_reduce",
    "_c10d_functional::all_reduce_coalesced_": "all_reduce",
    "_c10d_functional::all_gather_into_tensor": "all_gather",
    "_c10d_functional::all_gather_into_tensor_out": "all_gather",
    "_c10d_functional::all_gather_into_tensor_coalesced": "all_gather",
    "_c10d_functional::reduce_scatter_tensor": "reduce_scatter",
    "_c10d_functional::reduce_scatter_tensor_out": "reduce_scatter",
    "_c10d_functional::reduce_scatter_tensor_coalesced": "reduce_scatter",
    "_c10d_functional::all_to_all_single": "all_to_all",
    "_c10d_functional::broadcast": "broadcast",
    "_c10d_functional::broadcast_": "broadcast",
    "_c10d_functional::isend": "send",
}

# Operators of the same two libraries that do not count: they move nothing of the program, or are
# the other end of a send.
_NOT_COUNTED = frozenset(
    {
        "c10d::barrier",
        "c10d::monitored_barrier_",
        "c10d::check_for_nan",
        "c10d::recv_",
        "c10d::recv_any_source_",
        "_c10d_functional::irecv",
        "_c10d_functional::wait_tensor",
        "_c10d_functional::wait_tensors",
        "_c10d_functional::_wrap_tensor_autograd",
    }
)


class CollectiveEvent(NamedTuple):
    """One collective that ran on this rank.

    kind: "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "reduce",
    "gather", "scatter" or "send". numel: elements of the whole tensor. shape: its shape, or
    (numel,) where one call moves several tensors.

    The whole tensor is the larger of what goes in and what comes out: the gathered one of an
    all-gather, the one before a reduce-scatter. What a ring sends is proportional to it.
    """

    kind: str
    numel: int
    shape: tuple[int, ...]


class CollectiveCounter(TorchDispatchMode):
    """A context that counts this rank's collectives while it is entered, in forward and in
    backward.

    counts: number of calls by kind. nbytes_by_kind: bytes of the whole tensors by kind (see
    CollectiveEvent). events: every call in order. A coalesced call is one call. Calls that DTensor
    makes inside an operator count as well.
    Raises NotImplementedError at an operator of torch's c10d that is in neither table of this file,
    so that no collective is missed.

    Example:

        with CollectiveCounter() as counter:
            model(**batch).loss.backward()
        print(counter.counts, counter.nbytes)

    >>> with CollectiveCounter() as counter:
    ...     _ = torch.ones(2) + 1  # computes, and sends nothing
    >>> counter.calls, counter.nbytes
    (0, 0)
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.nbytes_by_kind: dict[str, int] = {}
        self.events: list[CollectiveEvent] = []

    @property
    def nbytes(self) -> int:
        """The bytes of the whole tensors of all calls."""
        return sum(self.nbytes_by_kind.values())

    @property
    def calls(self) -> int:
        """The number of all calls."""
        return len(self.events)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator of torch, and record it if it is a collective."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor takes the operator apart first; then it comes here
        result = func(*args, **(kwargs or {}))
        name = schema_of(func).name
        if name in _KINDS:
            self._record(_KINDS[name], args, result)
        elif func.namespace in ("c10d", "_c10d_functional") and name not in _NOT_COUNTED:
            raise NotImplementedError(f"a collective that the counter does not know: {name}")
        return result

    def _record(self, kind: str, args: tuple[Any, ...], result: Any) -> None:
        """Note one call, from its arguments and its result."""
        # Operators of c10d take their output as an argument or return it, and put it first or
        # second. Whatever the order, the side with the most elements is the whole tensor.
        sides = [_tensors(side) for side in (*args[:2], result)]
        whole = max(sides, key=lambda tensors: sum(tensor.numel() for tensor in tensors))
        numel = sum(tensor.numel() for tensor in whole)
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in whole)
        shape = tuple(whole[0].shape) if len(whole) == 1 else (numel,)
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.nbytes_by_kind[kind] = self.nbytes_by_kind.get(kind, 0) + nbytes
        self.events.append(CollectiveEvent(kind, numel, shape))


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors of an argument: the argument itself, or those in nested lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
