"""From an exported program to a Graph, with opaque calls as copies of the blocks they stand for."""

from __future__ import annotations

import types
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import nn

from autoparallel.capture.autocast_regions import AutocastRegions
from autoparallel.capture.block_calls import MARKS, OPAQUE
from autoparallel.capture.block_folding import Folding
from autoparallel.capture.block_regions import Regions, base_of
from autoparallel.capture.branch_ways import BRANCH
from autoparallel.capture.canonical_order import in_canonical_order
from autoparallel.capture.checkpoint_regions import BEGIN, END, CheckpointRegions
from autoparallel.capture.constant_keys import constant_keys
from autoparallel.capture.counted_splits import CHECKS, CountedSplits, is_checked
from autoparallel.capture.custom_functions import function_op
from autoparallel.capture.differentiable_results import differentiable_results
from autoparallel.capture.function_calls import FunctionCalls
from autoparallel.capture.graph_builder import GraphBuilder, written_by
from autoparallel.capture.held_tensors import HeldTensors
from autoparallel.capture.hit_loops import TURN
from autoparallel.capture.hit_turns import HitTurns
from autoparallel.capture.value_places import ValuePlaces
from autoparallel.errors import CaptureError
from autoparallel.graph.graph import Graph, Node, Ref, Sym, Value
from autoparallel.graph.operators import BRANCH_TAKEN
from autoparallel.support.torch_private import (
    OpOverload,
    guards_of,
    hint_of,
    schema_of,
)

__all__ = ["Importer"]


