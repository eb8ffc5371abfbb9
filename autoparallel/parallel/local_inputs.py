"""Each rank's own batch along a mesh axis: the batches of all ranks become the one of the call.

A data-parallel training script gives every rank another part of the data, by a DistributedSampler,
say. The program of a rank is made for the batch of all of them: its loss is the mean over all their
elements, and it reads its own part of the batch where the plan splits that.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autoparallel.capture.example_inputs import as_given
from autoparallel.errors import InputMismatchError, PlanError
from autoparallel.mesh import Mesh
from autoparallel.parallel.launch import communication_device
from autoparallel.runtime.groups import Group
from autoparallel.runtime.ranks import Ranks
from autoparallel.support.pytree import Skeleton, flatten, rebuild

__all__ = ["LocalInputs"]

# The types that every backend sends; others travel as bytes.
_SENT = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)


@dataclass(frozen=True)
class LocalInputs:
    """The inputs of which every rank along some mesh axes brings its own part of the batch.

    axes: by the name of an argument of forward, numbers of the mesh axes, outermost first. Under
    the name "" are those of all arguments that have no entry of their own. The batch is dim 0; a
    tensor without dims is the same on all ranks, as is all that is no tensor.
    """

    axes: Mapping[str, tuple[int, ...]]

    @staticmethod
    def of(requested: Any, mesh: Mesh | None) -> LocalInputs | None:
        """Return what the user asks for, None where every rank brings the whole batch.

        requested: the name of a mesh axis, several names, or a dict from arguments to either; None
        for the default. mesh: the one mesh that the ranks are on, None where it is still to be
        chosen. Raises PlanError for an axis that the mesh does not have.

        >>> LocalInputs.of({"labels": "dp"}, Mesh(dp=2, tp=4)).axes
        {'labels': (0,)}
        """
        if requested is None or requested == ():
            return None
        if mesh is None:
            raise PlanError(
                f"local_inputs={requested!r} on a mesh that is not chosen yet",
                why="which ranks bring batches of their own is said by the name of a mesh axis",
                fix='give the mesh: mesh=Mesh(dp=2, tp=4), local_inputs="dp"',
            )
        table = requested if isinstance(requested, Mapping) else {"": requested}
        return LocalInputs({str(name): _numbers(axes, mesh) for name, axes in table.items()})

    def gather(
        self,
        signature: inspect.Signature,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        ranks: Ranks,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a call with the batches of all ranks in place of this rank's.

        signature: of the user's forward. args, kwargs: as this rank calls it. The batches may be of
        different lengths, of none too, and are put together in the order of the ranks. A collective
        call. Gradients flow back to the rank that brought a row.
        Raises InputMismatchError, on every rank, where the ranks' arguments differ in more than the
        length and the numbers of their batches, and PlanError for an argument that forward lacks.
        """
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return args, dict(kwargs)  # what the forward does not take is told where it is called
        unknown = [name for name in self.axes if name and name not in signature.parameters]
        if unknown:
            raise PlanError(
                f"local_inputs names {unknown[0]!r}, which forward does not take",
                fix=f"name some of {', '.join(signature.parameters)}",
            )
        arguments = dict(bound.arguments)
        taken = {name: flatten(value) for name, value in arguments.items()}
        for axis in reversed(range(len(ranks.sizes))):
            names = [n for n in taken if axis in self.axes.get(n, self.axes.get("", ()))]
            if not names or ranks.sizes[axis] == 1:
                continue
            tensors = [tensor for name in names for tensor in taken[name][0]]
            kinds = " ".join(f"{name} {_kinds(taken[name][1])}" for name in names)
            wholes = iter(_gathered(tensors, kinds, ranks.groups[axis]))
            for name in names:
                own, skeleton = taken[name]
                taken[name] = [next(wholes) for _ in own], skeleton
        for name, (tensors, skeleton) in taken.items():
            arguments[name] = rebuild(skeleton, tensors)
        positional, named = as_given(signature, arguments, len(args))
        return tuple(positional), named


def _numbers(axes: Any, mesh: Mesh) -> tuple[int, ...]:
    """Return the numbers of the axes of a mesh that have these names, outermost first.

    axes: one name, or several. Raises PlanError for a name that no axis has.
    """
    wanted = (axes,) if isinstance(axes, str) else axes
    names = [name for name, _ in mesh.axes]
    strange = [a for a in wanted if a not in names] if isinstance(wanted, Sequence) else [wanted]
    if strange:
        raise PlanError(
            f"local_inputs names {strange[0]!r}, which is no axis of {mesh}",
            why="the ranks along that axis are to bring batches of their own",
            fix=f"name one of {', '.join(names)}",
        )
    return tuple(index for index, name in enumerate(names) if name in wanted)


