"""The orders that rows of tokens and their choices may lie in, and the values that say so."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from autoparallel.graph.graph import Dim, Graph, Node, Ref, size_expression
from autoparallel.graph.passes.editing import first_operand

__all__ = ["COUNTED", "FLOOR", "INDEX", "NATURAL", "ZEROS", "RowOrders"]
__all__ += ["counted_places", "numel"]

# The order of rows as the choices lie: token by token. Others have the name of a permutation.
NATURAL = ""
INDEX = {"aten.index.Tensor"}
FLOOR = {"aten.floor_divide.default", "aten.div.Tensor_mode"}
ZEROS = {"aten.zeros.default", "aten.new_zeros.default", "aten.zeros_like.default"}
_EMPTY = {"aten.empty_like.default", "aten.new_empty.default", "aten.empty.memory_format", *ZEROS}
# The op that returns 0 as often as the first number says, 1 as often as the second, and so on.
COUNTED = "aten.repeat_interleave.Tensor"
# Ops that change nothing but the type, or nothing at all.
_COPIES = {"aten.to.dtype", "aten.clone.default", "aten.contiguous.default", "aten.detach.default"}
_SORTS = {"aten.sort.default", "aten.sort.stable"}
_ARGSORTS = {"aten.argsort.default", "aten.argsort.stable"}
# Ops that return places along a dim, last of all; and those that only arrange what they are given.
_PLACES = {*_SORTS, *_ARGSORTS, "aten.topk.default", "aten.argmax.default", "aten.max.dim"}
_MOVES = {
    "aten.slice.Tensor",
    "aten.select.int",
    "aten.expand.default",
    "aten.reshape.default",
    "aten.unsqueeze.default",
    "aten.squeeze.dim",
    "aten.transpose.int",
}


@dataclass(kw_only=True)
class RowOrders:
    """The rows of tokens times choices in a graph, and the orders in which they may lie.

    tokens, choices: how many tokens there are, and choices of each. experts: the value that has the
    chosen experts; "" before it is known.
    """

    graph: Graph
    tokens: Dim
    choices: int
    experts: str = ""

    @property
    def count(self) -> Any:
        """The number of rows, as an expression."""
        return size_expression(self.tokens) * self.choices

    def is_chosen(self, name: str, order: str) -> bool:
        """Return whether a value has the chosen expert of each row, in that order of rows."""
        name = self.uncopied(name)
        producer = self.graph.producers[name]
        if order != NATURAL:
            if producer.target in INDEX and producer.args[1] == (Ref(order),):
                return self.is_chosen(producer.operands()[0], NATURAL)
            if producer.target == COUNTED:
                places = counted_places(self.graph, producer.operands()[0])
                return self.ascends(order) and self.uncopied(self.experts) == places
            if producer.target not in _SORTS or not self.is_sort_of(producer, order):
                return False
            return name == producer.results[0].name and self.is_flat_choice(producer.operands()[0])
        return self.is_flat_choice(name)

    def is_sort_of(self, producer: Node, order: str) -> bool:
        """Return whether a node sorts, and `order` is the permutation that it returns."""
        return len(producer.results) == 2 and producer.results[1].name == order

    def is_flat_choice(self, name: str) -> bool:
        """Return whether a value is the chosen experts of all tokens, one behind the other.

        The first such value that is met is taken to be it.
        """
        name = self.uncopied(name)
        value, producer = self.graph.values[name], self.graph.producers[name]
        if producer.target != "aten.reshape.default" or len(value.shape) != 1:
            return False
        before = self.graph.values[producer.operands()[0]]
        if self.experts:
            return before.name == self.experts
        # Choices may count as tokens of one choice each.
        apart = len(before.shape) > 1 and before.shape[-1] == self.choices
        fits = (apart and before.shape[0] == self.tokens) or self.choices == 1
        if not fits or size_expression(value.shape[0]) != self.count:
            return False
        if before.dtype.is_floating_point:
            return False
        self.experts = before.name
        return True

    def uncopied(self, name: str) -> str:
        """Return the value that others are copies of, perhaps of another type."""
        return _uncopied(self.graph, name)

    def are_places(self, name: str) -> bool:
        """Return whether a value's numbers are places that an op found, none of them negative."""
        producer = self.graph.producers[name]
        while producer.target in _COPIES | _MOVES:
            name = first_operand(producer)
            producer = self.graph.producers[name]
        return producer.target in _PLACES and name == producer.results[-1].name

    def is_order(self, name: str) -> bool:
        """Return whether a value is the permutation that sorts the rows by expert."""
        producer = self.graph.producers[name]
        if producer.target in _SORTS and self.is_sort_of(producer, name):
            return self.is_flat_choice(producer.operands()[0])
        if producer.target in _ARGSORTS:
            return self.is_flat_choice(producer.operands()[0])
        return False

    def ascends(self, name: str) -> bool:
        """Return whether a value is that permutation, with the first expert's rows first."""
        return self.is_order(name) and not self.graph.producers[name].argument(2, "descending")

    def inverted(self, name: str) -> str:
        """Return the permutation of which a value is the inverse; "" where it is none."""
        producer = self.graph.producers[name]
        if producer.target in ("aten.index_put.default", "aten.scatter.src"):
            put = producer.target == "aten.index_put.default"
            base, numbers = producer.args[0], producer.args[2 if put else 3]
            at = producer.args[1] if put else (producer.args[2],)
            accumulates = producer.argument(3, "accumulate", False) if put else producer.args[1]
            alone = len(at) == 1 and isinstance(at[0], Ref) and not accumulates
            if alone and isinstance(base, Ref) and isinstance(numbers, Ref):
                empty = self.graph.producers[base.name].target in _EMPTY
                if empty and self.counts_rows(numbers.name):
                    return at[0].name
        if producer.target in _ARGSORTS or (
            producer.target in _SORTS and name == producer.results[-1].name
        ):
            return producer.operands()[0]
        return ""

    def counts_rows(self, name: str) -> bool:
        """Return whether a value is 0, 1, .. for all rows."""
        producer = self.graph.producers[self.uncopied(name)]
        if producer.target == "aten.arange.default":
            return bool(size_expression(producer.args[0]) == self.count)
        if producer.target in ("aten.arange.start", "aten.arange.start_step"):
            start, stop, *step = producer.args
            return start == 0 and size_expression(stop) == self.count and step in ([], [1])
        return False

    def are_tokens(self, name: str, order: str) -> bool:
        """Return whether a value has the token of each row, in that order of rows."""
        producer = self.graph.producers[self.uncopied(name)]
        if self.choices == 1 and name == order:
            return True
        return self.is_floor(producer, order) and bool(producer.args[1] == self.choices)

    def is_floor(self, producer: Node, order: str) -> bool:
        """Return whether a node divides the numbers of rows, in that order, and rounds down."""
        if producer.target not in FLOOR or not isinstance(producer.args[1], int):
            return False
        if producer.target == "aten.div.Tensor_mode" and producer.keyword("rounding_mode") not in (
            "floor",
            "trunc",
        ):
            return False
        source = producer.operands()[0]
        return self.counts_rows(source) if order == NATURAL else source == order

    def are_ends(self, name: str, order: str, count: Dim) -> bool:
        """Return whether a value says where the rows of each expert end, in that order of rows."""
        producer = self.graph.producers[self.uncopied(name)]
        if order == NATURAL or not isinstance(count, int) or not self.ascends(order):
            return False
        if producer.target != "aten.cumsum.default" or producer.args[1] not in (0, -1):
            return False
        counts = self.graph.producers[self.uncopied(producer.operands()[0])]
        # Bins of width 1, or a little less, have one expert each.
        if counts.target != "aten.histc.default" or counts.args[1:3] != (count, 0):
            return False
        counted = counts.operands()[0]
        return counts.args[3] in (count - 1, count) and (
            self.is_chosen(counted, order) or self.is_chosen(counted, NATURAL)
        )


