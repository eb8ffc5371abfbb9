"""A pass that sees a loop over experts, each with the tokens that chose it, as one op."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from autoparallel.graph.graph import Dim, Graph, Node, Ref, Value, map_leaves, size_expression
from autoparallel.graph.passes.chosen_experts import chosen_expert, numbers_of_experts
from autoparallel.graph.passes.editing import first_operand, rebuilt
from autoparallel.graph.passes.flattened_batches import is_pointwise
from autoparallel.graph.passes.row_orders import NATURAL
from autoparallel.graph.passes.sorted_experts import NoRowsError, RowSearch
from autoparallel.graph.row_program import (
    LOOKUP,
    NOT_ALL,
    PRODUCT,
    ROUTED,
    RowProgram,
    RowStep,
)

__all__ = ["PRODUCTS", "ExpertSearch", "join_experts_in_turn", "stacked"]

PRODUCTS = {"aten.linear.default", "aten.mm.default", "aten.matmul.default"}

_ZEROS = {"aten.zeros.default", "aten.zeros_like.default", "aten.new_zeros.default"}


def join_experts_in_turn(graph: Graph) -> Graph:
    """index_add(index_add(zeros, 0, %rows_0, %made_0), 0, %rows_1, %made_1) .. becomes
    routed_experts(%x, %experts, ..), where rows_e are the tokens that chose expert e.

    A Python loop over a list of experts is written so: for each, where(%chosen == e), the rows of
    its tokens, and what it makes of them, added up. Their parameters are stacked. Where an expert
    takes so many tokens and no more, the choices that are masked out are nobody's.

    Why: how many tokens chose an expert depends on values, so that no rank could know a size.
    After: no such chain is left, if all experts do the same with parameters of their own; its last
    sum keeps its name; a second run is a no-op.
    """
    chains: dict[str, list[_Turn]] = {}
    for node in graph.calls:
        turns = _turns(graph, node)
        if len(turns) > 1:
            # A longer chain that goes on from here takes the place of this one.
            chains.pop(turns[-2].sum.name, None)
            chains[node.name] = turns
    nodes: list[Node] = []
    for node in graph.nodes:
        joined = _joined(graph, node, chains[node.name]) if node.name in chains else None
        nodes += [node] if joined is None else joined
    return rebuilt(graph, nodes, {})


@dataclass(frozen=True)
class _Turn:
    """One expert's turn: its sum with those before, its rows' tokens, and what it made of them.

    sum: the node that adds up. tokens, made: values.
    """

    sum: Node
    tokens: str
    made: str


def _turns(graph: Graph, node: Node) -> list[_Turn]:
    """Return the turns of the experts up to a node, in order; none where it adds up nothing."""
    turns: list[_Turn] = []
    while True:
        turn = _turn(graph, node)
        if turn is None:
            return turns[::-1] if node.target in _ZEROS else []
        turns.append(turn)
        node = graph.producers[first_operand(node)]


def _turn(graph: Graph, node: Node) -> _Turn | None:
    """Return the turn that a node ends: index_add, or index_put of a sum with what was there."""
    if node.target == "aten.index_add.default" and node.args[1] == 0 and not node.kwargs:
        return _Turn(node, node.args[2].name, node.args[3].name)
    if node.target != "aten.index_put.default" or node.argument(3, "accumulate", False):
        return None
    before, places, value = node.args[:3]
    added = graph.producers[value.name]
    if len(places) != 1 or added.target != "aten.add.Tensor" or added.kwargs:
        return None
    for here, made in (added.args, added.args[::-1]):
        read = graph.producers[here.name] if isinstance(here, Ref) else None
        reads = read is not None and read.target == "aten.index.Tensor"
        if read is not None and reads and read.args == (before, places) and isinstance(made, Ref):
            return _Turn(node, places[0].name, made.name)
    return None


def _joined(graph: Graph, node: Node, turns: list[_Turn]) -> list[Node] | None:
    """Return the op of routed experts in the place of the last sum, behind the stacked parameters;
    None where the turns are not those of alike experts.
    """
    experts: dict[int, ExpertSearch] = {}
    try:
        for turn in turns:
            chosen, number = chosen_expert(graph, turn.tokens)
            experts[number] = ExpertSearch.of(graph, turn, chosen, node)
        inputs = [experts[number] for number in range(len(turns))]
    except (NoRowsError, KeyError):
        return None
    first = inputs[0]
    if any((each.chosen, each.content) != (first.chosen, first.content) for each in inputs):
        return None
    if first.masks:
        fits = graph.values[first.chosen].shape[1:] == (1, len(inputs))
        return stacked(graph, node, inputs) if fits else None
    if _are_all(graph, first, inputs):
        return stacked(graph, node, inputs)
    # A choice that is no expert's has no turn; a token that has several choices of one expert has
    # as many rows there, all of which have to be added.
    adds = all(turn.sum.target == "aten.index_add.default" for turn in turns)
    return stacked(graph, node, inputs, present=NOT_ALL) if adds else None


def _are_all(graph: Graph, first: ExpertSearch, experts: list[ExpertSearch]) -> bool:
    """Return whether a token's choices are different ones among exactly these experts."""
    producer = graph.producers[first.chosen]
    source = graph.values[producer.operands()[0]] if producer.operands() else None
    return (
        producer.target == "aten.topk.default"
        and producer.results[1].name == first.chosen
        and source is not None
        and source.shape[-1] == len(experts)
    )


