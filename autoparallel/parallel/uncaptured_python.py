"""The user's own Python on a split model: parameters look whole.

What cannot be traced runs as it is, alike on all ranks: they compute the same from the same whole
parameters and the same random numbers, so that their values and gradients are equal.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from autoparallel.errors import AutoParallelError
from autoparallel.parallel.gradient_bucket import GradientBucket
from autoparallel.parallel.parameters import (
    GatheredCopy,
    LocalParameter,
    ParameterLayouts,
    computing_stream,
    refresh,
)
from autoparallel.parallel.refused_functions import asking_module, refuse_version
from autoparallel.parallel.shown_parameters import ShownParameters, held_by
from autoparallel.placement import (
    Invariant,
    Layout,
    Shard,
    layout_gradient,
    local_layout_size,
    whole_layout,
)
from autoparallel.runtime.collectives import convert
from autoparallel.runtime.joint_moves import bucket_nbytes, gathered
from autoparallel.runtime.ranks import Ranks
from autoparallel.runtime.tensor_parts import take_layout_part
from autoparallel.support.memory_writes import Watch, memory_of
from autoparallel.support.module_copy import referring
from autoparallel.support.module_paths import join_path
from autoparallel.support.torch_private import local_part, outside_transforms

__all__ = ["WholeParameters"]

# Attributes that every nn.Module has; all others are the user's.
_INTERNAL = frozenset(vars(nn.Module()))


class _Mentioned(dict[int, Any]):
    """A table of twins that has none, but remembers which tensors it was asked for.

    `referring` asks such a table for every tensor to which a value refers; with this one it finds
    out which parameters an attribute mentions. originals: the parameters' paths by their ids.
    """

    def __init__(self, originals: Mapping[int, str]) -> None:
        super().__init__()
        self.originals = originals
        self.paths: dict[int, str] = {}

    def __contains__(self, number: object) -> bool:
        if number in self.originals:
            assert isinstance(number, int)
            self.paths[number] = self.originals[number]
        return False


@dataclass(frozen=True)
class _Seen:
    """The memory of a whole value that Python was shown.

    leaf: the parameter. value: a weak reference to the tensor that was shown. alive: tells whether
    the memory is still in use, because its address may be used again. shape, stride, offset, dtype:
    where in the memory the value lies, to read it when the tensor itself is gone.
    """

    leaf: LocalParameter
    value: Any
    alive: StorageWeakRef
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def whole(self, memory: torch.UntypedStorage) -> torch.Tensor:
        """Return the whole value as its memory holds it now."""
        tensor = torch.empty(0, dtype=self.dtype, device=memory.device)
        return tensor.set_(memory, self.offset, self.shape, self.stride)


class WholeParameters(Watch):
    """The parameters of a module tree, shown whole while the user's Python runs.

    A split parameter is gathered where it is read, and its gradient is cut; one that is whole
    gives its local leaf. Gradients are the same on all ranks, as all of them run the same Python.
    What Python writes to a whole value, every rank writes to its own part at once, so that parts
    that are split compute with it, optimizers see it, and the next read gives it.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, ParameterLayouts],
        ranks: Ranks,
        originals: Mapping[int, str],
        copies: Mapping[int, GatheredCopy],
        overlap: bool,
    ) -> None:
        """Note every parameter of the tree, and every attribute that refers to one.

        parameters: the parameters' layouts, by path. originals: paths of the user's parameters by
        id, to which attributes may refer still. copies: the gathered copies that compute in place
        of parameters, by the parameters' ids. overlap: gradients are reduced while the backward
        pass goes on, not when it ends.
        """
        self.module, self.ranks, self.originals = module, ranks, originals
        self.overlap = overlap
        # What attributes refer to in truth, while they refer to whole values.
        self.hidden: list[tuple[nn.Module, str, Any, Any]] = []
        self.readers: dict[tuple[int, str], LocalParameter] = {}
        self.seen: dict[int, _Seen] = {}
        self.handles: dict[int, tuple[_Seen, torch.UntypedStorage]] = {}
        # Whole gradients that Python was shown, with their versions.
        self.gradients: list[tuple[LocalParameter, torch.Tensor, int]] = []
        self.keeping = False
        sizes = {id(p): p.numel() * p.element_size() for p in module.parameters()}
        at_once = bucket_nbytes(sum(sizes.values())) if overlap else None
        self.bucket = bucket = GradientBucket(ranks, at_once)
        self.references: list[tuple[nn.Module, str, Any, dict[int, str]]] = []
        leaves: dict[int, LocalParameter] = {}
        for path, inner in module.named_modules():
            held = held_by(inner)
            for name, parameter in held.items():
                if parameter is not None:
                    full = join_path(path, name)
                    if id(parameter) not in leaves:
                        layouts = parameters[full]
                        back = layout_gradient(layouts.storage)
                        copy = copies.get(id(parameter))
                        leaves[id(parameter)] = LocalParameter(
                            held, name, full, layouts, back, bucket, copy
                        )
                    self.readers[id(held), name] = leaves[id(parameter)]
            for name, value in vars(inner).items():
                if name not in _INTERNAL:
                    mentioned = _Mentioned(originals)
                    referring(value, mentioned)
                    if mentioned.paths:
                        self.references.append((inner, name, value, mentioned.paths))

    def read(self, held: dict[str, Any], name: str) -> Any:
        """Return the whole value of one parameter, through which gradients flow to its part.

        held, name: the dictionary, and the key, where it is.
        """
        parameter = held[name]
        if parameter is None or (id(held), name) not in self.readers:
            return parameter
        leaf = self.readers[id(held), name]
        self.settle(leaf)
        # The parameter is a constant for torch.func, as that of a plain module is.
        with outside_transforms():
            if leaf.copy is not None:
                refresh([leaf.copy], self.ranks)
            value, layout = leaf.get(computing_stream()), leaf.layouts.storage
            # Outer axes cut first, so the innermost axis is gathered first; what the axes outside
            # of it leave of the dim is how large the gathered dim becomes.
            for axis in reversed(range(len(layout))):
                cut = layout[axis]
                if isinstance(cut, Shard):
                    outer: Layout = (*layout[:axis], *(Invariant(),) * (len(layout) - axis))
                    size = leaf.layouts.shape[cut.dim]
                    size = local_layout_size(
                        size, cut.dim, outer, self.ranks.sizes, self.ranks.coordinates
                    )
                    value = convert(value, self.ranks.groups[axis], cut, Invariant(), size)
        if value is not parameter:
            # Whatever is set on the one is set on the other.
            value.__dict__ = vars(parameter)
            if type(value) is torch.Tensor:
                value.__class__ = nn.Parameter
            self.note(leaf, value)
        return value

    def note(self, leaf: LocalParameter, value: torch.Tensor) -> None:
        """Watch the memory of a value that Python is shown, for what is written to it."""
        memory = memory_of(value)
        if memory is None:
            return
        # Memory that was freed may be used again, for something that is no parameter.
        self.seen = {key: seen for key, seen in self.seen.items() if not seen.alive.expired()}
        self.seen[memory] = _Seen(
            leaf,
            weakref.ref(value),
            StorageWeakRef(value.untyped_storage()),
            tuple(value.shape),
            value.stride(),
            int(value.storage_offset()),
            value.dtype,
        )

    def of(self, tensor: torch.Tensor) -> _Seen | None:
        """Return the whole value in whose memory a tensor lies, None where there is none."""
        return self.seen.get(memory_of(tensor) or 0) if self.seen else None

    def before(self, tensor: torch.Tensor, operator: str) -> None:
        """Refuse an op, before it runs, that gives a shown value other memory or another size.

        The size of a parameter is planned, and its part shares memory with the optimizer's.
        """
        seen = self.of(tensor)
        if seen is not None and operator.startswith(_MOVING):
            raise _refused(seen.leaf, f"{operator} gives it other memory")

    def after(self, tensor: torch.Tensor) -> None:
        """Keep this rank's part of what an op has written to a tensor; every rank does so."""
        seen = None if self.keeping else self.of(tensor)
        if seen is not None:
            self.keep(seen, tensor.untyped_storage())

    def keep(self, seen: _Seen, memory: torch.UntypedStorage) -> None:
        """Write the rank's part of a whole value to the parameter.

        The value is also written to all other tensors that show the same parameter.
        """
        leaf, self.keeping = seen.leaf, True
        with torch.inference_mode(False), torch.no_grad():
            whole = seen.whole(memory)
            held = leaf.held
            if memory_of(held) != memory_of(whole):
                sizes, coordinates = self.ranks.sizes, self.ranks.coordinates
                part = take_layout_part(whole, leaf.layouts.state, sizes, coordinates)
                # As writing to .data, which autograd takes for no change of what it has kept: the
                # whole value was written to, and torch looks after that.
                held.data.copy_(part)
            if leaf.copy is not None:
                leaf.copy.forget()
            for other in list(self.seen.values()):
                value = other.value()
                if other is not seen and other.leaf is leaf and value is not None:
                    value.data.copy_(whole)
        self.keeping = False

    def handed_out(self, tensor: torch.Tensor) -> None:
        """Note that Python has the address of a tensor's memory, and may write to it unseen.

        It has where numpy or data_ptr() is called: no op tells of what is then written.
        """
        seen = None if self.keeping else self.of(tensor)
        if seen is not None:
            self.handles[memory_of(tensor) or 0] = (seen, tensor.untyped_storage())

    def settle(self, only: LocalParameter | None = None) -> None:
        """Keep what was written unseen, to one parameter or, by default, to all.

        It is looked for by comparing numbers, and only in memory that was handed out.
        """
        handles = [seen for seen in self.handles.values() if only in (None, seen[0].leaf)]
        for seen, memory in handles:
            whole = seen.whole(memory)
            sizes, coordinates = self.ranks.sizes, self.ranks.coordinates
            part = take_layout_part(whole, seen.leaf.layouts.state, sizes, coordinates)
            if not torch.equal(part, seen.leaf.held):
                self.keep(seen, memory)

    def assigned(self, tensor: torch.Tensor, value: Any) -> bool:
        """Write the value where Python sets `parameter.data`; the parameter keeps its memory.

        Return whether the tensor is a shown parameter. Raises AutoParallelError for a value of
        another shape or type, and for one that lies in the memory of something that lasts.
        """
        seen = self.of(tensor)
        if seen is None or seen.value() is not tensor:
            return False
        if (tuple(value.shape), value.dtype) != (seen.shape, seen.dtype):
            raise _refused(seen.leaf, f"its data becomes {tuple(value.shape)} of {value.dtype}")
        if self.of(value) not in (None, seen) or memory_of(value) in self.lasting():
            raise _refused(
                seen.leaf, "its data becomes the memory of another parameter or a buffer"
            )
        with torch.no_grad():
            tensor.detach().copy_(value)  # `after` is told of this op, and keeps the part
        return True

    def lasting(self) -> set[int | None]:
        """Return the memory of all parameters and buffers that this rank holds."""
        held = {memory_of(leaf.held) for leaf in self.readers.values()}
        return held | {memory_of(buffer) for buffer in self.module.buffers()}

    def trained(self, tensor: torch.Tensor, value: bool) -> None:
        """Refuse another `requires_grad` of a shown parameter: programs are planned for it."""
        seen = self.of(tensor)
        if seen is None or seen.value() is not tensor:
            return
        if seen.leaf.owner[seen.leaf.name].requires_grad != value:
            raise _refused(seen.leaf, f"its requires_grad becomes {value}")

    def asked(self, tensor: torch.Tensor, name: str) -> Any:
        """Return what a property of a parameter is, where a tensor shows one: it is no leaf itself.

        The gradient is put together of all ranks' parts: all of them run the same Python.
        """
        seen = self.of(tensor)
        if seen is None or seen.value() is not tensor:
            return NotImplemented
        leaf = seen.leaf
        if name == "_version":
            refuse_version(asking_module(2), leaf.path)
            return NotImplemented
        held = leaf.owner[leaf.name]
        if name != "grad" or held.grad is None:
            return {"is_leaf": True, "retains_grad": False}.get(name)
        layouts = leaf.layouts
        whole = whole_layout(len(self.ranks.sizes))
        parts = [local_part(held.grad) if isinstance(held.grad, DTensor) else held.grad]
        (gradient,) = gathered(parts, [layouts.state], [whole], [layouts.shape], self.ranks)
        self.gradients.append((leaf, gradient, gradient._version))
        return gradient

    def gradient_assigned(self, tensor: torch.Tensor) -> None:
        """Refuse another gradient for a shown parameter: its part would not have it."""
        seen = self.of(tensor)
        if seen is not None and seen.value() is tensor:
            raise _refused(seen.leaf, "its gradient becomes another tensor")

    def refuse_other(self, held: dict[str, Any], name: str) -> None:
        """Raise AutoParallelError where a parameter that may be split would become another."""
        leaf = self.readers.get((id(held), name))
        if leaf is not None and self.ranks.world_size > 1:
            raise _refused(leaf, "it becomes another tensor")

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Have the parameters of all modules of the tree read as whole values, within.

        Attributes that refer to parameters refer to the whole values, too, unless Python has set
        them to something else in the meantime.
        """
        changed: list[nn.Module] = []
        replaced: list[tuple[nn.Module, str, Any, Any]] = []
        try:
            for inner in self.module.modules():
                if inner._parameters and not isinstance(inner._parameters, ShownParameters):
                    inner.__dict__["_parameters"] = ShownParameters(inner._parameters, self)
                    changed.append(inner)
            for inner, name, value, paths in self.references:
                vars(inner)[name] = referring(value, {n: self.at(p) for n, p in paths.items()})
                replaced.append((inner, name, value, vars(inner)[name]))
            self.hidden = replaced
            with self.installed():
                yield
            self.settle()
            for leaf, gradient, version in self.gradients:
                if gradient._version != version:
                    raise _refused(leaf, "its gradient is written to")
        finally:
            self.seen, self.handles, self.hidden, self.gradients = {}, {}, [], []
            for inner, name, value, now in replaced:
                if vars(inner).get(name) is now:
                    vars(inner)[name] = value
            for inner in changed:
                inner.__dict__["_parameters"] = held_by(inner)

    @contextlib.contextmanager
    def as_held(self) -> Iterator[None]:
        """Have the modules as they are outside of Python that is shown whole values, within."""
        shown = [
            inner
            for inner in self.module.modules()
            if isinstance(inner._parameters, ShownParameters)
        ]
        wholes = [inner._parameters for inner in shown]
        hidden = [row for row in self.hidden if vars(row[0]).get(row[1]) is row[3]]
        try:
            for inner in shown:
                inner.__dict__["_parameters"] = held_by(inner)
            for inner, name, value, _ in hidden:
                vars(inner)[name] = value
            yield
        finally:
            for inner, whole in zip(shown, wholes, strict=True):
                inner.__dict__["_parameters"] = whole
            for inner, name, _, now in hidden:
                vars(inner)[name] = now

    def at(self, path: str) -> Any:
        """Return the parameter at `path` as it is shown."""
        owner, _, name = path.rpartition(".")
        return self.module.get_submodule(owner)._parameters[name]


# The beginnings of ops that give a tensor other memory.
_MOVING = ("aten.set_.", "aten.resize_", "aten.set.", "aten.resize.")


def _refused(leaf: LocalParameter, why: str) -> AutoParallelError:
    """Return the error for a change of a parameter that its parts cannot follow."""
    return AutoParallelError(
        f"the forward changes parameter {leaf.path} in a way that a split one cannot follow",
        where=leaf.path,
        why=why,
        fix="write values in place (under torch.no_grad: parameter.copy_(value)), and change what "
        "else there is before the model is split; to call it with parameters that a gradient has "
        "changed, as in meta-learning, take that gradient by torch.func.grad, which is traced",
    )
