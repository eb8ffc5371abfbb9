"""From an exported program to a Graph; opaque calls become copies of the block they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import nn

from autoparallel.capture.autocast import casts_of
from autoparallel.capture.block_folding import Folding
from autoparallel.capture.block_regions import MARKS, OPAQUE, Regions, base_of
from autoparallel.capture.canonical_order import in_canonical_order
from autoparallel.capture.graph_builder import GraphBuilder
from autoparallel.capture.held_tensors import HeldTensors
from autoparallel.capture.source_locations import source_line
from autoparallel.errors import CaptureError
from autoparallel.graph.graph import Graph, Node, Ref, Sym, Value, leaves, map_leaves
from autoparallel.support.torch_private import (
    OpOverload,
    guards_of,
    hint_of,
    schema_of,
    tree_leaves,
)

__all__ = ["Importer"]


class Importer:
    """Translates an exported program into a Graph.

    program: exported from a module whose attribute `model` is the user's model. builder: an empty
    one, which gets the nodes. model: the user's. folding: how its blocks were hidden. held: the
    tensors that no constant may be. trained_inputs: of each input, whether it needs a gradient.
    """

    def __init__(
        self,
        program: Any,
        builder: GraphBuilder,
        *,
        model: nn.Module,
        folding: Folding,
        held: HeldTensors,
        trained_inputs: Sequence[bool],
    ) -> None:
        self.program, self.builder, self.model = program, builder, model
        self.folding, self.held, self.trained_inputs = folding, held, trained_inputs
        self.regions = Regions(folding, builder)
        self.constants: dict[str, torch.Tensor] = {}
        self.guards: tuple[sympy.Basic, ...] = ()
        self.autocast: tuple[str, torch.dtype] | None = None

    def graph(self) -> Graph:
        """The verified graph. Raises CaptureError, and Unfoldable where hiding was not right."""
        signature = self.program.graph_signature
        module = self.program.graph_module
        self.read_guards(module)
        for node in module.graph.nodes:
            if node.op == "placeholder" and node.name in signature.user_inputs:
                number = len(self.builder.nodes)
                grad = self.trained_inputs[number]
                self.builder.stored("input", str(number), node.meta["val"], grad, node)
        # Inputs are named before parameters are, and stand behind them.
        inputs = self.builder.nodes
        self.builder.nodes, self.builder.grad_enabled = [], []
        self.attributes(signature, module)
        self.builder.nodes += inputs
        self.builder.grad_enabled += self.trained_inputs
        for node in inputs:
            for size in node.result.shape:
                self.builder.input_symbols |= (
                    size.expr.free_symbols if isinstance(size, Sym) else set()
                )
        self.guards = tuple(
            guard for guard in self.guards if guard.free_symbols <= self.builder.input_symbols
        )
        returned = self.body(module, grad=True)
        outputs: list[str] = []
        mutations: list[tuple[str, str]] = []
        for spec, leaf in zip(signature.output_specs, returned, strict=True):
            kind = spec.kind.name
            if kind == "BUFFER_MUTATION":
                mutations.append((spec.target.removeprefix("model."), leaf.name))
            elif kind == "USER_OUTPUT":
                outputs.append(leaf.name)
            else:
                raise CaptureError(
                    f"the model writes to {spec.target or 'one of its inputs'} in its forward",
                    why=f"export reports {kind}",
                    fix="return the new value instead",
                )
        graph = Graph(tuple(self.builder.nodes), tuple(outputs), tuple(mutations))
        self.regions.check(graph)
        return in_canonical_order(graph.verify(), self.builder).verify()

    def attributes(self, signature: Any, module: Any) -> None:
        """Parameters and buffers, seen by the tracer or hidden, in the model's order; constants.

        A tensor that has several paths is known by the last one, as export has it.
        """
        seen = {node.name: node for node in module.graph.nodes if node.op == "placeholder"}
        holes = {
            target.removeprefix("model."): seen[name]
            for name, target in (
                *signature.inputs_to_parameters.items(),
                *signature.inputs_to_buffers.items(),
            )
        }
        hidden = tuple(f"{path}." for path in self.folding.hidden)
        parameters = self.model.named_parameters(remove_duplicate=False)
        buffers = self.model.named_buffers(remove_duplicate=False)
        stored: list[tuple[str, str, torch.Tensor]] = [
            *(("parameter", *named) for named in parameters),
            *(("buffer", *named) for named in buffers),
        ]
        for kind, path, tensor in stored:
            if path in holes or path.startswith(hidden):
                example = holes[path].meta["val"] if path in holes else tensor
                trained = kind == "parameter" and tensor.requires_grad
                name = self.builder.stored(kind, path, example, trained, holes.get(path))
                self.builder.tensor_ids[name] = id(tensor)
                self.builder.names_of_tensors[id(tensor)] = name
        self.require_all(stored)
        for node in holes.values():
            self.builder.translated[node] = Ref(
                self.builder.names_of_tensors[
                    self.builder.tensor_ids[self.builder.translated[node].name]
                ]
            )
        kept: dict[Any, Ref] = {}
        for hole, target in signature.inputs_to_lifted_tensor_constants.items():
            value = self.program.constants[target]
            self.require_constant(value)
            path = target.removeprefix("model.")
            place, _, last = path.rpartition("lifted_tensor_")
            content: Any = path
            if last.isdigit() and not value.is_meta:
                content = (value.dtype, tuple(value.shape), value.device, str(value.tolist()))
                path = f"{place}lifted_tensor_{len(kept)}"
            if content not in kept:
                kept[content] = Ref(
                    self.builder.stored("constant", path, seen[hole].meta["val"], False)
                )
                self.constants[path] = value
                self.builder.lifted.add(kept[content].name)
            self.builder.translated[seen[hole]] = kept[content]

    def require_all(self, stored: list[tuple[str, str, torch.Tensor]]) -> None:
        """Raises CaptureError for a parameter or buffer that the program does not know of."""
        for kind, path, tensor in stored:
            if id(tensor) not in self.builder.names_of_tensors:
                if self.folding.groups:
                    raise self.folding.fail(f"the tracer does not see {kind} {path}")
                raise CaptureError(
                    f"the tracer does not see {kind} {path}",
                    why="it is none of those that the module itself lists",
                    fix="do not override named_parameters, named_buffers or named_modules",
                )

    def require_constant(self, value: torch.Tensor) -> None:
        """Raises CaptureError for a constant that is memory of a parameter or buffer."""
        error = self.held.refusal(value)
        if error is not None:
            if self.folding.groups:
                raise self.folding.fail(error.what)
            raise error

    def body(self, module: Any, grad: bool) -> tuple[Any, ...]:
        """Translate the calls of one (sub)graph. Returns what it returns."""
        for node in module.graph.nodes:
            if node.op == "get_attr":
                self.builder.translated[node] = getattr(module, node.target)
            elif node.op == "call_function":
                self.call(node, grad)
            elif node.op == "output":
                found = self.builder.leaf_all(node.args[0])
                return found if isinstance(found, tuple) else (found,)
        raise AssertionError("a graph without an output")

    def call(self, node: Any, grad: bool) -> None:
        target = node.target
        name = str(target)
        if name.startswith("aten._assert_tensor_metadata") or name in _GUARDS:
            return
        if name in MARKS:
            self.regions.mark(node, name)
            return
        if name == OPAQUE:
            self.regions.copy(node)
            return
        example = node.meta.get("val")
        if isinstance(example, (torch.SymInt, int, torch.SymFloat, torch.SymBool)):
            if not isinstance(example, int) and hint_of(example) is None:
                path, line = self.builder.origins.path(node), source_line(node)
                raise CaptureError(
                    "the forward computes with a tensor's value in Python",
                    where=f"{line}  in {path}" if path else line,
                    why="the value is not known before the model runs (.item(), int(), float())",
                    fix="keep it a tensor of no dims, which broadcasts as a number does",
                )
            self.builder.translated[node] = self.builder.scalar(example)
            return
        if getattr(target, "__name__", "") == "getitem":
            source = self.builder.translated[node.args[0]]
            self.builder.translated[node] = source[node.args[1]]
            return
        if name in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            self.inline(node, name, grad)
            return
        if not isinstance(target, OpOverload):
            raise CaptureError(
                f"{name} is no operator of tensors alone",
                where=self.builder.origins.where(node),
                why="control flow and function transforms (torch.cond, torch.func.vmap) hold "
                "programs of their own",
                fix="keep it in a submodule of its own, which then stays Python",
            )
        args = self.builder.leaf_all(node.args)
        kwargs = tuple((key, self.builder.leaf_all(value)) for key, value in node.kwargs.items())
        if name == "aten.slice.Tensor":
            # x[:, :3] is traced in two ways, even in equal blocks: with a slice of all rows, and
            # without; from 0, and from None.
            if grad and self.builder.shape(example) == self.builder.values[args[0].name].shape:
                self.builder.translated[node] = args[0]
                return
            args = (*args[:2], 0, *args[3:]) if args[2:] and args[2] is None else args
        if self.autocast is not None:
            args, kwargs = self.cast(node, args, kwargs, grad)
        written = _written(target, args)
        probe = Node("", "call", name, (), args, kwargs)
        flows = self.builder.records(probe, grad)
        single = isinstance(example, torch.Tensor)
        if example is None and not schema_of(target).is_mutable:
            return  # it only checks its operands
        if example is None:
            raise CaptureError(
                f"{name} writes to tensors and returns none",
                where=self.builder.origins.where(node),
                why=f"it writes to {', '.join(written)}; a graph is of values that are returned",
                fix="use an op that returns what it makes, for each tensor",
            )
        own = self.builder.fresh(base_of(node.name), 1 if single else len(example))
        if single:
            results: tuple[Value, ...] = (self.builder.value(own, example, flows),)
            self.builder.translated[node] = Ref(own)
        else:
            results = tuple(
                self.builder.value(f"{own}_{index}", item, flows)
                for index, item in enumerate(example)
            )
            self.builder.translated[node] = tuple(Ref(value.name) for value in results)
        scope, line = self.builder.origins.scope(node), source_line(node)
        made = Node(own, "call", name, results, args, kwargs, scope, line)
        self.builder.add(made, grad)
        self.builder.follow(made, written, flows)
        self.builder.frames[own] = self.builder.origins.frames(node)

    def cast(self, node: Any, args: Any, kwargs: Any, grad: bool) -> tuple[Any, Any]:
        """The arguments of a call under autocast, after explicit casts that do the same."""
        assert self.autocast is not None
        if self.folding.groups:
            raise self.folding.fail("an autocast region, in which equal blocks may not be equal")
        device, dtype = self.autocast
        examples = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda item: item.meta["val"])
        found: dict[int, torch.dtype] | None = None
        places = {
            leaf.device.type for leaf in tree_leaves(examples) if isinstance(leaf, torch.Tensor)
        }
        if places <= {device}:
            found = casts_of(node.target, *examples, device, dtype)
        if found is None:
            on = ", ".join(sorted(places))
            raise CaptureError(
                f"what autocast does to {node.target} cannot be told",
                where=self.builder.origins.where(node),
                why=f"the region is for {device}, and the model is on {on}"
                if places != {device}
                else "casts of its operands do not explain it",
                fix="cast explicitly, or run the whole model in the lower precision",
            )
        place = -1
        scope, line = self.builder.origins.scope(node), source_line(node)

        def leaf(item: Any) -> Any:
            nonlocal place
            if not isinstance(item, Ref):
                return item
            place += 1
            if place not in found or found[place] == self.builder.values[item.name].dtype:
                return item
            own = self.builder.fresh(f"{item.name}_cast")
            flows = grad and self.builder.values[item.name].requires_grad
            value = replace(
                self.builder.values[item.name], name=own, dtype=found[place], requires_grad=flows
            )
            cast = (item, found[place])
            self.builder.writes[own] = ()
            self.builder.frames[own] = self.builder.origins.frames(node)
            self.builder.add(
                Node(own, "call", "aten.to.dtype", (value,), cast, (), scope, line), grad
            )
            return Ref(own)

        return map_leaves(leaf, args), map_leaves(leaf, kwargs)

    def inline(self, node: Any, name: str, grad: bool) -> None:
        """A region that export wraps: its body joins the graph."""
        if name == "wrap_with_set_grad_enabled":
            enabled, module, *operands = node.args
            inner = grad and bool(enabled)
        else:
            enabled, module, operands = node.args[2], node.args[4], list(node.args[5:])
            inner = grad
        body = self.builder.translated[module]
        holes = [item for item in body.graph.nodes if item.op == "placeholder"]
        for hole, operand in zip(holes, operands, strict=True):
            self.builder.translated[hole] = self.builder.leaf_all(operand)
        outer = self.autocast
        if name == "wrap_with_autocast":
            self.autocast = (node.args[0], node.args[1]) if enabled else None
        self.builder.translated[node] = self.body(body, inner)
        self.autocast = outer

    def read_guards(self, module: Any) -> None:
        """What the tracer assumed about sizes, and which expressions are numbers by that."""
        examples = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
        sizes = [size for item in examples for size in getattr(item, "shape", ())]
        symbolic = next((size for size in sizes if not isinstance(size, int)), None)
        if symbolic is None:
            return
        self.guards = tuple(dict.fromkeys(guards_of(symbolic)))
        for guard in self.guards:
            if isinstance(guard, sympy.Eq) and guard.rhs.is_number and not guard.lhs.is_Symbol:
                self.builder.equal_sizes[guard.lhs] = guard.rhs


_GUARDS = {
    "aten.sym_constrain_range_for_size.default",
    "aten.sym_constrain_range.default",
    "aten._assert_scalar.default",
    "aten._assert_async.msg",
}


def _written(target: Any, args: tuple[Any, ...]) -> tuple[str, ...]:
    """Names of the values that a call writes to."""
    schema = schema_of(target)
    if schema is None or not schema.is_mutable:
        return ()
    changed = [
        args[index] if index < len(args) else None
        for index, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return tuple(leaf.name for leaf in leaves(tuple(changed)) if isinstance(leaf, Ref))
