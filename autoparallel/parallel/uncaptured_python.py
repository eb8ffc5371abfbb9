"""The user's own Python on a split model: parameters look whole, random numbers are common."""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from autoparallel.errors import AutoParallelError
from autoparallel.parallel.parameters import (
    GatheredCopy,
    GradientBucket,
    LocalParameter,
    ParameterLayouts,
    refresh,
)
from autoparallel.placement import Invariant, Layout, Shard, layout_gradient, local_layout_size
from autoparallel.runtime.collectives import convert
from autoparallel.runtime.ranks import Ranks
from autoparallel.runtime.rng import Generator
from autoparallel.runtime.tensor_parts import take_layout_part
from autoparallel.support.memory_writes import Watch, memory_of
from autoparallel.support.module_copy import referring
from autoparallel.support.rng_state import restore, seeded, snapshot

__all__ = ["WholeParameters", "common_numbers", "held_by"]

_INTERNAL = frozenset(vars(nn.Module()))


class _Shown(dict[str, Any]):
    """A module's parameters as its forward reads them: whole, plain tensors.

    held: the dict that it stands for.
    """

    def __init__(self, held: dict[str, Any], whole: WholeParameters) -> None:
        super().__init__(held)
        self.held, self.whole = held, whole

    def __getitem__(self, name: str) -> Any:
        return self.whole.read(self.held, name)

    def __setitem__(self, name: str, value: Any) -> None:
        self.whole.refuse_other(self.held, name)
        self.held[name] = value
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        self.whole.refuse_other(self.held, name)
        del self.held[name]
        super().__delitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self.whole.read(self.held, name) if name in self.held else default

    def items(self) -> Any:
        return [(name, self[name]) for name in self]

    def values(self) -> Any:
        return [self[name] for name in self]


class _Mentioned(dict[int, Any]):
    """Asked for the twins of parameters, it has none, but remembers which it was asked for."""

    def __init__(self, originals: Mapping[int, str]) -> None:
        super().__init__()
        self.originals = originals
        self.paths: dict[int, str] = {}

    def __contains__(self, number: object) -> bool:
        if number in self.originals:
            assert isinstance(number, int)
            self.paths[number] = self.originals[number]
        return False


def held_by(module: nn.Module) -> dict[str, Any]:
    """The module's own parameters as an optimizer sees them."""
    own: Any = module._parameters
    return own.held if isinstance(own, _Shown) else own