@dataclass(kw_only=True)
class ExpertSearch(RowSearch):
    """The search for what one expert makes of its rows.

    chosen: the value with the chosen experts, or a mask. places: the indices of its rows, of
    their tokens and of their choices. result: the name of the rows that it makes. given: the rows
    of tokens and of choices that it reads. others: what else it reads: its parameters, and what is
    the same for all. ranks: of what a step makes element by element, by the step's place.
    """

    chosen: str = ""
    places: tuple[str, str] = ("", "")
    result: str = ""
    others: list[str] = field(default_factory=list)
    ranks: dict[int, int] = field(default_factory=dict)

    @staticmethod
    def of(graph: Graph, turn: _Turn, chosen: str, last: Node) -> ExpertSearch:
        """Return the search of one turn, after it succeeded. Raises NoRowsError where it fails."""
        shape = graph.values[chosen].shape
        rank = len(shape)
        if rank not in (2, 3) or type(shape[1]) is not int or last.result.shape[0] != shape[0]:
            raise NoRowsError
        where = graph.producers[turn.tokens]
        (choices,) = (value.name for value in where.results if value.name != turn.tokens)
        search = ExpertSearch(
            graph=graph, tokens=shape[0], choices=shape[1], start=turn.made, order=NATURAL
        )
        search.chosen, search.places = chosen, (turn.tokens, choices)
        search.result = search.rows(turn.made, NATURAL)
        return search

    @property
    def masks(self) -> bool:
        """Return whether choices may be nobody's, and `chosen` is a mask of the others."""
        return len(self.graph.values[self.chosen].shape) == 3

    @property
    def content(self) -> tuple[Any, ...]:
        """All in which alike experts are equal."""
        return self.steps, self.result, self.given_rows

    @property
    def given_rows(self) -> tuple[list[str], list[str]]:
        """The rows of tokens and of choices that are read."""
        return self.inputs["row"], self.inputs["value"]

    @property
    def count(self) -> Any:
        """The number of rows, as an expression."""
        return size_expression(self.graph.values[self.places[0]].shape[0])

    def given(self, kind: str, name: str) -> str:
        """Return the name that the program has for one of its inputs."""
        if kind != "plain":
            return super().given(kind, name)
        if name not in self.others:
            self.others.append(name)
        return f"other{self.others.index(name)}"

    def found(self, name: str, order: str) -> str:
        """Find the program's value for rows of the graph; see `RowSearch.rows`."""
        value, node = self.graph.values[name], self.graph.producers[name]
        if node.kind != "call" or not self.has_rows(value):
            raise NoRowsError
        below = self.below_one(node)
        if below is not None:
            return self.given("row", self.of_tokens(below))
        if node.target == "aten.index.Tensor":
            source = self.graph.values[node.operands()[0]]
            if node.args[1] == (Ref(self.places[0]),):
                return self.given("row", self.of_tokens(source.name))
            if node.args[1] != tuple(map(Ref, self.places)):
                raise NoRowsError
            if source.shape[:2] != (self.tokens, self.choices):
                raise NoRowsError
            # Each expert has a view of its own of one value.
            view = self.graph.producers[source.name]
            if view.target == "aten.unsqueeze.default" and view.args[1] in (-1, 2):
                base = self.graph.values[first_operand(view)]
                if len(base.shape) == 2:
                    value_ = Ref(self.given("value", base.name))
                    return self.step("aten.unsqueeze.default", value_, -1)
            return self.given("value", source.name)
        if node.target in PRODUCTS:
            return self.multiplied(node, order)
        return self.row_by_row(node, name, order)

    def below_one(self, node: Node) -> str | None:
        """Return the tokens of which a node picks the rows by way of a dim of 1 before them, as in
        `x[None, rows].reshape(-1, width)`; None where it does not.
        """
        if node.target not in ("aten.reshape.default", "aten.squeeze.dim"):
            return None
        picked = self.graph.producers[first_operand(node)]
        if picked.target != "aten.index.Tensor" or picked.args[1] != (None, Ref(self.places[0])):
            return None
        wide = self.graph.producers[first_operand(picked)]
        if wide.target != "aten.unsqueeze.default" or wide.args[1] != 0:
            return None
        tokens = first_operand(wide)
        fits = node.result.shape[1:] == self.graph.values[tokens].shape[1:]
        return tokens if fits else None

    def multiplied(self, node: Node, order: str) -> str:
        """Return the product of rows with a parameter of the expert, and its bias."""
        x, weight, *bias = node.args
        ranks = [len(self.graph.values[each.name].shape) for each in (x, weight)]
        if ranks != [2, 2] or self.has_rows(self.graph.values[weight.name]):
            raise NoRowsError
        rows, table = Ref(self.rows(x.name, order)), Ref(self.given("plain", weight.name))
        linear = node.target == "aten.linear.default"
        made = self.step(PRODUCT, rows, table, linear)
        if bias and bias[0] is not None:
            other = self.given("plain", bias[0].name)
            made = self.step("aten.add.Tensor", Ref(made), Ref(other))
            self.ranks[len(self.steps) - 1] = 2
        return made

    def row_by_row(self, node: Node, name: str, order: str) -> str:
        """Return what an op that treats every row by itself makes of rows."""
        made = super().row_by_row(node, name, order)
        # A number of another type has no say in the type of the result; one for each row has.
        read = [self.graph.values[operand] for operand in node.operands()]
        numbers = {value.dtype for value in read if not value.shape}
        if is_pointwise(node.target) and numbers <= {node.result.dtype}:
            self.ranks[len(self.steps) - 1] = len(node.result.shape)
        return made


