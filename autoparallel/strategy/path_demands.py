"""Demands on parameters and modules by their paths: "*.q_proj is column on tp"."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

import numpy as np

from autoparallel.errors import PlanError
from autoparallel.graph.graph import Node
from autoparallel.placement import (
    Invariant,
    Layout,
    Placement,
    Replicate,
    Shard,
    layout_text,
    parse_placement,
)
from autoparallel.strategy.asked_model import Allowed, AskedModel, Demand
from autoparallel.strategy.product_splits import split_word

__all__ = ["PathDemand", "placement_test", "states_text"]

_PRODUCTS = ("column", "row")
_MOST_TOLD = 6  # layouts that an error lists


@dataclass(frozen=True)
class PathDemand(Demand):
    """A demand on the layouts of parameters, or of what modules make.

    text: as the user wrote it. pattern: of paths. axes: numbers of the mesh axes that it is about.
    how: the words for the layout. negated: it is forbidden.

    A pattern that is the path of a parameter is about how that is stored. One that is the path of a
    module is about what leaves the module, if it says how to split that. "whole", and what is
    forbidden, is also said of all that is inside: every result, and every parameter.
    "column" and "row" are about the products and look-ups of the module, or with the parameter.
    """

    text: str
    pattern: str
    axes: tuple[int, ...]
    how: str
    negated: bool

    @property
    def about(self) -> tuple[int, ...]:
        """The numbers of the mesh axes that it is about."""
        return self.axes

    def matches(self, path: str) -> bool:
        """Say whether it is about the parameter or module at `path`, or about one it is part of."""
        return bool(self.matched(path))

    def matched(self, path: str) -> str:
        """Return the longest beginning of a path that the pattern matches; "" for none.

        Every beginning of the path is a module that contains it.
        """
        parts = path.split(".")
        for count in range(len(parts), 0, -1):
            if fnmatchcase(start := ".".join(parts[:count]), self.pattern):
                return start
        return ""

    def allows(self, layout: Layout) -> bool:
        """Say whether a layout is as demanded on all axes that it is about."""
        test = placement_test(self.text, self.how)
        return all(test(layout[axis]) is not self.negated for axis in self.axes)

    def states(self, model: AskedModel) -> dict[str, Allowed]:
        """Return the states that it allows; see `Demand`."""
        if self.how in _PRODUCTS:
            return self.of_products(model)
        network, graph = model.network, model.network.graph
        inside = self.negated or self.how == "whole"
        states: dict[str, Allowed] = {}
        is_used = False
        for node in graph.nodes:
            names = model.names(node)
            if not any(map(self.matches, names)):
                continue
            is_used = True
            layouts: list[tuple[Layout, ...]]
            if node.kind == "parameter":
                if not inside and not any(fnmatchcase(name, self.pattern) for name in names):
                    continue
                layouts = [(choice.storage,) for choice in network.storages[node.name]]
            else:
                places = range(len(node.results)) if inside else self.leaving(model, node)
                if not places:
                    continue
                layouts = [
                    tuple(joint.results[place] for place in places)
                    for joint in network.strategies[node.name]
                ]
            states[node.name] = np.array([all(map(self.allows, state)) for state in layouts])
            if not states[node.name].any():
                raise self.impossible(node, names[0], layouts)
        if not is_used:
            raise self.about_nothing(model)
        return states

    def leaving(self, model: AskedModel, node: Node) -> Sequence[int]:
        """Return the places of a call's results that leave the module which the pattern matches."""
        graph, module = model.network.graph, self.matched(node.where)

        def leaves(value: str) -> bool:
            readers = graph.readers[value]
            is_read = any(
                reader.kind == "call" and not f"{reader.where}.".startswith(f"{module}.")
                for reader in readers
            )
            return is_read or value in graph.outputs

        return [
            place
            for place, value in enumerate(node.results)
            if value.name not in model.network.weights and leaves(value.name)
        ]

    def of_products(self, model: AskedModel) -> dict[str, Allowed]:
        """Return the states of products and look-ups that are by columns, or by rows."""
        network = model.network
        states: dict[str, Allowed] = {}
        is_used = False
        for node in network.graph.calls:
            matrices = model.matrices(node)
            is_inside = bool(node.where) and self.matches(node.where)
            is_used = is_used or is_inside
            paths = [path for name in matrices for path in model.weight_paths[name]]
            is_asked = is_inside or any(fnmatchcase(path, self.pattern) for path in paths)
            if not matrices or not is_asked:
                continue
            weights = [name in network.weights for name in node.operands()]
            words = [
                [split_word(joint.operands, joint.results, weights, axis) for axis in self.axes]
                for joint in network.strategies[node.name]
            ]
            # One product has one axis by columns: the others may split what the inputs bring.
            states[node.name] = np.array([(self.how in row) is not self.negated for row in words])
            if not states[node.name].any():
                able = dict.fromkeys(word for row in words for word in row)
                raise PlanError(
                    f"{node.where or node.name} cannot be as {self.text!r}",
                    where=node.line,
                    why=f"its product {node.name} can be {', '.join(able)} there ('inputs' is a "
                    "split of what the inputs bring, such as the batch)",
                    fix="allow one of these, name a narrower pattern, or leave the constraint out",
                )
        if states:
            return states
        if not is_used and not any(map(self.matches, model.captured.aliases)):
            raise self.about_nothing(model)
        raise PlanError(
            f"constraint {self.text!r} is about no product",
            why=f"what {self.pattern!r} matches reads no matrix, and {self.how} is a split of one",
            fix='say "split 1" or "whole" of it, or name the module that has the product',
        )

    def impossible(self, node: Node, name: str, layouts: Sequence[tuple[Layout, ...]]) -> PlanError:
        """Return the error for a parameter, or for a call's results, that cannot be so.

        name: the path that it is known by. layouts: of all its states.
        """
        value = node.result if node.kind == "parameter" else node.results[0]
        dims = len(value.shape)
        able = states_text(layouts, self.axes)
        why = f"it can be {able}"
        asked = re.fullmatch(r"split\s+(\d+)", self.how)
        if asked is not None and int(asked[1]) >= dims and not self.negated:
            why = (
                f"it has {dims} dims, counted from 0, and can be {states_text(layouts, self.axes)}"
            )
        if node.kind == "call":
            why = f"{name} makes {value.name}: {why}"
        return PlanError(
            f"{name} cannot be as {self.text!r}",
            where=node.line,
            why=why,
            fix="allow one of these, name a narrower pattern, or leave the constraint out",
        )

    def about_nothing(self, model: AskedModel) -> PlanError:
        """Return the error for a pattern with a typing error, which must not pass for a demand that
        holds.
        """
        paths = [*model.captured.aliases, *model.modules]
        # Somebody who writes the last words of a path means all that end so.
        ends = any(path.endswith(f".{self.pattern}") for path in paths)
        near = [f"*.{self.pattern}"] if ends else get_close_matches(self.pattern, paths, 3)
        return PlanError(
            f"constraint {self.text!r} is about nothing: no parameter and no module is called "
            f"{self.pattern!r}",
            fix=f"did you mean {', '.join(near)}?" if near else "see model.named_modules()",
        )


