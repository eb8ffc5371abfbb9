"""A plan from elsewhere is checked against the graph and the rules of its ops, before it runs.

A plan's text may have been edited, or be of another release of the rules. One placement that an
op's rule does not allow makes gradients wrong without an error, and differently on each rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product

import torch
from torch import nn

from autoparallel.cost.op_costs import nbytes
from autoparallel.discovery.registered_rules import require_proven
from autoparallel.graph.captured import Captured
from autoparallel.graph.graph import Node, Sym, Value
from autoparallel.graph.inert_calls import inert_calls
from autoparallel.placement import (
    Invariant,
    Layout,
    Movement,
    Partial,
    Shard,
    is_possible_step,
    layout_text,
    whole_layout,
)
from autoparallel.plan import Conversion, OpChoice, Plan
from autoparallel.planning.layout_check import require_storage, why_no_layout, wrong_plan
from autoparallel.planning.stage_check import require_sound_stages
from autoparallel.rewrite.conversions import begun_steps
from autoparallel.rules.lookup import rule_of_whole_tensors
from autoparallel.rules.loop_splits import LoopSplit, tile_of
from autoparallel.rules.rule import OpCall, ShardingRule
from autoparallel.rules.strategies import Strategy, strategies
from autoparallel.strategy.mesh_strategies import joint_strategies
from autoparallel.strategy.rule_matching import MatchedCall, match_rules

__all__ = ["require_sound"]

# No redistribution takes more steps on each mesh axis.
_MOST_STEPS = 4


def require_sound(plan: Plan, model: nn.Module) -> None:
    """Raise PlanError unless a plan, which has its graphs, is one by the rules of its ops.

    plan: of one that the planner has returned in this process, only registered rules are looked at
    again. model: the one that it is applied to. The error names the op or the parameter, and its
    line in the source. Rules of ops that nobody wrote a rule for are found on the way.
    """
    if plan.is_checked:
        # Rules may have been registered anew since, and it is they that are followed.
        for captured in (plan.captured, *(part.plan.captured for part in plan.parts)):
            if captured is not None:
                graph = captured.graph
                require_proven(OpCall.of(graph, node) for node in graph.calls)
        return
    if plan.captured is not None:
        if plan.pipeline is not None:
            _Check(plan, plan.captured).of_stages()
            require_sound_stages(plan, plan.captured)
        else:
            _Check(plan, plan.captured).all()
        return
    _require_agreement(plan, model)
    for part in plan.parts:
        if part.plan.captured is not None:
            _Check(part.plan, part.plan.captured).all()


def _require_agreement(plan: Plan, model: nn.Module) -> None:
    """Raise PlanError unless the plans of a model's parts are for the mesh, the options and the
    layouts of parameters of the plan as a whole.
    """
    first: dict[int, str] = {}
    known = {choice.path: choice for choice in plan.parameters}
    named = dict(model.named_parameters(remove_duplicate=False))
    for path, parameter in named.items():
        choice = known.get(first.setdefault(id(parameter), path))
        if choice is not None:
            require_storage(choice, tuple(parameter.shape), plan, path)
    rows = [
        (f"{path}/{op.name}", op.target, op.operands, op.results, op.kernels)
        for part in plan.parts
        for path in part.paths
        for op in part.plan.ops
    ]
    if rows != [(op.name, op.target, op.operands, op.results, op.kernels) for op in plan.ops]:
        raise wrong_plan(plan.model, "", "its ops are not those of its parts")
    for part in plan.parts:
        if (part.plan.mesh, part.plan.options) != (plan.mesh, plan.options):
            raise wrong_plan(part.paths[0], "", "it is planned for another mesh, or other options")
        for path, choice in product(part.paths, part.plan.parameters):
            full = f"{path}.{choice.path}"
            whole = known.get(first.get(id(named.get(full)), ""))
            if whole is None or whole.storage != choice.storage:
                raise wrong_plan(
                    full, path, "the plan of the part stores it otherwise than the model's"
                )
        # What Python calls returns whole tensors, and is given such.
        if any(layout != whole_layout(len(plan.mesh.axes)) for layout in part.plan.outputs):
            raise wrong_plan(
                part.paths[0], "", "it returns parts of tensors to the Python around it"
            )


class _Check:
    """The check of a plan of one graph.

    nodes: the graph's calls by name. made: the layout in which each value is produced. wanted: for
    each conversion that the plan must have, (value, layout), the readers.
    """

    def __init__(self, plan: Plan, captured: Captured) -> None:
        self.plan, self.captured, self.graph = plan, captured, captured.graph
        self.sizes = tuple(size for _, size in plan.mesh.axes)
        self.whole = whole_layout(len(self.sizes))
        self.made: dict[str, Layout] = {}
        self.wanted: dict[tuple[str, Layout], dict[str, None]] = {}

    def all(self) -> None:
        """Check everything that a program is emitted from."""
        self.begin()
        inert = inert_calls(self.graph)
        matched = match_rules(self.graph, inert, self.plan.options, self.plan.world_size)
        for op, node in zip(self.plan.ops, self.graph.calls, strict=True):
            self.op(op, node, matched[node.name], node.name in inert)
        self.outputs()
        self.conversions()
        self.recomputed()
        self.remade(matched)

    def of_stages(self) -> None:
        """Check that a plan with stages tells of this graph; see `require_sound_stages`.

        On the axis of micro-batches, parameters and results lie otherwise than on one of ranks.
        """
        self.begin(stages=True)
        for op, node in zip(self.plan.ops, self.graph.calls, strict=True):
            self.named(op, node)
            self.reads_and_makes(op)
        if len(self.plan.outputs) != len(self.graph.outputs):
            raise wrong_plan(self.plan.model, "", f"it returns {len(self.graph.outputs)} tensors")
        self.returned()
        self.conversions()

    def begin(self, stages: bool = False) -> None:
        """Check that the plan has the parameters and the ops of the graph."""
        graph, plan = self.graph, self.plan
        if plan.fingerprint != graph.fingerprint:
            raise wrong_plan(plan.model, "", "it was made for another program")
        for node in graph.nodes:
            if node.kind != "call":
                self.made[node.result.name] = self.whole
        nodes = [node for node in graph.nodes if node.kind == "parameter"]
        self.parameters(nodes, stored=not stages)
        if [op.name for op in plan.ops] != [node.name for node in graph.calls]:
            raise wrong_plan(plan.model, "", "its ops are not those of the model")

    def parameters(self, nodes: Sequence[Node], stored: bool) -> None:
        """Check which parameters there are. stored: and how they are stored."""
        rows = [(choice.name, choice.path) for choice in self.plan.parameters]
        if rows != [(node.name, node.target) for node in nodes]:
            raise wrong_plan(self.plan.model, "", "its parameters are not those of the model")
        for choice, node in zip(self.plan.parameters, nodes, strict=True):
            value = node.result
            if choice.shape != value.shape or choice.nbytes != nbytes(value):
                raise wrong_plan(
                    choice.path, node.where, f"it is {value}, of {nbytes(value)} bytes"
                )
            if stored:
                require_storage(choice, value.shape, self.plan, node.where)
            self.made[value.name] = choice.storage

    def op(self, op: OpChoice, node: Node, matched: MatchedCall, inert: bool) -> None:
        """Check that one of the op's strategies has these layouts, and these kernels."""
        what, where = self.named(op, node)
        values = [self.graph.values[name] for name in (*op.reads, *op.makes)]
        layouts = (*op.operands, *op.results)
        for value, layout in zip(values, layouts, strict=True):
            why = why_no_layout(layout, value.shape, self.sizes)
            if why:
                raise wrong_plan(what, where, f"{layout_text(layout)} of {value}: {why}")
        if op.kernels and len(op.kernels) != len(self.sizes):
            raise wrong_plan(what, where, f"it has {len(op.kernels)} kernels on {self.plan.mesh}")
        if not self.is_allowed(op, node, matched, inert):
            sides = (", ".join(map(layout_text, side)) for side in (op.operands, op.results))
            kernels = f" by {', '.join(op.kernels)}" if any(op.kernels) else ""
            raise wrong_plan(what, where, f"its rule does not allow {' -> '.join(sides)}{kernels}")
        self.reads_and_makes(op)

    def reads_and_makes(self, op: OpChoice) -> None:
        """Note in which layouts an op reads and makes its values."""
        for name, layout in zip(op.reads, op.operands, strict=True):
            self.read(name, layout, op.name)
        self.made.update(zip(op.makes, op.results, strict=True))

    def named(self, op: OpChoice, node: Node) -> tuple[str, str]:
        """Check that the op is the one of that name, and has a layout for each of its tensors.

        Returns what it is called in an error, and its line.
        """
        names = (tuple(node.operands()), tuple(value.name for value in node.results))
        where = ", ".join(text for text in (node.where, node.line) if text)
        what = f"{op.name} ({node.target})"
        if (op.target, op.where, op.line) != (node.target, node.where, node.line):
            raise wrong_plan(what, where, "the plan has another op, or another line, of that name")
        if (op.reads, op.makes) != names:
            raise wrong_plan(what, where, "it reads, or makes, other values in the plan")
        if (len(op.operands), len(op.results)) != (len(op.reads), len(op.makes)):
            raise wrong_plan(what, where, "the plan has layouts for more or fewer tensors")
        return what, where

    def is_allowed(self, op: OpChoice, node: Node, matched: MatchedCall, inert: bool) -> bool:
        """Return whether a strategy of the op on the whole mesh is as the plan has it."""
        call = OpCall.of(self.graph, node)
        operands = tuple(operand.requires_grad and not inert for operand in call.operands)
        results = tuple(result.requires_grad for result in call.results)
        rule = matched.rule or rule_of_whole_tensors(call)
        kernels = op.kernels or ("",) * len(self.sizes)
        per_axis: list[tuple[Strategy, ...]] = []
        for axis, ranks in enumerate(self.sizes):
            here = tuple(layout[axis] for layout in op.operands)
            after = tuple(layout[axis] for layout in op.results)
            tiles = _tiles(rule, here + after, ranks) if matched.rule is not None else ()
            per_axis.append(
                tuple(
                    strategy
                    for strategy in strategies(rule, tiles, operands, results, ranks)
                    if (strategy.operands, strategy.results) == (here, after)
                    and (strategy.kernel.name if strategy.kernel else "") == kernels[axis]
                )
            )
        if not all(per_axis):
            return False
        # Whether sizes that the inputs decide divide was looked at when it was planned: the
        # program computes the parts of any size.
        shapes = [
            tuple(0 if isinstance(size, Sym) else size for size in value.shape)
            for value in (*call.operands, *call.results)
        ]
        return bool(joint_strategies(rule, per_axis, shapes, self.sizes))

    def read(self, name: str, layout: Layout, reader: str) -> None:
        """Note that a value is read in a layout, which it may have to be brought to."""
        if layout != self.made[name]:
            self.wanted.setdefault((name, layout), {})[reader] = None

    def outputs(self) -> None:
        """Check the layouts of what is returned: whole; beside a loss, also in plain parts."""
        graph = self.graph
        values = [graph.values[name] for name in graph.outputs]
        if len(self.plan.outputs) != len(values):
            raise wrong_plan(self.plan.model, "", f"it returns {len(values)} tensors")
        has_loss = any(not value.shape and value.requires_grad for value in values)
        for value, layout in zip(values, self.plan.outputs, strict=True):
            why = why_no_layout(layout, value.shape, self.sizes)
            in_parts = [placement for placement in layout if placement != Invariant()]
            plain = all(isinstance(part, Shard) and part == Shard(part.dim) for part in in_parts)
            if not plain or (in_parts and (self.captured.part or not has_loss)):
                why = why or "the caller reads it whole"
            if why:
                raise wrong_plan(f"return of {value}", "", f"{layout_text(layout)}: {why}")
        self.returned()

    def returned(self) -> None:
        """Note in which layouts values are returned, and written to buffers."""
        for name, layout in zip(self.graph.outputs, self.plan.outputs, strict=True):
            self.read(name, layout, "return")
        for path, name in self.graph.mutations:
            self.read(name, self.whole, f"write {path}")

    def conversions(self) -> None:
        """Check that every value gets to its readers, by steps that there are."""
        rows = {(item.value, item.target): item for item in self.plan.conversions}
        if len(rows) < len(self.plan.conversions):
            raise wrong_plan(self.plan.model, "", "it converts a value to one layout twice")
        for name, layout in {**dict.fromkeys(rows), **dict.fromkeys(self.wanted)}:
            what = f"conversion of {name:.80} to {layout_text(layout)}"
            readers = self.wanted.get((name, layout))
            if readers is None:
                raise wrong_plan(what, "", "nothing reads it so")
            producer = self.graph.producers[name]
            where = ", ".join(text for text in (producer.where, producer.line) if text)
            row = rows.get((name, layout))
            if row is None:
                raise wrong_plan(
                    what, where, f"there is none, and {', '.join(readers)} reads it so"
                )
            why = self.why_no_conversion(row, self.graph.values[name], tuple(readers))
            why = why or self.why_no_beginning(row)
            if why:
                raise wrong_plan(what, where, why)

    def why_no_conversion(self, row: Conversion, value: Value, readers: tuple[str, ...]) -> str:
        """Return why a conversion is not one of this value; "" if it is."""
        if row.source != self.made[value.name]:
            return f"it is made as {layout_text(self.made[value.name])}"
        told = (row.readers, row.requires_grad, row.shape)
        if told != (readers, value.requires_grad, ", ".join(map(str, value.shape))):
            return f"it is {value}, which {', '.join(readers)} reads"
        is_parameter = self.graph.producers[value.name].kind == "parameter"
        if row.together and not is_parameter:
            return "the gradients of parameters alone are reduced together"
        if len(row.steps) > _MOST_STEPS * len(self.sizes):
            return f"{len(row.steps)} steps"
        layout = row.source
        for step in row.steps:
            if step.axis >= len(layout) or layout[step.axis] != step.source:
                return f"step {step} does not begin at {layout_text(layout)}"
            # A part of a part is no piece that a collective can move.
            if not is_possible_step(layout, step):
                return f"step {step} moves what an inner axis has cut"
            layout = step.applied(layout)
            why = why_no_layout(layout, value.shape, self.sizes)
            if why:
                return f"step {step}: {why}"
            if isinstance(step.target, Partial) and value.dtype == torch.bool:
                return f"step {step}: truth values have no sum"
        if layout != row.target:
            return f"its steps end at {layout_text(layout)}"
        return ""

    def why_no_beginning(self, row: Conversion) -> str:
        """Return why a conversion cannot begin ahead of its use as it says; "" if it can."""
        if row.distance and not (row.begins and row.again):
            return "only a dropped copy that begins ahead is made again ahead"
        if not row.begins:
            return ""
        places = {node.name: index for index, node in enumerate(self.graph.calls)}
        first = min((places[name] for name in row.readers if name in places), default=-1)
        if self.graph.producers[row.value].kind != "parameter":
            return "only a parameter is there before the first op"
        if places.get(row.begins, len(places)) > first:
            return f"it begins at {row.begins:.80}, which does not come before what reads it"
        last = row.steps[begun_steps(row.steps) - 1 :][:1]
        if not last or last[0].forward is not Movement.ALL_GATHER:
            return "it is not gathered, and has nothing that could begin"
        return ""

    def recomputed(self) -> None:
        """Check that what is recomputed together lies together."""
        places = {node.name: index for index, node in enumerate(self.graph.calls)}
        taken: set[str] = set()
        for group in self.plan.recomputed:
            where = [places.get(name, -1) for name in group]
            if not group or where != list(range(where[0], where[0] + len(group))) or where[0] < 0:
                raise wrong_plan(
                    f"recomputation of {', '.join(group)[:200]}", "", "these ops are no neighbours"
                )
            if taken & set(group):
                raise wrong_plan(f"recomputation of {group[0]}", "", "two groups have the same op")
            taken.update(group)

    def remade(self, matched: Mapping[str, MatchedCall]) -> None:
        """Check that what is made again by itself comes out the same, and says nothing to other
        ranks.
        """
        taken = {name for group in self.plan.recomputed for name in group}
        choices = {op.name: op for op in self.plan.ops}
        nodes = {node.name: node for node in self.graph.calls}
        for name in self.plan.remade:
            why = ""
            if name not in nodes:
                why = "there is no such op"
            elif name in taken:
                why = "it is recomputed with others"
            elif len(nodes[name].results) != 1:
                why = "it has several results"
            elif any(choices[name].kernels):
                why = "its kernel communicates"
            elif (rule := matched[name].rule) is not None and rule.random:
                why = "it draws random numbers"
            if why:
                raise wrong_plan(f"{name} is made again", "", why)


def _tiles(rule: ShardingRule, placements: Iterable[object], ranks: int) -> Iterator[LoopSplit]:
    """Yield the splits of loops that give one of an op's tensors the placement that it has."""
    for dims, placement in zip((*rule.operands, *rule.results), placements, strict=True):
        if isinstance(placement, Shard):
            tile = tile_of(rule, dims, placement, ranks)
            if tile is not None:
                yield tile