def stacked(
    graph: Graph, node: Node, experts: Sequence[ExpertSearch], present: float = 1.0
) -> list[Node] | None:
    """Return the stacks of parameters, and the op that reads them.

    present: the share of choices that are some expert's.
    """
    first = experts[0]
    nodes: list[Node] = []
    tables: list[Ref] = []
    plain: list[Ref] = []
    names: dict[str, Ref] = {}
    products = {step.args[1].name for step in first.steps if step.target == PRODUCT}
    for at in range(len(first.others)):
        slot = [expert.others[at] for expert in experts]
        values = [graph.values[name] for name in slot]
        if any((v.shape, v.dtype) != (values[0].shape, values[0].dtype) for v in values):
            return None
        if len(set(slot)) == 1 and f"other{at}" not in products:
            names[f"other{at}"] = Ref(f"plain{len(plain)}")
            plain.append(Ref(slot[0]))
            continue
        shape = (len(slot), *values[0].shape)
        grad = any(value.requires_grad for value in values)
        table = Value(f"{node.name}_table{len(tables)}", shape, values[0].dtype, grad)
        names[f"other{at}"] = Ref(f"table{len(tables)}")
        whole = _whole(graph, slot)
        tables.append(Ref(whole or table.name))
        if whole:
            continue
        stack = replace(node, name=table.name, target="aten.stack.default", results=(table,))
        nodes.append(replace(stack, args=(tuple(map(Ref, slot)), 0), kwargs=()))
    steps: list[RowStep] = []
    looked_up: dict[tuple[str, int], Ref] = {}
    for at, step in enumerate(first.steps):
        known = dict(names)
        if step.target != PRODUCT:
            # A part of a table for each row.
            for name in dict.fromkeys(step.reads()):
                if not names.get(name, Ref("")).name.startswith("table"):
                    continue
                rank = first.ranks.get(at, 0)
                if (name, rank) not in looked_up:
                    value = graph.values[first.others[int(name.removeprefix("other"))]]
                    part = _part_of_rows(steps, names[name], value.shape, rank)
                    if part is None:
                        return None
                    looked_up[name, rank] = part
                known[name] = looked_up[name, rank]

        def renamed(leaf: Any, known: dict[str, Ref] = known) -> Any:
            """Return an argument with the program's name for what it uses."""
            return known.get(leaf.name, leaf) if isinstance(leaf, Ref) else leaf

        kwargs = tuple((key, map_leaves(renamed, item)) for key, item in step.kwargs)
        steps.append(replace(step, args=map_leaves(renamed, step.args), kwargs=kwargs))
    if not tables:
        return None
    rows, values_ = (tuple(map(Ref, given)) for given in first.given_rows)
    try:
        text = RowProgram(tuple(steps), first.result).text()
    except ValueError:
        return None
    given = (values_, tuple(tables), tuple(plain), text, None)
    if not first.masks:
        absent = () if present == 1.0 else (present,)
        arguments: tuple[Any, ...] = (rows, Ref(first.chosen), *given, *absent)
    else:
        nodes += _unmasked(graph, node, first.chosen)
        arguments = (rows, Ref(nodes[-1].name), *given, NOT_ALL)
    return [*nodes, replace(node, target=ROUTED, args=arguments, kwargs=())]