def numel(shape: tuple[Dim, ...]) -> Any:
    """Return the number of elements of a tensor, as an expression.

    >>> numel((2, 3))
    6
    """
    return math.prod(map(size_expression, shape))


def counted_places(graph: Graph, name: str) -> str:
    """Return the chosen experts of which a value says how often each was chosen; "" if of none.

    Example: `counted_places(graph, "counts")`.
    """
    node = graph.producers[_uncopied(graph, name)]
    if node.target != "aten.sum.dim_IntList" or node.argument(2, "keepdim", False):
        return ""
    flags = graph.producers[_uncopied(graph, node.operands()[0])]
    count = flags.result.shape[-1]
    rank = len(flags.result.shape)
    if sorted(dim % rank for dim in node.argument(1, "dim", ())) != [*range(rank - 1)]:
        return ""
    if flags.target == "aten.scatter.value" and rank == 2:
        zeros, dim, places, one = flags.args
        if graph.producers[zeros.name].target not in ZEROS or dim not in (1, -1) or one != 1:
            return ""
    elif flags.target == "aten.eq.Tensor":
        column, numbers = (graph.producers[each] for each in flags.operands())
        if numbers.target != "aten.arange.default" or numbers.args != (count,):
            return ""
        if column.target != "aten.unsqueeze.default" or column.args[1] not in (-1, rank - 1):
            return ""
        places = column.args[0]
    else:
        return ""
    # They are different ones for each token, and none is too large.
    chosen = _uncopied(graph, places.name)
    top = graph.producers[chosen]
    if top.target != "aten.topk.default" or chosen != top.results[1].name:
        return ""
    scores = graph.values[top.operands()[0]].shape
    last = top.argument(2, "dim", -1) in (-1, len(scores) - 1)
    return chosen if last and scores[-1] == count else ""


def _uncopied(graph: Graph, name: str) -> str:
    """Return the value that others are copies of, perhaps of another type."""
    producer = graph.producers[name]
    while producer.target in _COPIES:
        name = producer.operands()[0]
        producer = graph.producers[name]
    return name