class Importer:
    """Translates an exported program into a Graph, once.

    program: a torch.export.ExportedProgram of a module whose attribute `model` is the user's model,
    with tensors in and tensors out. builder: an empty one, which gets the nodes. model: the user's.
    folding: how its blocks were hidden. held: the tensors that no constant may be. trained_inputs:
    of each input, whether it needs a gradient.

    constants: the tensors that the forward makes from numbers, by the targets of their nodes.
    guards: conditions on the inputs' sizes that the tracer took for granted.

    Example: `Importer(program, GraphBuilder(), model=model, ...).graph()`.
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
        self.checkpoints = CheckpointRegions(folding, builder)
        self.functions = FunctionCalls(builder)
        self.turns = HitTurns(builder)
        self.splits = CountedSplits(builder)
        self.places = ValuePlaces(builder)
        self.constants: dict[str, torch.Tensor] = {}
        self.guards: tuple[sympy.Basic, ...] = ()
        self.autocast = AutocastRegions(builder)

    def graph(self) -> Graph:
        """Return the verified graph, in canonical order.

        Raises CaptureError where a graph cannot say what the program does, and Unfoldable where
        blocks were hidden wrongly.
        """
        signature = self.program.graph_signature
        module = self.program.graph_module
        # All symbolic sizes of a program know of one set of assumptions.
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        examples = [node.meta.get("val") for node in placeholders]
        sizes = (size for item in examples for size in getattr(item, "shape", ()))
        symbolic = next((size for size in sizes if not isinstance(size, int)), None)
        guards = () if symbolic is None else tuple(dict.fromkeys(guards_of(symbolic)))
        self.builder.assume(guards)
        for node in placeholders:
            if node.name in signature.user_inputs:
                number = len(self.builder.nodes)
                grad = self.trained_inputs[number]
                self.builder.stored("input", str(number), node.meta["val"], grad, node)
        # Inputs are named first and stand last, behind the parameters, buffers and constants.
        inputs = self.builder.nodes
        self.builder.nodes, self.builder.grad_enabled = [], []
        self.attributes(signature, module)
        self.builder.nodes += inputs
        self.builder.grad_enabled += self.trained_inputs
        self.builder.input_symbols.update(
            *(
                size.expr.free_symbols
                for node in inputs
                for size in node.result.shape
                if isinstance(size, Sym)
            )
        )
        # Other symbols are sizes that depend on values, of which no call can be asked beforehand.
        self.guards = tuple(
            guard for guard in guards if guard.free_symbols <= self.builder.input_symbols
        )
        returned = self.body(module, grad=True)
        self.functions.require_unwritten()
        self.places.require_unwritten()
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
        self.turns.require_no_trace(graph)
        graph = self.regions.without_patterns(graph).verify()
        anew = bool(self.folding.patterns)
        return in_canonical_order(graph, self.builder, anew).verify()

    def attributes(self, signature: Any, module: Any) -> None:
        """Add the nodes of parameters and buffers, in the model's order, and those of constants.

        signature, module: of the exported program. The tensors of hidden blocks, which the program
        does not know, are added in their places. A tensor that has several paths goes by the last
        one, as export has it. Raises CaptureError for a tensor that can be neither.
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
            tensor_id = self.builder.tensor_ids[self.builder.translated[node].name]
            self.builder.translated[node] = Ref(self.builder.names_of_tensors[tensor_id])
        # Equal blocks make equal constants, of which the traced ones stand for all: constants go by
        # what they are, not by how many there are.
        added: dict[Any, Ref] = {}
        lifted = signature.inputs_to_lifted_tensor_constants
        values = {target: self.program.constants[target] for target in lifted.values()}
        contents = constant_keys(self.model, values)
        for hole, target in lifted.items():
            value, content = values[target], contents[target]
            self.require_constant(value)
            path = target.removeprefix("model.")
            if content != path:
                path = f"{path.rpartition('lifted_tensor_')[0]}lifted_tensor_{len(added)}"
            if content not in added:
                added[content] = Ref(
                    self.builder.stored("constant", path, seen[hole].meta["val"], False)
                )
                self.constants[path] = value
                self.builder.lifted.add(added[content].name)
            self.builder.translated[seen[hole]] = added[content]

    def require_all(self, stored: list[tuple[str, str, torch.Tensor]]) -> None:
        """Raise CaptureError for a parameter or buffer that the program does not know of.

        stored: (kind, path, tensor) of all that the model lists.
        """
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
        """Raise CaptureError for a constant that is memory of a parameter or buffer."""
        error = self.held.refusal(value)
        if error is not None:
            if self.folding.groups:
                raise self.folding.fail(error.what)
            raise error

    def body(self, module: Any, grad: bool) -> tuple[Any, ...]:
        """Translate the calls of one (sub)graph, and return what it returns.

        module: the torch.fx.GraphModule. grad: whether gradients are recorded in it.
        """
        for node in module.graph.nodes:
            if node.op == "get_attr":
                self.builder.translated[node] = getattr(module, node.target)
            elif node.op == "call_function":
                self.call(node, grad)
            elif node.op == "output":
                returned = self.builder.leaf_all(node.args[0])
                return returned if isinstance(returned, tuple) else (returned,)
        raise AssertionError("a graph without an output")

    def call(self, node: Any, grad: bool) -> None:
        """Translate one call of the exported program, of whatever kind it is.

        grad: whether gradients are recorded where it is. Raises CaptureError and Unfoldable.
        """
        name = str(node.target)
        if name.startswith("aten._assert_tensor_metadata") or name in CHECKS:
            return
        if name in MARKS:
            self.regions.mark(node, name)
        elif name == BRANCH:
            self.branch(node)
        elif name == TURN:
            self.turns.mark(node)
        elif name == BEGIN:
            self.checkpoints.begin(node)
        elif name == END:
            self.checkpoints.end()
        elif name == OPAQUE:
            self.regions.copy(node)
        elif isinstance(node.meta.get("val"), (torch.SymInt, int, torch.SymFloat, torch.SymBool)):
            self.number(node)
        elif getattr(node.target, "__name__", "") == "getitem":
            results = self.builder.translated[node.args[0]]
            self.builder.translated[node] = results[node.args[1]]
        elif name in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            self.inline(node, name, grad)
        elif isinstance(node.target, OpOverload):
            self.operator(node, grad)
        else:
            raise CaptureError(
                f"{name} is no operator of tensors alone",
                where=self.builder.origins.where(node),
                why="control flow and function transforms (torch.cond, torch.func.vmap) hold "
                "programs of their own",
                fix="keep it in a submodule of its own, which then stays Python",
            )

    def number(self, node: Any) -> None:
        """Translate a call that returns a number: a size, or what is computed from sizes.

        Raises CaptureError where the number depends on the values of a tensor.
        """
        example = node.meta["val"]
        unknown = not isinstance(example, int) and hint_of(example) is None
        if unknown and is_checked(node):
            return  # such as that a number of true values is not negative
        # A size is known to the tensor that has it, and so is what is computed of sizes alone.
        if unknown and self.places.reads(node):
            return
        if unknown and not (self.of_sizes(node) or self.splits.reads(node)):
            origins = self.builder.origins
            path, line = origins.path(node), origins.line(node)
            raise CaptureError(
                "the forward computes with a tensor's value in Python",
                where=f"{line}  in {path}" if path else line,
                why="the value is not known before the model runs (.item(), int(), float())",
                fix="keep it a tensor of no dims, which broadcasts as a number does",
            )
        self.builder.translated[node] = self.builder.scalar(example)

    def of_sizes(self, node: Any) -> bool:
        """Return whether a number is a tensor's size, or computed of such sizes alone."""
        if str(node.target) == "aten.sym_size.int":
            return True
        return isinstance(node.target, types.BuiltinFunctionType) and all(
            map(self.of_sizes, node.all_input_nodes)
        )

    def operator(self, node: Any, grad: bool) -> None:
        """Translate the call of an op on tensors into a node.

        grad: whether gradients are recorded where it is. Raises CaptureError for an op that writes
        to tensors and returns none.
        """
        target, name, example = node.target, str(node.target), node.meta.get("val")
        builder, grad = self.builder, grad and self.checkpoints.records
        if self.places.looks_up(node, grad):
            return
        args = builder.leaf_all(node.args)
        kwargs = tuple((key, builder.leaf_all(value)) for key, value in node.kwargs.items())
        if name == "aten.slice.Tensor":
            # x[:, :3] is traced in two ways, even in equal blocks: with a slice of all rows, and
            # without; from 0, and from None.
            if grad and builder.shape(example) == builder.values[args[0].name].shape:
                builder.translated[node] = args[0]
                return
            args = (*args[:2], 0, *args[3:]) if args[2:] and args[2] is None else args
        args, kwargs = self.autocast.cast(node, args, kwargs, grad)
        function = function_op(name)
        if function is not None:
            args = self.functions.detached(node, function, args, grad)
        call = self.splits.call(node, Node("", "call", name, (), args, kwargs))
        if example is None and not schema_of(target).is_mutable:
            return  # it only checks its operands
        if example is None:
            raise CaptureError(
                f"{name} writes to tensors and returns none",
                where=builder.origins.where(node),
                why=f"it writes to {', '.join(written_by(call))}; a graph has results alone",
                fix="use an op that returns what it makes, for each tensor",
            )
        if isinstance(example, (list, tuple)) and any(item is None for item in example):
            raise CaptureError(
                f"{name} leaves out one of its results",
                where=builder.origins.where(node),
                why="an op of a graph makes all of them",
                fix="keep the call in a submodule of its own, which then stays Python",
            )
        flows = builder.records(call, grad)
        passes = (
            function.examined.differentiable
            if function is not None
            else differentiable_results(node)
        )
        flows = flows and any(passes)
        single = isinstance(example, torch.Tensor)
        base = base_of(node.name) if function is None else function.name.lower()
        unique = builder.fresh(base, 1 if single else len(example))
        if single:
            results: tuple[Value, ...] = (builder.value(unique, example, flows),)
            builder.translated[node] = Ref(unique)
        else:
            results = tuple(
                builder.value(f"{unique}_{index}", item, flows and passes[index])
                for index, item in enumerate(example)
            )
            builder.translated[node] = tuple(Ref(value.name) for value in results)
        scope, line = builder.origins.scope(node), builder.origins.line(node)
        translated = replace(call, name=unique, results=results, scope=scope, line=line)
        builder.add(translated, grad, builder.origins.frames(node))
        builder.follow(translated, flows)
        if function is not None and any(function.examined.sources):
            self.functions.shared.append((translated, function, len(builder.nodes)))

    def branch(self, node: Any) -> None:
        """Translate the mark of a branch on values into the op that checks it."""
        builder = self.builder
        condition, expected, number = builder.leaf_all(node.args)
        name = builder.fresh("branch")
        result = builder.value(name, node.args[0].meta["val"], False)
        scope, line = builder.origins.scope(node), builder.origins.line(node)
        arguments = (condition, expected, number)
        check = Node(name, "call", BRANCH_TAKEN, (result,), arguments, (), scope, line)
        builder.add(check, False, builder.origins.frames(node))

    def inline(self, node: Any, name: str, grad: bool) -> None:
        """Translate a region without gradient or under autocast: its body joins the graph.

        node: the call of the wrapped body. name: of the wrapper. grad: whether gradients are
        recorded around it. The positions of its arguments are those of torch 2.13.
        """
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
        region = (
            self.autocast.entered(node.args[0], node.args[1], bool(enabled))
            if name == "wrap_with_autocast"
            else nullcontext()
        )
        with region:
            self.builder.translated[node] = self.body(body, inner)