def _kinds(skeleton: Skeleton) -> str:
    """Return the containers of a structure, without constants, which may be objects."""
    inside = ", ".join(
        f"{key}: {_kinds(child)}"
        for key, child in zip(skeleton.keys, skeleton.children, strict=True)
    )
    return f"{skeleton.kind}({inside})"


class _Rows(torch.autograd.Function):
    """The whole batch, of which this rank's rows are known to come from its own tensor."""

    @staticmethod
    def forward(
        ctx: Any, own: torch.Tensor, whole: torch.Tensor, lengths: list[int], group: Group
    ) -> torch.Tensor:
        """Return the whole. own: this rank's rows of it. lengths: of all ranks' rows."""
        ctx.lengths, ctx.group = lengths, group
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Return the rows of this rank: all ranks have the gradient of the whole."""
        return _OwnRows.apply(gradient, ctx.lengths, ctx.group), None, None, None


class _OwnRows(torch.autograd.Function):
    """This rank's rows of the whole batch; the whole of gradients of the gradient is gathered."""

    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, lengths: list[int], group: Group) -> torch.Tensor:
        """Return the rows. lengths: of all ranks' rows."""
        ctx.lengths, ctx.group = lengths, group
        return whole.split(lengths)[group.rank].clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Gather what every rank has for its own rows."""
        lengths, group = ctx.lengths, ctx.group
        filling = gradient.new_zeros((max(lengths) - len(gradient), *gradient.shape[1:]))
        rows = group.all_gather(torch.cat([gradient.detach(), filling]))
        parts = zip(rows, lengths, strict=True)
        whole = torch.cat([part[:length] for part, length in parts])
        return _Rows.apply(gradient, whole, lengths, group), None, None


def _gathered(own: list[torch.Tensor], kinds: str, group: Group) -> list[torch.Tensor]:
    """Return tensors in which the rows of all ranks of a group follow each other.

    own: this rank's. kinds: a text that is the same on all ranks where they are called alike. The
    lengths are exchanged first, as they may differ; then all tensors of one type travel together.
    Raises InputMismatchError, on every rank, where ranks are not called alike.
    """
    batched = [index for index, tensor in enumerate(own) if tensor.dim()]
    text = repr((kinds, [(tuple(t.shape[1:]), str(t.dtype), t.dim()) for t in own]))
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
    device = communication_device()
    heads = group.all_gather(torch.tensor([number, len(batched)], device=device)).tolist()
    if any(head != heads[0] for head in heads):
        here = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in own)
        raise InputMismatchError(
            "the ranks that bring batches of their own are called in different ways",
            where=f"rank {group.rank} was given {here or 'no tensor'}",
            why="their batches are put together along dim 0, so that all other sizes, the types "
            "and the arguments given must be the same",
            fix="pad every batch to the same sizes but for the first, and pass the same arguments",
        )
    if not batched:
        return own
    own_lengths = torch.tensor([len(own[index]) for index in batched], device=device)
    lengths: list[list[int]] = group.all_gather(own_lengths).tolist()
    result = list(own)
    for dtype in dict.fromkeys(own[index].dtype for index in batched):
        places = [(n, index) for n, index in enumerate(batched) if own[index].dtype == dtype]
        padded, sizes = [], []
        for n, index in places:
            tensor = own[index].detach()
            most = max(row[n] for row in lengths)
            filling = tensor.new_zeros((most - len(tensor), *tensor.shape[1:]))
            padded.append(torch.cat([tensor, filling]).reshape(-1))
            sizes.append((most, *tensor.shape[1:]))
        rows = group.all_gather(_plain(torch.cat(padded)))
        parts = [row.split([each.numel() for each in padded]) for row in _typed(rows, dtype)]
        for place, (n, index) in enumerate(places):
            pieces = [
                part[place].view(sizes[place])[: lengths[rank][n]]
                for rank, part in enumerate(parts)
            ]
            whole = torch.cat(pieces)
            if own[index].requires_grad:
                whole = _Rows.apply(own[index], whole, [row[n] for row in lengths], group)
            result[index] = whole
    return result


def _plain(flat: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor of one dim, where its type is not one that all backends send."""
    return flat if flat.dtype in _SENT else flat.view(torch.uint8)


def _typed(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return tensors of a type from what `_plain` has made of them."""
    return rows if rows.dtype == dtype else rows.view(dtype)