@dataclass(frozen=True)
class _Seen:
    """Memory of a whole value that Python was shown. alive: of that memory.

    value: the tensor that was shown, a weak reference.
    """

    leaf: LocalParameter
    value: Any
    alive: StorageWeakRef
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def whole(self, memory: torch.UntypedStorage) -> torch.Tensor:
        """All of the value as its memory holds it now."""
        made = torch.empty(0, dtype=self.dtype, device=memory.device)
        return made.set_(memory, self.offset, self.shape, self.stride)


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
        kept: Mapping[str, ParameterLayouts],
        ranks: Ranks,
        originals: Mapping[int, str],
        copies: Mapping[int, GatheredCopy],
    ) -> None:
        """originals: paths of the user's parameters by id, to which attributes may refer still.

        copies: what computes in place of parameters, by the parameters' ids.
        """
        self.module, self.ranks = module, ranks
        self.readers: dict[tuple[int, str], LocalParameter] = {}
        self.seen: dict[int, _Seen] = {}
        self.handles: dict[int, tuple[_Seen, torch.UntypedStorage]] = {}
        self.keeping = False
        bundle = GradientBucket(ranks)
        self.references: list[tuple[nn.Module, str, Any, dict[int, str]]] = []
        leaves: dict[int, LocalParameter] = {}
        for path, inner in module.named_modules():
            held = held_by(inner)
            for name, parameter in held.items():
                if parameter is not None:
                    full = f"{path}.{name}" if path else name
                    if id(parameter) not in leaves:
                        own = kept[full]
                        back = layout_gradient(own.storage)
                        copy = copies.get(id(parameter))
                        leaves[id(parameter)] = LocalParameter(
                            held, name, full, own, back, bundle, copy
                        )
                    self.readers[id(held), name] = leaves[id(parameter)]
            for name, value in vars(inner).items():
                if name not in _INTERNAL:
                    mentioned = _Mentioned(originals)
                    referring(value, mentioned)
                    if mentioned.paths:
                        self.references.append((inner, name, value, mentioned.paths))

    def read(self, held: dict[str, Any], name: str) -> Any:
        """The whole value of one parameter, for autograd too."""
        parameter = held[name]
        if parameter is None or (id(held), name) not in self.readers:
            return parameter
        leaf = self.readers[id(held), name]
        self.settle(leaf)
        if leaf.copy is not None:
            refresh([leaf.copy], self.ranks)
        value, layout = leaf.get(), leaf.kept.storage
        for axis in reversed(range(len(layout))):
            cut = layout[axis]
            if isinstance(cut, Shard):
                outer: Layout = (*layout[:axis], *(Invariant(),) * (len(layout) - axis))
                size = leaf.kept.shape[cut.dim]
                size = local_layout_size(
                    size, cut.dim, outer, self.ranks.sizes, self.ranks.coordinates
                )
                value = convert(value, self.ranks.groups[axis], cut, Invariant(), size)
        if value is not parameter:
            self.note(leaf, value)
        return value

    def note(self, leaf: LocalParameter, value: torch.Tensor) -> None:
        """Python is shown this value: look for what is written to its memory."""
        memory = memory_of(value)
        if memory is None:
            return
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
        """The whole value in whose memory a tensor lies."""
        return self.seen.get(memory_of(tensor) or 0) if self.seen else None

    def before(self, tensor: torch.Tensor, operator: str) -> None:
        """Memory stays what it is: its size is planned."""
        seen = self.of(tensor)
        if seen is not None and operator.startswith(_MOVING):
            raise _refused(seen.leaf, f"{operator} gives it other memory")

    def after(self, tensor: torch.Tensor) -> None:
        """Every rank keeps its part of what was written."""
        seen = None if self.keeping else self.of(tensor)
        if seen is not None:
            self.keep(seen, tensor.untyped_storage())

    def keep(self, seen: _Seen, memory: torch.UntypedStorage) -> None:
        """Write a whole value's part to the parameter, and the value to where else it is shown."""
        leaf, self.keeping = seen.leaf, True
        with torch.inference_mode(False), torch.no_grad():
            whole = seen.whole(memory)
            held = leaf.held
            if memory_of(held) != memory_of(whole):
                sizes, coordinates = self.ranks.sizes, self.ranks.coordinates
                part = take_layout_part(whole, leaf.kept.state, sizes, coordinates)
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
        """What has the memory's address may write to it unseen."""
        seen = None if self.keeping else self.of(tensor)
        if seen is not None:
            self.handles[memory_of(tensor) or 0] = (seen, tensor.untyped_storage())

    def settle(self, only: LocalParameter | None = None) -> None:
        """Keep what was written unseen: to one parameter, or to all."""
        handles = [seen for seen in self.handles.values() if only in (None, seen[0].leaf)]
        for seen, memory in handles:
            whole = seen.whole(memory)
            sizes, coordinates = self.ranks.sizes, self.ranks.coordinates
            part = take_layout_part(whole, seen.leaf.kept.state, sizes, coordinates)
            if not torch.equal(part, seen.leaf.held):
                self.keep(seen, memory)

    def assigned(self, tensor: torch.Tensor, value: Any) -> bool:
        """`parameter.data = value` writes the value: the split parameter keeps its memory."""
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
            tensor.detach().copy_(value)  # which is reported
        return True

    def lasting(self) -> set[int | None]:
        """The memory of all parameters and buffers that ranks hold."""
        held = {memory_of(leaf.held) for leaf in self.readers.values()}
        return held | {memory_of(buffer) for buffer in self.module.buffers()}

    def trained(self, tensor: torch.Tensor, value: bool) -> None:
        seen = self.of(tensor)
        if seen is None or seen.value() is not tensor:
            return
        if seen.leaf.owner[seen.leaf.name].requires_grad != value:
            raise _refused(seen.leaf, f"its requires_grad becomes {value}")

    def refuse_other(self, held: dict[str, Any], name: str) -> None:
        """Raises AutoParallelError where a parameter that may be split would become another."""
        leaf = self.readers.get((id(held), name))
        if leaf is not None and self.ranks.world_size > 1:
            raise _refused(leaf, "it becomes another tensor")

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Within, reading a parameter of any module of the tree gives its whole value."""
        changed: list[nn.Module] = []
        replaced: list[tuple[nn.Module, str, Any, Any]] = []
        try:
            for inner in self.module.modules():
                if inner._parameters and not isinstance(inner._parameters, _Shown):
                    inner.__dict__["_parameters"] = _Shown(inner._parameters, self)
                    changed.append(inner)
            for inner, name, value, paths in self.references:
                vars(inner)[name] = referring(value, {n: self.at(p) for n, p in paths.items()})
                replaced.append((inner, name, value, vars(inner)[name]))
            with self.installed():
                yield
            self.settle()
        finally:
            self.seen, self.handles = {}, {}
            for inner, name, value, now in replaced:
                if vars(inner).get(name) is now:
                    vars(inner)[name] = value
            for inner in changed:
                inner.__dict__["_parameters"] = held_by(inner)

    def at(self, path: str) -> Any:
        """What is shown at `path`."""
        owner, _, name = path.rpartition(".")
        return self.module.get_submodule(owner)._parameters[name]


_MOVING = ("aten.set_.", "aten.resize_", "aten.set.", "aten.resize.")


def _refused(leaf: LocalParameter, why: str) -> AutoParallelError:
    return AutoParallelError(
        f"the forward changes parameter {leaf.path} in a way that a split one cannot follow",
        where=leaf.path,
        why=why,
        fix="write values in place (under torch.no_grad: parameter.copy_(value)), and change what "
        "else there is before the model is split",
    )


@contextlib.contextmanager
def common_numbers(generator: Generator) -> Iterator[None]:
    """Python draws the same random numbers on all ranks, by the generator's seed and step.

    The user's own generators go on afterwards where they were, but for the one number by which
    the generator recognizes a pass that is repeated. A part of a pass that is repeated (by
    checkpointing inside of the model) finds torch's generator as it was, and draws from it.
    """
    before = snapshot()
    generator.between_passes()
    try:
        step = generator.current_step()
    except AutoParallelError:
        restore(before)
        yield
        return
    digest = hashlib.blake2b(f"{generator.seed} {step}".encode(), digest_size=7).digest()
    with seeded(int.from_bytes(digest)):
        yield
