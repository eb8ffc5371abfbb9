"""Values that share memory, and how a write to a view changes the value that it is a view of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from autoparallel.graph.graph import Dim, Node, Ref, Sym, Value, hint, size_expression
from autoparallel.graph.operators import operator_of, packet_of
from autoparallel.support.torch_private import schema_of

__all__ = ["is_view", "owner_of", "shares_memory", "written_back"]

# Whether these share memory depends on strides or types, which a graph does not know.
# They return a view where they can, and a copy where they must.
_MAYBE = frozenset({"reshape", "reshape_as", "contiguous", "to", "type_as", "flatten"})
_RESHAPED = frozenset(
    {"view", "view_as", "squeeze", "unsqueeze", "unflatten", "alias", "detach", *_MAYBE}
)
# Done twice, they give back what they were given.
_OWN_INVERSE = frozenset({"transpose", "t", "numpy_T", "mT", "swapaxes", "swapdims"})


@cache
def shares_memory(target: str) -> bool:
    """Return whether results of the op may be views of its first operand, as its schema says.

    >>> shares_memory("aten.transpose.int"), shares_memory("aten.mm.default")
    (True, False)
    """
    schema = schema_of(operator_of(target))
    # An op that writes returns what it wrote to; functionalize treats those apart.
    if schema is None or not schema.arguments or schema.is_mutable:
        return False
    first = schema.arguments[0].alias_info
    return first is not None and any(item.alias_info is not None for item in schema.returns)


def is_view(target: str) -> bool:
    """Return whether results of the op are always views of its first operand.

    Some ops copy where they must.

    >>> is_view("aten.transpose.int"), is_view("aten.reshape.default")
    (True, False)
    """
    return shares_memory(target) and packet_of(target) not in _MAYBE


def owner_of(name: str, views: Mapping[str, str]) -> str:
    """Return the value whose memory `name` is, at the end of a chain of views.

    views: for each view the value that it is a view of.

    >>> owner_of("c", {"c": "b", "b": "a"})
    'a'
    """
    while name in views:
        name = views[name]
    return name


def written_back(view: Node, index: int, parent: Value, child: Value, name: str) -> Node | None:
    """Return the node that produces `parent` anew,
    after result `index` of `view` was written and became `child`.

    view: the call that made the view. parent: what it is a view of, before the write. child: what
    stands for the view now. name: of the new node and its value. None where a write through such a
    view has no functional form (an expanded dim, where one element is seen twice).
    """
    packet = packet_of(view.target)
    rank = len(parent.shape)
    grad = parent.requires_grad or child.requires_grad
    result = Value(name, parent.shape, parent.dtype, grad)
    whole, part = Ref(parent.name), Ref(child.name)

    def node(target: str, *args: Any) -> Node:
        """Return the node that produces the parent's new value by this op."""
        return replace(view, name=name, target=target, results=(result,), args=args, kwargs=())

    if packet in _OWN_INVERSE:
        return replace(node(view.target, part, *view.args[1:]), kwargs=view.kwargs)
    # The parent's own shape undoes any change of shape, whichever it was.
    if packet in _RESHAPED:
        return node("aten.reshape.default", part, parent.shape)
    if packet == "permute":
        order = [dim % rank for dim in view.args[1]]
        # The inverse of a permutation p has p[i] -> i.
        return node("aten.permute.default", part, tuple(order.index(i) for i in range(rank)))
    if packet == "slice":
        dim, step = view.argument(1, "dim", 0), view.argument(4, "step", 1)
        bounds = view.argument(2, "start"), view.argument(3, "end")
        return node("aten.slice_scatter.default", whole, part, dim, *bounds, step)
    if packet in ("select", "unbind"):
        dim = view.argument(1, "dim", 0)
        at = view.argument(2, "index", 0) if packet == "select" else index
        return node("aten.select_scatter.default", whole, part, dim, at)
    if packet in ("narrow", "split", "split_with_sizes", "chunk"):
        dim = view.argument(1 if packet == "narrow" else 2, "dim", 0)
        start = view.argument(2, "start", 0) if packet == "narrow" else 0
        # A part begins where all parts before it end.
        for before in view.results[:index] if packet != "narrow" else ():
            start = _sum(start, before.shape[dim])
        stop = _sum(start, child.shape[dim])
        return node("aten.slice_scatter.default", whole, part, dim, start, stop, 1)
    return None


def _sum(one: Dim, two: Dim) -> Dim:
    """Return the sum of two sizes, a number where both are."""
    if isinstance(one, int) and isinstance(two, int):
        return one + two
    return Sym(size_expression(one) + size_expression(two), hint(one) + hint(two))
