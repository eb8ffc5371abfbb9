"""A pass that sees tokens which are routed to experts as one op, free in its tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from autoparallel.graph.graph import Dim, Graph, Node, Ref, Value, map_leaves, size_expression
from autoparallel.graph.passes.editing import expand_to, first_operand, rebuilt, reshape_to
from autoparallel.graph.passes.flattened_batches import is_pointwise
from autoparallel.graph.passes.row_orders import FLOOR, INDEX, NATURAL, ZEROS, RowOrders, numel
from autoparallel.graph.passes.rows_apart import keeps_rows_apart
from autoparallel.graph.row_program import (
    LOOKUP,
    PRODUCT,
    ROUTED,
    RowProgram,
    RowStep,
    factors_first,
)

__all__ = ["NoRowsError", "RowSearch", "join_routed_experts"]

_GROUPED = {"aten._grouped_mm.default", "transformers.grouped_mm_fallback.default"}


def join_routed_experts(graph: Graph) -> Graph:
    """Sort, gather, grouped products, unsort and sum become routed_experts(%x, %experts, ..).

    Rows that are sorted by expert have no order that a part of the tokens shares, so that no split
    of tokens passes through them. As one op they are a function of each token. It is found by
    where values come from: the sum over a token's choices is followed back through ops that treat
    every row by itself, to the tokens, to what was chosen, and to the tables of the experts; the
    order of rows may be any on the way. Nothing that draws numbers is part of it. A cast of the
    result is made by the op.

    Why: see above. After: no such sum is left; it keeps its name; a second run is a no-op.
    """
    nodes: list[Node] = []
    for node in graph.nodes:
        nodes += [node] if node.kind != "call" else _joined(graph, node)
    return _with_types(rebuilt(graph, nodes, {}))


def _with_types(graph: Graph) -> Graph:
    """Return the graph with casts of what experts return made by the op itself.

    Sums in single precision that are cast to half are then sent in half.
    """
    nodes = {node.name: node for node in graph.nodes}
    for node in graph.calls:
        if node.target != "aten.to.dtype" or len(node.args) != 2 or node.kwargs:
            continue
        source = graph.producers[node.operands()[0]]
        alone = len(graph.readers[node.operands()[0]]) == 1
        if source.target == ROUTED and alone and source.name not in graph.outputs:
            args = (*source.args[:6], node.args[1], *source.args[7:])
            nodes[node.name] = replace(node, target=ROUTED, args=args)
            del nodes[source.name]
    return rebuilt(graph, list(nodes.values()), {})


class NoRowsError(Exception):
    """A value does not follow row by row from tokens, choices and tables."""


def _joined(graph: Graph, node: Node) -> list[Node]:
    """Return the op of routed experts that a node ends, behind what it reads; else the node."""
    try:
        search = RowSearch.at(graph, node)
        joined = None if search is None else search.joined(node)
    except NoRowsError:
        joined = None
    return [node] if search is None or joined is None else [*search.added, joined]


@dataclass(kw_only=True)
class RowSearch(RowOrders):
    """The search for what the rows of one sum over choices are made of.

    start, order: the rows that are summed, and the order in which they lie. steps: found so far,
    first to last. known: the program's value by the graph's and the order of its rows. inputs: by
    kind, the values that the program reads. added: nodes before the op, which it needs.
    """

    start: str
    order: str
    steps: list[RowStep] = field(default_factory=list)
    known: dict[tuple[str, str], str] = field(default_factory=dict)
    inputs: dict[str, list[str]] = field(
        default_factory=lambda: {"row": [], "value": [], "table": [], "plain": []}
    )
    added: list[Node] = field(default_factory=list)

    @staticmethod
    def at(graph: Graph, node: Node) -> RowSearch | None:
        """Return the search that begins at a sum over choices; None where the node is none."""
        if node.target == "aten.sum.dim_IntList":
            source = graph.values[node.operands()[0]]
            rows = graph.producers[source.name]
            dims = node.argument(1, "dim")
            if rows.target != "aten.reshape.default" or not isinstance(dims, tuple):
                return None
            flat = graph.values[rows.operands()[0]]
            rank = len(source.shape)
            keeps = node.argument(2, "keepdim", False) or node.keyword("dtype") is not None
            behind = source.shape[2:]
            if keeps or rank < 2 or len(dims) != 1 or dims[0] % rank != 1:
                return None
            if flat.shape[1:] != behind or not isinstance(source.shape[1], int):
                return None
            return RowSearch(
                graph=graph,
                tokens=source.shape[0],
                choices=source.shape[1],
                start=flat.name,
                order=NATURAL,
            )
        if node.target == "aten.index_add.default":
            zeros, tokens, added = (graph.values[name] for name in node.operands())
            place = graph.producers[tokens.name]
            if node.args[1] != 0 or graph.producers[zeros.name].target not in ZEROS:
                return None
            if node.keyword("alpha", 1) != 1:
                return None
            # Of one choice, a token's number is that of its row.
            permutation, choices = (
                (place.args[0], place.args[1]) if place.target in FLOOR else (Ref(tokens.name), 1)
            )
            if not isinstance(permutation, Ref) or not isinstance(choices, int):
                return None
            return RowSearch(
                graph=graph,
                tokens=zeros.shape[0],
                choices=choices,
                start=added.name,
                order=permutation.name,
            )
        return None

    def joined(self, node: Node) -> Node | None:
        """Return the op of routed experts. Raises NoRowsError where there is none."""
        result = self.rows(self.start, self.order)
        values = {**self.graph.values, **{each.name: each.result for each in self.added}}
        tables = [values[name] for name in self.inputs["table"]]
        if not self.experts or not any(step.target == PRODUCT for step in self.steps):
            return None
        if len({table.shape[0] for table in tables}) != 1:
            return None
        inputs = {
            f"{kind}{at}": values[name]
            for kind, names in self.inputs.items()
            for at, name in enumerate(names)
        }
        try:
            text = RowProgram(factors_first(self.steps, result, inputs), result).text()
        except ValueError:
            return None
        kinds = ("row", "value", "table", "plain")
        rows, numbers, tables_, plain = (tuple(map(Ref, self.inputs[kind])) for kind in kinds)
        chosen = self.experts
        if values[chosen].shape != (self.tokens, self.choices):
            chosen = self.reshape(chosen, (self.tokens, self.choices))
        args = (rows, Ref(chosen), numbers, tables_, plain, text, None)
        node = replace(node, target=ROUTED, args=args, kwargs=())
        self.added = [replace(each, scope=node.scope, line=node.line) for each in self.added]
        return node

    def reshape(self, name: str, *shapes: tuple[Dim, ...]) -> str:
        """Add nodes that give a value one shape after the other, a dim of 1 growing; return the
        last one's name.
        """
        value = self.graph.values[name]
        for shape in shapes:
            grows = numel(shape) != numel(value.shape)
            view = expand_to if grows else reshape_to
            made = replace(value, name=f"{self.start}_rows{len(self.added)}", shape=shape)
            self.added.append(view(self.graph.producers[self.start], made, value))
            value = made
        return value.name

    # -- inputs

    def given(self, kind: str, name: str) -> str:
        """Return the name that the program has for one of its inputs."""
        names = self.inputs[kind]
        if name not in names:
            names.append(name)
        return f"{kind}{names.index(name)}"

    # -- rows

    def rows(self, name: str, order: str) -> str:
        """Return the program's value for rows of the graph, in an order of rows.

        Raises NoRowsError where they do not follow row by row from the inputs.
        """
        key = (name, order)
        if key not in self.known:
            self.known[key] = self.found(name, order)
        return self.known[key]

    def found(self, name: str, order: str) -> str:
        """Find the program's value for rows of the graph; see `rows`."""
        value, node = self.graph.values[name], self.graph.producers[name]
        if node.kind != "call" or not self.has_rows(value):
            raise NoRowsError
        if node.target in INDEX and len(node.args[1]) == 1:
            return self.looked_up(node, order)
        if node.target == "aten.index_select.default" and node.args[1] == 0:
            return self.looked_up(replace(node, args=(node.args[0], (node.args[2],))), order)
        if order == NATURAL:
            if node.target == "aten.reshape.default":
                return self.reshaped(node)
            if node.target == "aten.repeat_interleave.self_int" and node.args[1:3] == (
                self.choices,
                0,
            ):
                return self.given("row", self.of_tokens(node.operands()[0]))
        if node.target == ROUTED:
            return self.routed(node, order)
        if node.target in _GROUPED:
            return self.product(node, order)
        if node.target == "aten.bmm.default":
            return self.batched_product(node, order)
        return self.row_by_row(node, name, order)

    def has_rows(self, value: Value) -> bool:
        """Return whether a value has one part for each row."""
        return bool(value.shape) and size_expression(value.shape[0]) == self.count

    def of_tokens(self, name: str) -> str:
        """Return the name of a value that has a part for each token. Raises NoRowsError if not."""
        shape = self.graph.values[name].shape
        if not shape or shape[0] != self.tokens:
            raise NoRowsError
        return name

    def looked_up(self, node: Node, order: str) -> str:
        """Return rows that an index picks: of tokens, of a table, or of rows in another order."""
        source = node.operands()[0]
        (index,) = node.args[1]
        if not isinstance(index, Ref):
            raise NoRowsError
        if self.are_tokens(index.name, order):
            return self.given("row", self.of_tokens(source))
        place = self.graph.producers[index.name]
        if self.choices == 1 and self.is_floor(place, order):
            return self.repeated(source, place.args[1])
        if order == NATURAL:
            permutation = self.inverted(index.name)
            if permutation and self.is_order(permutation):
                return self.rows(source, permutation)
        elif index.name == order and self.is_order(order):
            return self.rows(source, NATURAL)
        if self.is_chosen(index.name, order):
            return self.step(LOOKUP, Ref(self.given("table", source)))
        raise NoRowsError

    def repeated(self, name: str, times: int) -> str:
        """Return rows of which each of some tokens has several, one behind the other."""
        count, *behind = self.graph.values[name].shape
        if size_expression(count) * times != self.count:
            raise NoRowsError
        shapes = [(count, 1, *behind), (count, times, *behind), (self.tokens, *behind)]
        return self.given("row", self.reshape(name, *shapes))

    def reshaped(self, node: Node) -> str:
        """Return rows that a reshape makes of a value with a dim of tokens and one of choices, or
        of rows with other dims behind.
        """
        source = self.graph.values[node.operands()[0]]
        behind = node.result.shape[1:]
        if self.has_rows(source):
            return self.step_on_rows(node, (-1, *behind), NATURAL)
        if source.shape[:2] != (self.tokens, self.choices) or source.shape[2:] != behind:
            if source.shape[len(source.shape) - len(behind) :] != behind:
                raise NoRowsError
            shape = (self.tokens, self.choices, *behind)
            return self.given("value", self.reshape(source.name, shape))
        # A token that is repeated for each choice, or what was computed for each of them.
        producer = self.graph.producers[source.name]
        if producer.target == "aten.expand.default":
            once = self.graph.values[producer.operands()[0]]
            single = self.graph.producers[once.name]
            if once.shape == (self.tokens, 1, *behind) and single.target in (
                "aten.unsqueeze.default",
                "aten.reshape.default",
            ):
                before = self.graph.values[single.operands()[0]]
                if before.shape == (self.tokens, *behind):
                    return self.given("row", before.name)
        return self.given("value", source.name)

    def step_on_rows(self, node: Node, shape: tuple[Dim, ...], order: str) -> str:
        """Return rows in another shape."""
        if not all(isinstance(size, int) for size in shape):
            raise NoRowsError
        rows = Ref(self.rows(node.operands()[0], order))
        return self.step("aten.reshape.default", rows, shape)

    def product(self, node: Node, order: str) -> str:
        """Return the grouped product of sorted rows."""
        if len(node.operands()) != 3 or node.argument(3, "bias") is not None:
            raise NoRowsError
        x, weight, ends = (self.graph.values[name] for name in node.operands())
        if node.argument(4, "out_dtype") not in (None, x.dtype) or len(weight.shape) != 3:
            raise NoRowsError
        if not self.are_ends(ends.name, order, weight.shape[0]):
            raise NoRowsError
        rows = Ref(self.rows(x.name, order))
        return self.step(PRODUCT, rows, Ref(self.given("table", weight.name)))

    def routed(self, node: Node, order: str) -> str:
        """Return what routed experts make of rows, as steps of this program."""
        rows, experts, values, tables, plain, text, *others = node.args
        column = self.graph.producers[experts.name]
        one = column.target == "aten.unsqueeze.default" and column.args[1] == 1
        if not one or values or any(others) or not self.is_chosen(first_operand(column), order):
            raise NoRowsError
        names = {f"row{at}": self.rows(each.name, order) for at, each in enumerate(rows)}
        for kind, given in (("table", tables), ("plain", plain)):
            names |= {f"{kind}{at}": self.given(kind, each.name) for at, each in enumerate(given)}
        program = RowProgram.parse(text)
        for step in program.steps:
            made = {name: f"v{len(self.steps)}_{at}" for at, name in enumerate(step.makes)}
            renamed = {name: Ref(other) for name, other in names.items()}

            def leaf(item: Any, renamed: dict[str, Ref] = renamed) -> Any:
                """Return an argument with the name that this program has for what it reads."""
                return renamed[item.name] if isinstance(item, Ref) else item

            args, kwargs = map_leaves(leaf, step.args), map_leaves(leaf, step.kwargs)
            self.steps.append(RowStep(tuple(made.values()), step.target, args, kwargs))
            names |= made
        return names[program.result]

    def batched_product(self, node: Node, order: str) -> str:
        """Return the product of each row with the matrix of its expert, which was looked up."""
        left, right = (self.graph.values[name] for name in node.operands())
        first = right.shape[2] == 1
        matrix, row = (left, right) if first else (right, left)
        picked = self.graph.producers[matrix.name]
        if row.shape[2 if first else 1] != 1 or picked.target not in INDEX:
            raise NoRowsError
        (index,) = picked.args[1] if len(picked.args[1]) == 1 else (None,)
        if not isinstance(index, Ref) or not self.is_chosen(index.name, order):
            raise NoRowsError
        # An index counts negative numbers from the end; to routed experts they are nobody's.
        if not self.are_places(self.experts):
            raise NoRowsError
        table = Ref(self.given("table", picked.operands()[0]))
        width = row.shape[1 if first else 2]
        rows = Ref(self.rows(row.name, order))
        flat = self.step("aten.reshape.default", rows, (-1, width))
        made = self.step(PRODUCT, Ref(flat), table, first)
        shape = (-1, *node.result.shape[1:])
        return self.step("aten.reshape.default", Ref(made), shape)

    def row_by_row(self, node: Node, name: str, order: str) -> str:
        """Return what an op that treats every row by itself makes of rows."""
        if not keeps_rows_apart(self.graph, node, self.has_rows):
            raise NoRowsError
        if node.target in ("aten.reshape.default", "aten.view.default"):
            return self.step_on_rows(node, (-1, *node.result.shape[1:]), order)

        def leaf(item: Any) -> Any:
            """Return an argument of the step."""
            if not isinstance(item, Ref):
                if type(item) not in _PLAIN_LEAVES and not isinstance(item, torch.dtype):
                    raise NoRowsError
                return item
            value = self.graph.values[item.name]
            if self.has_rows(value) and len(value.shape) == rank:
                return Ref(self.rows(item.name, order))
            # Of fewer dims, or of one row: it is broadcast, the same for all.
            if len(value.shape) == rank and value.shape[0] != 1:
                raise NoRowsError
            return Ref(self.given("plain", item.name))

        rank = len(self.graph.values[node.operands()[0]].shape)
        ranks = [len(self.graph.values[operand].shape) for operand in node.operands()]
        if is_pointwise(node.target):
            rank = max(ranks)
        args = map_leaves(leaf, node.args)
        kwargs = tuple((key, map_leaves(leaf, item)) for key, item in node.kwargs)
        makes = tuple(f"v{len(self.steps)}_{at}" for at in range(len(node.results)))
        if not all(map(self.has_rows, node.results)):
            raise NoRowsError
        self.steps.append(RowStep(makes, node.target, args, kwargs))
        for value, made in zip(node.results, makes, strict=True):
            self.known[value.name, order] = made
        return self.known[name, order]

    def step(self, target: str, *args: Any) -> str:
        """Append a step with one result, and return its name."""
        made = f"v{len(self.steps)}"
        self.steps.append(RowStep((made,), target, args))
        return made


_PLAIN_LEAVES = (int, float, bool, str, type(None))
