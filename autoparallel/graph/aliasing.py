"""Which values share memory, and how a change to a view changes what it is a view of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from autoparallel.graph.graph import Dim, Node, Ref, Sym, Value, hint
from autoparallel.graph.operators import operator_of, packet_of
from autoparallel.support.torch_private import schema_of

__all__ = ["is_view", "owner_of", "shares_memory", "written_back"]

# Whether these share memory depends on strides or types, which a graph does not know.
_MAYBE = frozenset({"reshape", "reshape_as", "contiguous", "to", "type_as", "flatten"})
_RESHAPED = frozenset(
    {"view", "view_as", "squeeze", "unsqueeze", "unflatten", "alias", "detach", *_MAYBE}
)
_OWN_INVERSE = frozenset({"transpose", "t", "numpy_T", "mT", "swapaxes", "swapdims"})


@cache
def shares_memory(target: str) -> bool:
    """Whether results of the op may be views of its first operand, as its schema says."""
    schema = schema_of(operator_of(target))
    if schema is None or not schema.arguments or schema.is_mutable:
        return False
    first = schema.arguments[0].alias_info
    return first is not None and any(item.alias_info is not None for item in schema.returns)


def is_view(target: str) -> bool:
    """Whether results of the op are always views of its first operand."""
    return shares_memory(target) and packet_of(target) not in _MAYBE


def owner_of(name: str, views: Mapping[str, str]) -> str:
    """The value whose memory it is. views: what each view is a view of."""
    while name in views:
        name = views[name]
    return name


def written_back(view: Node, index: int, parent: Value, child: Value, name: str) -> Node | None:
    """The node that makes `parent` anew, `name`, when result `index` of `view` became `child`.

    None where a write through such a view has no functional form (one element seen twice).
    """
    packet = packet_of(view.target)
    rank = len(parent.shape)
    grad = parent.requires_grad or child.requires_grad
    made = Value(name, parent.shape, parent.dtype, grad)
    whole, part = Ref(parent.name), Ref(child.name)

    def node(target: str, *args: Any) -> Node:
        return replace(view, name=name, target=target, results=(made,), args=args, kwargs=())

    def argument(position: int, keyword: str, default: Any) -> Any:
        if len(view.args) > position:
            return view.args[position]
        return view.keyword(keyword, default)

    if packet in _OWN_INVERSE:
        return replace(node(view.target, part, *view.args[1:]), kwargs=view.kwargs)
    if packet in _RESHAPED:
        return node("aten.reshape.default", part, parent.shape)
    if packet == "permute":
        order = [dim % rank for dim in view.args[1]]
        return node("aten.permute.default", part, tuple(order.index(i) for i in range(rank)))
    if packet == "slice":
        dim, step = argument(1, "dim", 0), argument(4, "step", 1)
        bounds = argument(2, "start", None), argument(3, "end", None)
        return node("aten.slice_scatter.default", whole, part, dim, *bounds, step)
    if packet in ("select", "unbind"):
        dim = argument(1, "dim", 0)
        at = argument(2, "index", 0) if packet == "select" else index
        return node("aten.select_scatter.default", whole, part, dim, at)
    if packet in ("narrow", "split", "split_with_sizes", "chunk"):
        dim = argument(1 if packet == "narrow" else 2, "dim", 0)
        start = argument(2, "start", 0) if packet == "narrow" else 0
        for before in view.results[:index] if packet != "narrow" else ():
            start = _sum(start, before.shape[dim])
        stop = _sum(start, child.shape[dim])
        return node("aten.slice_scatter.default", whole, part, dim, start, stop, 1)
    return None


def _sum(one: Dim, two: Dim) -> Dim:
    if isinstance(one, int) and isinstance(two, int):
        return one + two
    left, right = (item.expr if isinstance(item, Sym) else item for item in (one, two))
    return Sym(left + right, hint(one) + hint(two))
