"""A pass that sees parts of rows, each with an expert of its own, as routed experts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from autoparallel.graph.graph import Graph, Node, Ref, size_expression
from autoparallel.graph.passes.editing import first_operand, rebuilt
from autoparallel.graph.passes.experts_in_turn import PRODUCTS, ExpertSearch, stacked
from autoparallel.graph.passes.row_orders import COUNTED, NATURAL, counted_places, numel
from autoparallel.graph.passes.sorted_experts import NoRowsError

__all__ = ["SPLIT", "join_split_rows"]

# x.split(counts.tolist(), dim), which a graph can only say as one op: its sizes are values.
SPLIT = "autoparallel.split_by_counts.default"
_library = torch.library.Library("autoparallel", "FRAGMENT")
_library.define("split_by_counts(Tensor(a -> *) x, Tensor counts, int dim) -> Tensor(a)[]")


@torch.library.impl(_library, "split_by_counts", "CompositeImplicitAutograd")
def _split_by_counts(x: torch.Tensor, counts: torch.Tensor, dim: int) -> list[torch.Tensor]:
    """Return parts of a tensor, of sizes that are the numbers in another."""
    return list(x.split(counts.tolist(), dim))


def join_split_rows(graph: Graph) -> Graph:
    """cat((f(%part_0, %w_0), f(%part_1, %w_1), ..)), the parts being rows that are split by how
    often each expert was chosen, becomes routed_experts((%rows,), %experts, ..).

    Rows that were sorted by expert are taken apart so, into as many as values say. As one op, each
    row goes through the expert whose turn it is: row i, through the one up to whose place the
    counts add up to more than i.

    Why: how many rows a part has depends on values, so that no rank could know a size. After: no
    such cat is left, if all experts do the same with parameters of their own, and the counts are of
    as many choices as there are rows; it keeps its name; a second run is a no-op.
    """
    nodes: list[Node] = []
    for node in graph.nodes:
        joined = _joined(graph, node) if node.target == "aten.cat.default" else None
        nodes += [node] if joined is None else joined
    return rebuilt(graph, nodes, {})


def _joined(graph: Graph, node: Node) -> list[Node] | None:
    """Return the op of routed experts in the place of a cat, with what it reads before it; None
    where the cat puts no rows together that were split so.
    """
    names, chosen = [part.name for part in node.args[0]], f"{node.name}_experts"
    try:
        pieces = [_Piece.of_part(graph, name, place, chosen) for place, name in enumerate(names)]
    except NoRowsError:
        return None
    if node.argument(1, "dim", 0) != 0 or len({piece.counts for piece in pieces}) != 1:
        return None
    first, counts = pieces[0], graph.values[pieces[0].counts]
    if counts.shape != (len(pieces),) or any(each.content != first.content for each in pieces):
        return None
    # Each choice counts once, so that there are as many rows as the counts add up to.
    places = counted_places(graph, counts.name)
    rows = graph.values[first.inputs["row"][0]].shape[0]
    if not places or numel(graph.values[places].shape) != size_expression(rows):
        return None
    made = stacked(graph, node, pieces)
    if made is None:
        return None
    number = replace(counts, name=f"{node.name}_number", shape=(rows,))
    experts = replace(number, name=chosen, shape=(rows, 1))
    counted = replace(node, name=number.name, target=COUNTED, results=(number,))
    column = replace(node, name=experts.name, target="aten.unsqueeze.default", results=(experts,))
    return [
        replace(counted, args=(Ref(counts.name),), kwargs=(("output_size", rows),)),
        replace(column, args=(Ref(number.name), 1), kwargs=()),
        *made,
    ]


@dataclass(kw_only=True)
class _Piece(ExpertSearch):
    """The search for what one expert makes of its part of the rows.

    place: of the part among all. counts: the value with the sizes of the parts.
    """

    place: int = 0
    counts: str = ""

    @property
    def masks(self) -> bool:
        """Return that each row has an expert."""
        return False

    @staticmethod
    def of_part(graph: Graph, name: str, place: int, chosen: str) -> _Piece:
        """Return the search for a part that is put together with others, after it succeeded.

        place, chosen: of the part among all, and the name of the experts of all rows. Raises
        NoRowsError where it fails.
        """
        size = graph.values[name].shape[:1]
        search = _Piece(graph=graph, tokens=size[0] if size else 0, choices=1, start=name, order="")
        search.place, search.chosen, search.places = place, chosen, (name, "")
        search.result = search.rows(name, NATURAL)
        if not search.counts:
            raise NoRowsError
        return search

    def found(self, name: str, order: str) -> str:
        """Find the program's value for rows of the part; see `RowSearch.rows`."""
        node = self.graph.producers[name]
        if node.target == SPLIT and node.args[2] == 0:
            same = self.counts in ("", node.args[1].name)
            if not same or [value.name for value in node.results].index(name) != self.place:
                raise NoRowsError
            self.counts = node.args[1].name
            return self.given("row", first_operand(node))
        if node.kind != "call" or not self.has_rows(self.graph.values[name]):
            raise NoRowsError
        if node.target in PRODUCTS:
            return self.multiplied(node, order)
        return self.row_by_row(node, name, order)
