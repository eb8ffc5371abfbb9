"""Passes on slices which together cover a whole dim: read, they are a split; written, a cat."""

from __future__ import annotations

from dataclasses import replace

from autoparallel.graph.graph import Graph, Node, Ref
from autoparallel.graph.passes.editing import Rename, first_operand, rebuilt, renamed

__all__ = ["join_slices", "join_writes"]

_Range = tuple[int, int]


def join_slices(graph: Graph) -> Graph:
    """slice(%x, 1, 0, 4), slice(%x, 1, 4, 6) of six columns become split_with_sizes(%x, (4, 2), 1).

    Why: a slice alone needs its dim unsharded; parts laid end to end, as of a fused query, key and
    value, are blocks that can each be sharded by itself. After: no slices of one value and dim, of
    fixed sizes and step 1, lie end to end from its start to its end; a second run is a no-op.
    """
    groups: dict[tuple[str, int], dict[_Range, list[Node]]] = {}
    for node in graph.calls:
        dim_and_range = _range(node, graph)
        if dim_and_range is not None:
            dim, piece = dim_and_range
            groups.setdefault((first_operand(node), dim), {}).setdefault(piece, []).append(node)
    places = {node.name: place for place, node in enumerate(graph.calls)}
    splits: dict[str, Node] = {}
    names: Rename = {}
    replaced_names: set[str] = set()
    for (source, dim), pieces in groups.items():
        order = sorted(pieces)
        size = graph.values[source].shape[dim]
        ends = [0, *(stop for _, stop in order)]
        if len(order) < 2 or [start for start, _ in order] != ends[:-1] or ends[-1] != size:
            continue
        everyone = [node for piece in order for node in pieces[piece]]
        # The split stands where the first slice stood, before every reader.
        first = min(everyone, key=lambda node: places[node.name])
        splits[first.name] = replace(
            first,
            name=f"{first.name}_pieces",
            target="aten.split_with_sizes.default",
            results=tuple(pieces[piece][0].result for piece in order),
            args=(first.args[0], tuple(stop - start for start, stop in order), dim),
            kwargs=(),
        )
        replaced_names |= {node.name for node in everyone}
        # Slices of the same range are one result of the split.
        for twins in pieces.values():
            names.update({node.result.name: twins[0].result.name for node in twins[1:]})
    nodes = []
    for node in graph.nodes:
        if node.name in splits:
            nodes.append(renamed(splits[node.name], names))
        elif node.name not in replaced_names:
            nodes.append(renamed(node, names))
    return rebuilt(graph, nodes, names)


def join_writes(graph: Graph) -> Graph:
    """slice_scatter(slice_scatter(%x, %a, 1, 0, 4), %b, 1, 4, 6) of six columns becomes
    cat((%a, %b), 1).

    Why: what is written over in full was made for nothing, whole on every rank where it is a
    constant such as zeros; and each write copied all of it. After: no writes of step 1 and fixed
    size, one behind the other, cover a dim without meeting; a second run is a no-op.
    """
    nodes = []
    for node in graph.nodes:
        parts = _written_parts(graph, node)
        if parts is None:
            nodes.append(node)
            continue
        dim, names = parts
        args = (tuple(map(Ref, names)), dim)
        nodes.append(replace(node, target="aten.cat.default", args=args, kwargs=()))
    return rebuilt(graph, nodes, {})


def _written_parts(graph: Graph, node: Node) -> tuple[int, tuple[str, ...]] | None:
    """Return the dim along which all of a value was written, and the parts in their order; None
    where something of it was there before.
    """
    pieces: dict[_Range, str] = {}
    along = -1
    last = node
    while node.target == _WRITE:
        piece = _range(node, graph, _WRITE)
        if piece is None or piece[0] != (along if pieces else piece[0]):
            return None
        along, bounds = piece
        part, whole = (graph.values[name] for name in (node.operands()[1], first_operand(node)))
        shape = list(whole.shape)
        shape[along] = bounds[1] - bounds[0]
        if part.shape != tuple(shape) or part.dtype != whole.dtype or bounds in pieces:
            return None
        pieces[bounds] = part.name
        order = sorted(pieces)
        ends = [0, *(stop for _, stop in order)]
        if [start for start, _ in order] == ends[:-1] and ends[-1] == last.result.shape[along]:
            return along, tuple(pieces[bounds] for bounds in order)
        node = graph.producers[whole.name]
    return None


_READ, _WRITE = "aten.slice.Tensor", "aten.slice_scatter.default"


def _range(node: Node, graph: Graph, target: str = _READ) -> tuple[int, _Range] | None:
    """Return the dim and the bounds of a slice of fixed size and step 1;
    None for any other node.

    target: the op, that of reading or of writing a slice.
    """
    if node.target != target:
        return None
    shape = graph.values[first_operand(node)].shape
    given = node.args[1 if target == _READ else 2 :]
    arguments = dict(zip(("dim", "start", "end", "step"), given, strict=False))
    arguments |= dict(node.kwargs)
    dim = arguments.get("dim", 0) % len(shape)
    size, start, end = shape[dim], arguments.get("start") or 0, arguments.get("end")
    end = size if end is None else end
    if arguments.get("step", 1) != 1 or not all(
        isinstance(item, int) for item in (size, start, end)
    ):
        return None
    # As Python does: negative ends count from the end, and all are clamped to the dim.
    bounds = [max(0, min(size, item + size if item < 0 else item)) for item in (start, end)]
    return (dim, (bounds[0], bounds[1])) if bounds[0] < bounds[1] else None