def _whole(graph: Graph, parts: list[str]) -> str:
    """Return the value of which these are the parts along the first dim; "" where they are not."""
    picks = [graph.producers[name] for name in parts]
    whole = picks[0].args[0] if picks[0].target == "aten.select.int" else None
    if not isinstance(whole, Ref) or graph.values[whole.name].shape[0] != len(parts):
        return ""
    expected = [("aten.select.int", (whole, 0, at)) for at in range(len(parts))]
    return whole.name if [(node.target, node.args) for node in picks] == expected else ""


def _unmasked(graph: Graph, node: Node, mask: str) -> list[Node]:
    """Return the nodes that compute from a mask of experts which one each choice is of, or -1."""
    shape = graph.values[mask].shape
    numbers = Ref(numbers_of_experts(graph, mask))

    def call(name: str, target: str, like: Value, *args: Any) -> Node:
        """Return a node with one result."""
        value = replace(like, name=f"{node.name}_{name}", requires_grad=False)
        made = replace(node, name=value.name, target=target, results=(value,))
        return replace(made, args=args, kwargs=())

    places = graph.values[numbers.name]
    flags = Value("", shape, torch.bool)
    kept = call("kept", "aten.ne.Scalar", flags, Ref(mask), 0)
    either = replace(places, shape=shape)
    number = call("number", "aten.where.ScalarOther", either, Ref(kept.name), numbers, -1)
    choices = replace(places, shape=shape[:2])
    return [kept, number, call("chosen", "aten.amax.default", choices, Ref(number.name), (-1,))]


def _part_of_rows(
    steps: list[RowStep], table: Ref, shape: tuple[Dim, ...], rank: int
) -> Ref | None:
    """Append the steps by which each row has its expert's part of a table, and return the part's
    name; None where there is no such part.

    shape: of one expert's part, which is broadcast from the last dim on. rank: of what is made
    element by element with it, rows being its first dim; 0 where an op reads it in another way.
    """
    behind = shape[1:] if len(shape) == rank and shape[:1] == (1,) else shape
    if len(behind) >= rank or not all(isinstance(size, int) for size in behind):
        return None
    part = Ref(f"part{len(steps)}")
    steps.append(RowStep((part.name,), LOOKUP, (table,)))
    if (1 + len(shape)) == rank:
        return part
    made = Ref(f"part{len(steps)}")
    wide = (-1, *[1] * (rank - 1 - len(behind)), *behind)
    steps.append(RowStep((made.name,), "aten.reshape.default", (part, wide)))
    return made