def placement_test(text: str, how: str) -> Callable[[Placement], bool]:
    """Return the test of a placement that the words after "is" stand for.

    text: the whole demand, which errors show. how: "whole", "split", "split 1" or a placement.
    Raises PlanError where it is none of these.

    >>> placement_test("fc1: split 1", "split 1")(Shard(1))
    True
    """
    if how == "whole":
        return lambda placement: isinstance(placement, Invariant | Replicate)
    if how == "split":
        return lambda placement: isinstance(placement, Shard)
    match = re.fullmatch(r"split\s+(\d+)", how)
    if match is not None:
        dim = int(match[1])
        return lambda placement: isinstance(placement, Shard) and placement.dim == dim
    try:
        wanted = parse_placement(how)
    except ValueError:
        raise PlanError(
            f"constraint {text!r}: {how!r} says not how",
            fix='write "whole", "split", "split 1", "column", "row", or a placement like '
            '"S(0, blocks=3)"',
        ) from None
    return lambda placement: placement == wanted


def states_text(layouts: Sequence[tuple[Layout, ...]], axes: Sequence[int]) -> str:
    """Return possible states in words, each a layout or, of several tensors, one for each.

    axes: the numbers of the mesh axes that are told.

    >>> states_text([((Shard(0), Shard(1)),), ((Invariant(), Shard(1)),)], axes=(0,))
    'S(0); I'
    """
    told = (
        [layout_text(tuple(layout[axis] for axis in axes)) for layout in state] for state in layouts
    )
    texts = list(dict.fromkeys(", ".join(state) for state in told))
    more = len(texts) - _MOST_TOLD
    return "; ".join(texts[:_MOST_TOLD]) + (f"; and {more} more" if more > 0 else "")
