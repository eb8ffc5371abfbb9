"""The user's own Python on a split model: parameters look whole, random numbers are common."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from autoparallel.copies import referring
from autoparallel.errors import AutoParallelError
from autoparallel.placement import Invariant, Layout, Shard, layout_gradient, local_layout_size
from autoparallel.randomness import restore, seeded, snapshot
from autoparallel.runtime.collectives import convert
from autoparallel.runtime.parameters import Bundle, Copy, Leaf, Residence, refresh
from autoparallel.runtime.ranks import Ranks
from autoparallel.runtime.rng import Generator

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
        self.held[name] = value
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
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


class WholeParameters:
    """The parameters of a module tree, shown whole while the user's Python runs.

    A split parameter is gathered where it is read, and its gradient is cut; one that is whole
    gives its local leaf. Gradients are the same on all ranks, as all of them run the same Python.
    """

    def __init__(
        self,
        module: nn.Module,
        kept: Mapping[str, Residence],
        ranks: Ranks,
        originals: Mapping[int, str],
        copies: Mapping[int, Copy],
    ) -> None:
        """originals: paths of the user's parameters by id, to which attributes may refer still.

        copies: what computes in place of parameters, by the parameters' ids.
        """
        self.module, self.ranks = module, ranks
        self.readers: dict[tuple[int, str], Leaf] = {}
        bundle = Bundle(ranks)
        self.references: list[tuple[nn.Module, str, Any, dict[int, str]]] = []
        leaves: dict[int, Leaf] = {}
        for path, inner in module.named_modules():
            held = held_by(inner)
            for name, parameter in held.items():
                if parameter is not None:
                    full = f"{path}.{name}" if path else name
                    if id(parameter) not in leaves:
                        own = kept[full]
                        back = layout_gradient(own.storage)
                        copy = copies.get(id(parameter))
                        leaves[id(parameter)] = Leaf(held, name, full, own, back, bundle, copy)
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
        return value

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
            yield
        finally:
            for inner, name, value, now in replaced:
                if vars(inner).get(name) is now:
                    vars(inner)[name] = value
            for inner in changed:
                inner.__dict__["_parameters"] = held_by(inner)

    def at(self, path: str) -> Any:
        """What is shown at `path`."""
        owner, _, name = path.rpartition(".")
        return self.module.get_submodule(owner)._parameters[name]


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
