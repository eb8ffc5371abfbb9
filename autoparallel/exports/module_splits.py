"""The splits of a plan that can be said module by module: column, row, rows of a table.

Torch's parallelize_module and transformers' tp_plan give a module parts of its parameters and leave
the user's Python between the modules as it is. So two things must be proven of every value between
a column-parallel and a row-parallel module: that all ops in between may work on parts (their rules
say so), and that the user's code, when its weights are parts, computes tensors of just the parts'
sizes. A `view(batch, sequence, heads, -1)` would compute something else without a word. Therefore
the model is traced once more with weights of the local sizes, and compared op by op. Where either
proof fails, the module gathers its own result, which is right whatever the code around it does.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from autoparallel.capture.example_inputs import find_example_inputs, split_example
from autoparallel.capture.global_reads import undisturbed
from autoparallel.capture.graph_breaks import trace
from autoparallel.cost.hardware import find_hardware
from autoparallel.errors import AutoParallelError, PlanError
from autoparallel.exports.module_split import ModuleSplit, ModuleSplits, folded_pattern
from autoparallel.graph.graph import Graph, Node, hint
from autoparallel.graph.size_hints import with_larger_hints
from autoparallel.mesh import Mesh
from autoparallel.placement import Partial, Placement, Shard
from autoparallel.plan import ParameterChoice, Plan
from autoparallel.rewrite.emitted_program import require_graph
from autoparallel.rules.lookup import find_rule
from autoparallel.strategy.build_network import build_network
from autoparallel.strategy.cost_network import CostNetwork
from autoparallel.support.torch_private import tree_map

__all__ = ["module_splits"]


def module_splits(
    plan: Plan, model: nn.Module, *, axis: str | None = None, example_inputs: Any = None
) -> ModuleSplits:
    """Return the splits of a plan, module by module, of those modules that have their own product.

    plan: with its graph. model: the one that was planned. axis: of the mesh; by default the last.
    example_inputs: as for make_plan. Raises PlanError for an axis that the mesh does not have.

    Example: `module_splits(plan, model).modules[0].kind`
    """
    if plan.breaks:
        raise PlanError(
            f"the plan for {plan.model} has parts, between which runs the user's Python",
            fix="export the plan of one part for its module: plan.parts[0].plan",
        )
    names = [name for name, _ in plan.mesh.axes]
    if axis is not None and axis not in names:
        raise PlanError(f"the mesh has no axis {axis!r}", fix=f"say {' or '.join(names)}")
    place = names.index(axis) if axis is not None else len(names) - 1
    finder = _Finder(plan, model, place)
    finder.find_candidates()
    finder.settle()
    finder.prove(example_inputs)
    finder.tell_the_rest()
    return ModuleSplits(
        names[place],
        plan.mesh.axes[place][1],
        tuple(finder.splits[path] for path in finder.order if path in finder.splits),
        tuple(dict.fromkeys(map(folded_pattern, finder.missing))),
    )


@dataclass
class _Finder:
    """The search for what can be said module by module.

    axis: the number of the mesh axis. splits: by the module's path. order: of the paths, as in the
    model. missing: what cannot be said. layouts: of every value, when only the modules in `splits`
    are split; None for a whole one. sources: of a split value, the modules whose splits it is of.
    products: the module of each product. weights: the split of each parameter, by its node.
    """

    plan: Plan
    model: nn.Module
    axis: int
    splits: dict[str, ModuleSplit] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    layouts: dict[str, Shard | None] = field(default_factory=dict)
    sources: dict[str, frozenset[str]] = field(default_factory=dict)
    products: dict[str, str] = field(default_factory=dict)
    weights: dict[str, tuple[str, Shard]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.captured = require_graph(self.plan)
        self.world_size = self.plan.mesh.axes[self.axis][1]
        options = replace(
            self.plan.options, memory_limit=None, constraints=(), recompute="model",
            sequence_parallel=True, data_parallel=False,
        )  # fmt: skip
        graph = with_larger_hints(self.captured, options.tokens)
        self.network: CostNetwork = build_network(
            graph, Mesh(tp=self.world_size), find_hardware(options.hardware), options
        )
        self.graph: Graph = graph

    def find_candidates(self) -> None:
        """Take the modules that have one product with their own weight, which the plan splits."""
        by_module: dict[str, dict[str, ParameterChoice]] = {}
        for parameter in self.plan.parameters:
            module, _, name = parameter.path.rpartition(".")
            by_module.setdefault(module, {})[name] = parameter
        tied = self._tied()
        for module, parameters in by_module.items():
            split = {
                name: parameter
                for name, parameter in parameters.items()
                if isinstance(parameter.storage[self.axis], Shard)
            }
            if not split:
                continue
            told = ", ".join(f"{p.path} is {p.storage[self.axis]}" for p in split.values())
            if any(parameter.path in tied for parameter in split.values()):
                self.missing.append(f"{told}: it is tied to another module's, and stays whole")
                continue
            why = self._candidate(module, parameters, split)
            if why:
                self.missing.append(f"{told}: {why}, and it stays whole")

    def _tied(self) -> set[str]:
        """Return the paths of parameters that several modules share."""
        named = self.model.named_parameters(remove_duplicate=False)
        paths: dict[int, list[str]] = {}
        for path, parameter in named:
            paths.setdefault(id(parameter), []).append(path)
        return {path for group in paths.values() if len(group) > 1 for path in group}

    def _candidate(
        self,
        module: str,
        parameters: Mapping[str, ParameterChoice],
        split: Mapping[str, ParameterChoice],
    ) -> str:
        """Add the split of one module. Return why there is none, "" where there is one."""
        if set(parameters) - {"weight", "bias"} or "weight" not in split:
            return "its module has other parameters than a weight and a bias"
        weight = parameters["weight"]
        readers = self.graph.readers[weight.name]
        if len(weight.shape) != 2 or len(readers) != 1:
            return "no single product reads it"
        (product,) = readers
        shard = weight.storage[self.axis]
        assert isinstance(shard, Shard)
        rule = self.network.rules[product.name]
        if rule is None:
            return f"nothing is known of {product.target}"
        loops = rule.operands[product.operands().index(weight.name)]
        table = product.target.startswith("aten.embedding")
        if not table and not rule.flops:
            return f"{product.target} reads it before the product does"
        # What is computed by another module's code is not seen by who splits this one.
        for parameter in parameters.values():
            for reader in self.graph.readers[parameter.name]:
                if reader.where != module and not reader.where.startswith(f"{module}."):
                    place = reader.where or "the model"
                    return f"{parameter.path} is read in {place}, and not in its own module alone"
        loop = loops[shard.dim]
        own = [dims for dims in rule.results if any(loop == other for other in dims)]
        kind = ("features" if own else "table") if table else ("column" if own else "row")
        bias = parameters.get("bias")
        bias_dim = 0 if kind == "column" and bias is not None else None
        if weight.shape[shard.dim] % self.world_size:
            return f"{weight.shape[shard.dim]} elements do not divide by {self.world_size} ranks"
        # Other than contiguous equal parts is a layout that torch's Shard does not name.
        gathered = kind in ("column", "row") and (shard.blocks, shard.repeat) != (1, 1)
        if gathered:
            self.missing.append(
                f"{weight.path} is {shard}: its parts are contiguous here, and the whole "
                f"{'result is gathered' if kind == 'column' else 'input is cut'} in the module"
            )
        self.splits[module] = ModuleSplit(module, kind, shard.dim, bias_dim, gathered)
        self.order.append(module)
        self.products[product.name] = module
        self.weights[weight.name] = (module, Shard(shard.dim))
        if bias is not None and bias_dim is not None:
            self.weights[bias.name] = (module, Shard(0))
        return ""

    def settle(self) -> None:
        """Follow the splits through the graph, and gather in the module what goes no further."""
        while (failed := self._follow()) is not None:
            node, modules = failed
            self._gather(modules, f"{node.target} in {node.where or 'the model'} takes no part of")

    def _gather(self, modules: frozenset[str], why: str) -> None:
        """Let modules gather their results, or cut their inputs, by themselves."""
        for path in sorted(modules):
            split = self.splits[path]
            if not split.gathered and split.kind in ("column", "row"):
                self.splits[path] = replace(self.splits[path], gathered=True)
                kind = "result is gathered" if split.kind == "column" else "input is cut"
                self.missing.append(f"{path}: its {kind} in the module, as {why} it")

    def _follow(self) -> tuple[Node, frozenset[str]] | None:
        """Set the layout of every value. Return the first op that cannot work on the parts that it
        reads, with the modules that made them; None where all can.
        """
        self.layouts, self.sources = {}, {}
        for node in self.graph.nodes:
            if node.kind != "call":
                self.layouts[node.result.name] = None
                continue
            failed = self._call(node)
            if failed is not None:
                return node, failed
        for name in self.graph.outputs:
            if self.layouts[name] is not None:
                return self.graph.producers[name], self.sources[name]
        return None

    def _call(self, node: Node) -> frozenset[str] | None:
        """Set the layouts of the results of one call. Return the modules that it cannot follow."""
        module = self.products.get(node.name)
        split = self.splits[module] if module is not None else None
        operands: list[Placement | None] = []
        sources: frozenset[str] = frozenset()
        for name in node.operands():
            layout = self.layouts[name]
            if name in self.weights:
                owner, shard = self.weights[name]
                # Inside of the module that gathers, nothing leaves it in parts.
                layout = None if self.splits[owner].gathered else shard
                sources |= {owner} if layout is not None else frozenset()
            elif layout is not None:
                sources |= self.sources[name]
            operands.append(layout)
        if split is not None and split.kind in ("table", "features"):
            self._set(node, [None] * len(node.results), frozenset())
            return None
        if split is not None and not split.gathered:
            assert module is not None
            if split.kind == "row" and not any(
                layout is not None and name not in self.weights
                for name, layout in zip(node.operands(), operands, strict=True)
            ):
                return frozenset({module})
            sources |= {module}
        if all(layout is None for layout in operands):
            self._set(node, [None] * len(node.results), frozenset())
            return None
        results = self._results(node, operands)
        if results is None:
            return sources
        if any(isinstance(result, Partial) for result in results):
            # A sum that is pending is reduced where the row-parallel module ends, and nowhere else.
            if split is None or split.kind != "row":
                return sources
            self._set(node, [None] * len(results), frozenset())
            return None
        if split is not None and split.kind == "row":
            return sources
        self._set(node, [r if isinstance(r, Shard) else None for r in results], sources)
        return None

    def _set(self, node: Node, layouts: list[Shard | None], sources: frozenset[str]) -> None:
        """Note the layouts of a call's results."""
        for value, layout in zip(node.results, layouts, strict=True):
            self.layouts[value.name] = layout
            if layout is not None:
                self.sources[value.name] = sources

    def _results(
        self, node: Node, operands: list[Placement | None]
    ) -> tuple[Placement, ...] | None:
        """Return what an op makes of these operands, None where no strategy takes them so."""
        for joint in self.network.strategies[node.name]:
            if any(joint.kernels):
                continue
            alone = [layout[0] for layout in joint.operands]
            fits = all(
                have == want if have is not None else not isinstance(want, Shard | Partial)
                for have, want in zip(operands, alone, strict=True)
            )
            if fits and any(isinstance(layout[0], Shard | Partial) for layout in joint.results):
                return tuple(layout[0] for layout in joint.results)
        return None

    def prove(self, example_inputs: Any) -> None:
        """Trace the model with parts for weights, and compare the sizes of all values.

        What has other sizes than the plan's parts is gathered; then it is tried again.
        """
        while any(self._leaves_parts(split) for split in self.splits.values()):
            try:
                local = self._traced(example_inputs)
            except AutoParallelError as error:
                why = f"the code cannot run on parts ({error.what}) of"
                self._gather(frozenset(self.splits), why)
                self.settle()
                return
            failed = self._mismatch(local)
            if failed is None:
                return
            node, modules = failed
            where = node.where or "the model"
            self._gather(modules, f"{node.target} in {where} has sizes of its own for")
            self.settle()

    def _leaves_parts(self, split: ModuleSplit) -> bool:
        """Return whether the code around a module sees parts of tensors."""
        return not split.gathered and split.kind in ("column", "row")

    def _traced(self, example_inputs: Any) -> Graph:
        """Return the graph of the model with the parts of one rank for its weights."""
        memo: dict[int, Any] = {}
        for path, parameter in self.model.named_parameters():
            shape = list(parameter.shape)
            module, _, name = path.rpartition(".")
            split = self.splits.get(module)
            if split is not None and self._leaves_parts(split):
                dim = split.weight_dim if name == "weight" else split.bias_dim
                if dim is not None:
                    shape[dim] //= self.world_size
            part = torch.empty(shape, dtype=parameter.dtype, device="meta")
            memo[id(parameter)] = nn.Parameter(part, parameter.requires_grad)
        for buffer in self.model.buffers():
            memo[id(buffer)] = buffer.to("meta")
        local = copy.deepcopy(self.model, memo)
        for split in self.splits.values():
            if self._leaves_parts(split) and split.kind == "column":
                self._shrink(local.get_submodule(split.path), split)
        found = find_example_inputs(self.model) if example_inputs is None else example_inputs
        args, kwargs = tree_map(
            lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf,
            split_example(found),
        )
        with undisturbed(local):
            return trace(local, args, kwargs, known=find_rule).graph

    def _shrink(self, module: nn.Module, split: ModuleSplit) -> None:
        """Let a module's own numbers for the size of its result be those of the part.

        Inside of a split module code works on DTensors, which have the sizes of the whole.
        """
        whole = self.model.get_submodule(split.path).get_parameter("weight")
        size = whole.shape[split.weight_dim]
        for name, value in vars(module).items():
            if type(value) is int and value == size:
                vars(module)[name] = size // self.world_size

    def _mismatch(self, local: Graph) -> tuple[Node, frozenset[str]] | None:
        """Return the first op whose results are not the parts, with the modules that it follows."""
        whole = self.captured.graph
        held: frozenset[str] = frozenset()
        for node, other in zip(whole.calls, local.calls, strict=False):
            sources = frozenset(
                s for value in node.results for s in self.sources.get(value.name, frozenset())
            )
            held = sources or held
            if node.target != other.target or len(node.results) != len(other.results):
                return node, held or frozenset(self.splits)
            for value, part in zip(node.results, other.results, strict=True):
                layout = self.layouts[value.name]
                shape = [hint(size) for size in value.shape]
                if layout is not None:
                    shape[layout.dim] //= self.world_size
                if shape != [hint(size) for size in part.shape]:
                    return node, held or frozenset(self.splits)
        if len(whole.calls) != len(local.calls):
            return whole.calls[-1], frozenset(self.splits)
        return None

    def tell_the_rest(self) -> None:
        """Say what else the plan has that is not said module by module."""
        others = [name for index, (name, size) in enumerate(self.plan.mesh.axes)
                  if index != self.axis and size > 1]  # fmt: skip
        if others:
            self.missing.append(
                f"what is split on {' and '.join(others)}: data parallelism is another wrapper's "
                "(fully_shard, DistributedDataParallel)"
            )
        sent = [
            conversion
            for conversion in self.plan.conversions
            if any(
                isinstance(layout[self.axis], Shard)
                for layout in (conversion.source, conversion.target)
            )
            and conversion.value not in {p.name for p in self.plan.parameters}
        ]
        if sent:
            self.missing.append(
                f"{len(sent)} activations that the plan splits outside of the products (sequence "
                "parallelism): they are whole between the modules here"
            )
        if any(mode != "none" for _, mode in self.plan.recompute):
            self.missing.append("which blocks are recomputed: the model's own checkpoints decide")
