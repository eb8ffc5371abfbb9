"""Places that are read out of a tensor: `x[:, place]`, where `place` is a tensor of no dims.

A trace has a number for the place, which nobody knows before the model runs. A graph looks it up.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autoparallel.capture.counted_splits import ITEMS, is_only_for
from autoparallel.capture.graph_builder import GraphBuilder
from autoparallel.errors import CaptureError
from autoparallel.graph.graph import Node, Ref, Value

__all__ = ["ValuePlaces"]

_SELECT = "aten.select.int"


class ValuePlaces:
    """The look-ups by places out of tensors in a graph that `builder` writes.

    places: by nodes of the exported program, the places as they were when they were read. made: the
    look-ups, and the number of nodes up to each.

    Example: `ValuePlaces(builder).reads(node)`.
    """

    def __init__(self, builder: GraphBuilder) -> None:
        self.builder = builder
        self.places: dict[Any, Ref] = {}
        self.made: list[tuple[Node, int]] = []

    def reads(self, node: Any) -> bool:
        """Return whether a number is a place that is selected, and nothing else is done with it;
        remember the place.
        """
        if str(node.target) not in ITEMS or node.args[0].meta["val"].is_floating_point():
            return False
        if not is_only_for(node, lambda user: _selects(user, node)):
            return False
        example = node.args[0].meta["val"]
        (source,) = self.builder.leaf_all((node.args[0],))
        value = self.builder.value("", example, False)
        place = self._add(node, "place", "aten.clone.default", value, source)
        flat = replace(value, shape=(1,))
        self.places[node] = self._add(node, "place", "aten.reshape.default", flat, place, (1,))
        return True

    def looks_up(self, node: Any, grad: bool) -> bool:
        """Translate a selection of such a place into a look-up; return whether the node is one.

        node: of the exported program. grad: whether gradients are recorded where it is.
        """
        place = self.places.get(node.args[2]) if str(node.target) == _SELECT else None
        if place is None:
            return False
        builder = self.builder
        (source,) = builder.leaf_all(node.args[:1])
        x, dim = builder.values[source.name], node.args[1] % len(builder.values[source.name].shape)
        shape = (*x.shape[:dim], 1, *x.shape[dim + 1 :])
        flows = grad and builder.carries((source.name,))
        rows = replace(x, shape=shape, requires_grad=flows)
        index = (*[None] * dim, place)  # numbers below zero count from the end
        picked = self._add(node, "picked", "aten.index.Tensor", rows, source, index)
        one = replace(rows, shape=(*shape[:dim], *shape[dim + 1 :]))
        builder.translated[node] = self._add(
            node, "select", "aten.reshape.default", one, picked, one.shape
        )
        self.made.append((builder.nodes[-2], len(builder.nodes)))
        return True

    def _add(self, node: Any, name: str, target: str, value: Value, *args: Any) -> Ref:
        """Add a call to the graph, and return its result. node: where it stands."""
        builder = self.builder
        value = replace(value, name=builder.fresh(name))
        where = builder.origins.scope(node), builder.origins.line(node)
        call = Node(value.name, "call", target, (value,), args, (), *where)
        builder.add(call, value.requires_grad, builder.origins.frames(node))
        builder.follow(call, value.requires_grad)
        return Ref(value.name)

    def require_unwritten(self) -> None:
        """Raise CaptureError where what was looked up, or looked up in, is written to later.

        Torch selects a view, and a look-up has memory of its own.
        """
        builder = self.builder
        for node, after in self.made:
            names = (node.result.name, node.operands()[0])
            later = builder.first_write(names, after)
            if later is not None:
                raise CaptureError(
                    "the forward writes to a part whose place is read out of a tensor",
                    where=later.line,
                    why="the part has memory of its own in a graph, which would not follow",
                    fix="write by index_put_, or to another tensor",
                )


def _selects(user: Any, node: Any) -> bool:
    """Return whether a node selects a place, which is the number that another one reads."""
    return str(user.target) == _SELECT and user.args[0] is not node and user.args[2] is node
