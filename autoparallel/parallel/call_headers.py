"""Before a call, the ranks exchange a header of a few numbers that tells how each was called.

Ranks that are called differently run other programs, whose collectives do not match: they would
hang, be ended by the library that communicates, or compute with parts of different batches. The
header is exchanged in every call, because the first calls do not tell of later ones. It is a
checksum for each input and one for everything else; where numbers lie on a GPU they are not read,
because that would wait for the device.

On NCCL the hosts exchange it in a group of their own, on gloo. After the first calls they do not
wait for it: the header of a call is looked at when the next one begins. A host runs ahead of its
GPU, so that it is told of ranks that differ also where these wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch

from autoparallel.errors import InputMismatchError
from autoparallel.parallel.host_group import host_group
from autoparallel.parallel.launch import communication_device
from autoparallel.runtime.faults import explained, is_lost
from autoparallel.runtime.groups import Group, ProcessGroup
from autoparallel.runtime.small_messages import gather_numbers
from autoparallel.support.pytree import Skeleton, flatten, leaf_paths
from autoparallel.support.torch_private import in_function_transform

__all__ = ["CallHeaders", "checksum"]

# Inputs that have a number of their own in the header; those after them share one.
_INPUTS = 10
# Elements of an input that are looked at: all of them, or every k-th, as other batches show.
_SAMPLE = 2048
_FACTS = (
    "the modes of modules (train() or eval())",
    "the sizes, types or number of the inputs, or the numbers and texts among them",
    "the parameters that are trained (requires_grad)",
    "whether gradients are recorded, or autocast is on",
    "the program that fits the call, or hooks for which it runs as Python",
)
_SIMPLE = (int, float, str, bool, complex, type(None))


def checksum(tensor: torch.Tensor) -> int:
    """Return a number that tells an input's values from others; 0 where they are not at hand.

    >>> checksum(torch.tensor([1.0, 2.0])) == checksum(torch.tensor([2.0, 1.0]))
    False
    """
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        return 0
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or not tensor.numel():
        return 0
    # Numbers that are only said to be conjugated, or negated, cannot be read byte by byte.
    flat = tensor.detach().resolve_conj().resolve_neg()
    # A slice along the first dim copies nothing of a tensor that is not contiguous.
    flat = flat.reshape(-1) if flat.is_contiguous() else flat[:64].reshape(-1)
    sampled = flat[:: max(1, flat.numel() // _SAMPLE)].contiguous()
    return crc32(sampled.view(torch.uint8).numpy().data)


@dataclass
class _Sent:
    """A header that is on its way. row: this rank's. rows: get those of all ranks when `work` is
    done. count, names: of the inputs.
    """

    row: list[int]
    rows: list[torch.Tensor]
    work: Any
    count: int
    names: Sequence[str]


class CallHeaders:
    """The ranks of one model compare a header at each call.

    group: all ranks. model: its class. awaited: in how many first calls a header is waited for on
    NCCL.
    """

    def __init__(self, group: Group, model: str, awaited: int = 1) -> None:
        self.model, self.awaited = model, awaited
        # On GPUs the numbers would wait for the work that is queued.
        self.on = isinstance(group, ProcessGroup) and communication_device() == "cpu"
        self.hosts: Any = None
        if isinstance(group, ProcessGroup) and not self.on:
            self.hosts = host_group(group)
        self.sent: _Sent | None = None
        self.group = group
        self.known: dict[Any, tuple[int, int]] = {}

    def compare(
        self,
        modes: tuple[bool, ...],
        inputs: Sequence[torch.Tensor],
        skeleton: Skeleton,
        parameters: Sequence[torch.Tensor],
        program: int,
        names: Sequence[str],
    ) -> None:
        """Exchange the header of a call. A collective call.

        modes: of all modules. inputs, skeleton: the tensors among the arguments, and the rest.
        parameters: of the model. program: the number of the one that fits, negative where there is
        none. names: the model's arguments. Raises InputMismatchError, on every rank, that says
        which ranks differ, and in what.
        """
        off = not self.on and self.hosts is None
        if off or torch.compiler.is_compiling() or in_function_transform():
            return
        # A skeleton holds the tensors of its call.
        key = (modes, str(skeleton), *[(each.shape, each.dtype) for each in inputs])
        if key not in self.known:
            if len(self.known) > 64:
                self.known.clear()
            self.known[key] = (_text_sum(modes), _text_sum(_form(inputs, skeleton)))
        sums = [checksum(tensor) for tensor in inputs]
        autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        trained = bytes([each.requires_grad for each in (*parameters, *inputs)])
        row = [
            *self.known[key],
            crc32(trained),
            2 * torch.is_grad_enabled() + autocast,
            program,
            *(sums[:_INPUTS] + [0] * (_INPUTS - len(sums))),
            _text_sum(sums[_INPUTS:]) if len(sums) > _INPUTS else 0,
        ]
        if self.hosts is not None:
            self._send(row, len(inputs), names)
            return
        rows = gather_numbers(self.group, row)
        if any(other != row for other in rows):
            self._refuse(rows, len(inputs), names)

    def compare_results(self, result: Any) -> None:
        """Compare what a call has returned that ran as Python, on all ranks. A collective call.

        Each rank computes it by itself, and must come to the same. Raises InputMismatchError, on
        every rank. Numbers on GPUs are not looked at.
        """
        if not self.on or torch.compiler.is_compiling() or in_function_transform():
            return
        tensors, _ = flatten(result)
        whole = [each for each in tensors if type(each) is torch.Tensor]
        row = [
            _text_sum([(tuple(each.shape), str(each.dtype)) for each in whole]),
            _text_sum([checksum(each) for each in whole]),
        ]
        rows = gather_numbers(self.group, row)
        ranks = [str(rank) for rank, other in enumerate(rows) if other != rows[0]]
        if ranks:
            which = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)} and rank 0 differ"
            raise InputMismatchError(
                "the ranks have computed different results in Python",
                where=f"rank {self.group.rank}, call of {self.model}: {which}",
                why="a module that stays Python runs on every rank by itself. What it asks of a "
                "clock, the system, a file or the process is not the same on all of them",
                fix="draw numbers by torch or numpy; ask once, and send the answer to all ranks "
                "(torch.distributed.broadcast), or pass it as an argument",
            )

    def _send(self, row: list[int], count: int, names: Sequence[str]) -> None:
        """Look at the header of the call before, and send that of this one to the other hosts."""
        self._settle()
        mine = torch.tensor(row)
        rows = [torch.empty_like(mine) for _ in range(self.group.world_size)]
        work = self.hosts.allgather([rows], [mine])
        self.sent = _Sent(row, rows, work, count, names)
        if self.awaited > 0:
            self.awaited -= 1
            self._settle()

    def _settle(self) -> None:
        """Raise InputMismatchError, on every rank, where the headers that were sent differ."""
        sent, self.sent = self.sent, None
        if sent is None:
            return
        try:
            sent.work.wait()
        except RuntimeError as error:
            if not is_lost(error):
                raise
            raise explained(
                error, "all_gather", getattr(self.group, "process_group", None)
            ) from error
        rows = [each.tolist() for each in sent.rows]
        if any(other != sent.row for other in rows):
            self._refuse(rows, sent.count, sent.names)

    def _refuse(self, rows: list[list[int]], count: int, names: Sequence[str]) -> None:
        """Raise InputMismatchError. rows: the headers of all ranks."""
        columns = [
            index for index, values in enumerate(zip(*rows, strict=True)) if len(set(values)) > 1
        ]
        ranks = [str(rank) for rank, row in enumerate(rows) if row != rows[0]]
        which = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)} and rank 0 differ"
        where = f"rank {self.group.rank}, call of {self.model}: {which}"
        facts = [_FACTS[index] for index in columns if index < len(_FACTS)]
        if facts:
            # The program differs because of what stands before it, if anything does.
            raise InputMismatchError(
                f"the ranks have called the model differently: {facts[0]}",
                where=where,
                why="each rank would run another program, whose collectives do not match",
                fix="call the model alike on all ranks: in the same mode, with the same batch, "
                "attributes, hooks and frozen parameters",
            )
        shown = [
            names[index] if len(names) == count else f"input {index}"
            for index in (column - len(_FACTS) for column in columns)
            if index < _INPUTS
        ]
        raise InputMismatchError(
            f"the ranks were given different inputs: {', '.join(shown) or 'one of many'}",
            where=where,
            why="all ranks of a tensor-parallel group work on one batch; the plan says that "
            "inputs are equal",
            fix="give every rank the same batch (seed the sampler alike), or switch the check "
            "off with check_inputs=0 where differences are meant",
        )


def _form(inputs: Sequence[torch.Tensor], skeleton: Skeleton) -> Any:
    """Return the sizes and types of inputs, and the simple values among the arguments."""
    constants: Mapping[str, Any] = leaf_paths(skeleton, "constant")
    tensors = [(tuple(each.shape), str(each.dtype)) for each in inputs]
    return tensors, [
        (path, value) for path, value in constants.items() if isinstance(value, _SIMPLE)
    ]


def _text_sum(value: Any) -> int:
    """Return a number for a value that has the same text on all ranks."""
    return crc32(repr(value).encode())
