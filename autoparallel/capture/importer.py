"""From an exported program to a Graph; opaque calls become copies of the block they stand for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import nn

from autoparallel.capture.autocast import casts_of
from autoparallel.capture.block_folding import Folding
from autoparallel.capture.block_regions import MARKS, OPAQUE, Regions, base_of
from autoparallel.capture.held_tensors import HeldTensors
from autoparallel.capture.source_locations import Origins, source_line
from autoparallel.errors import CaptureError
from autoparallel.graph.aliasing import owner_of, shares_memory
from autoparallel.graph.graph import Dim, Graph, Node, Ref, Sym, Value, leaves, map_leaves
from autoparallel.graph.operators import packet_of
from autoparallel.support.torch_private import (
    OpOverload,
    expression_of,
    guards_of,
    hint_of,
    schema_of,
    tree_leaves,
)

__all__ = ["Importer"]


_PREFIXES = {"parameter": "p_", "buffer": "b_", "constant": "c_", "input": "tensors_"}


class Importer:
    """Translates an exported program into a Graph.

    program: exported from a module whose attribute `model` is the user's model. folding: how its
    blocks were hidden. held: the tensors that no constant may be. trained_inputs: of each input,
    whether it needs a gradient. Every name is chosen here, in the order of definition, so that a
    folded program has the names of a fully traced one.
    """

    def __init__(
        self,
        program: Any,
        model: nn.Module,
        folding: Folding,
        held: HeldTensors,
        trained_inputs: Sequence[bool],
    ) -> None:
        self.program, self.model, self.folding, self.held = program, model, folding, held
        self.trained_inputs = trained_inputs
        self.nodes: list[Node] = []
        self.flows: list[bool] = []
        self.known: dict[Any, Any] = {}
        self.sizes: dict[Any, Dim] = {}
        self.counts: dict[str, int] = {}
        self.taken: set[str] = set()
        self.constants: dict[str, torch.Tensor] = {}
        self.own: dict[str, int] = {}
        self.by_tensor: dict[int, str] = {}
        self.lifted: set[str] = set()
        self.writes: dict[str, tuple[str, ...]] = {}
        self.memory: dict[str, str] = {}
        self.written: dict[str, str] = {}
        self.trained: set[str] = set()
        self.symbols: set[Any] = set()
        self.guards: tuple[sympy.Basic, ...] = ()
        self.equal: dict[Any, Any] = {}
        self.origins = Origins()
        self.regions = Regions(self)
        self.autocast: tuple[str, torch.dtype] | None = None

    def graph(self) -> Graph:
        """The verified graph. Raises CaptureError, and Unfoldable where hiding was not right."""
        signature = self.program.graph_signature
        module = self.program.graph_module
        self.read_guards(module)
        for node in module.graph.nodes:
            if node.op == "placeholder" and node.name in signature.user_inputs:
                number = len(self.nodes)
                grad = self.trained_inputs[number]
                self.stored("input", str(number), node.meta["val"], grad, node)
        inputs = self.nodes
        self.nodes, self.flows = [], []
        self.attributes(signature, module)
        self.nodes += inputs
        self.flows += self.trained_inputs
        for node in inputs:
            for size in node.result.shape:
                self.symbols |= size.expr.free_symbols if isinstance(size, Sym) else set()
        self.guards = tuple(guard for guard in self.guards if guard.free_symbols <= self.symbols)
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
        graph = Graph(tuple(self.nodes), tuple(outputs), tuple(mutations))
        self.regions.check(graph)
        return graph.verify()

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
                name = self.stored(kind, path, example, trained, holes.get(path))
                self.own[name] = id(tensor)
                self.by_tensor[id(tensor)] = name
        self.require_all(stored)
        for node in holes.values():
            self.known[node] = Ref(self.by_tensor[self.own[self.known[node].name]])
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
                kept[content] = Ref(self.stored("constant", path, seen[hole].meta["val"], False))
                self.constants[path] = value
                self.lifted.add(kept[content].name)
            self.known[seen[hole]] = kept[content]

    def require_all(self, stored: list[tuple[str, str, torch.Tensor]]) -> None:
        """Raises CaptureError for a parameter or buffer that the program does not know of."""
        for kind, path, tensor in stored:
            if id(tensor) not in self.by_tensor:
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

    def stored(
        self, kind: str, target: str, example: torch.Tensor, grad: bool, node: Any = None
    ) -> str:
        """Add the node of a tensor that is there before the program runs. Returns its name."""
        plain = re.sub(r"[^a-zA-Z0-9]", "_", target).lower()
        name = self.fresh(_PREFIXES[kind] + plain)
        self.nodes.append(Node(name, kind, target, (self.value(name, example, grad),)))
        self.flows.append(grad)
        if node is not None:
            self.known[node] = Ref(name)
        return name

    def fresh(self, base: str, results: int = 1) -> str:
        """The first of base, base_1, base_2, ... that clashes with no value's or node's name."""
        while True:
            count = self.counts.get(base, 0)
            self.counts[base] = count + 1
            name = f"{base}_{count}" if count else base
            if results == 1:
                made = {name}
            else:
                made = {f"{name}_{index}" for index in range(results)}
            if not made & self.taken:
                self.taken |= made
                return name

    def body(self, module: Any, grad: bool) -> tuple[Any, ...]:
        """Translate the calls of one (sub)graph. Returns what it returns."""
        tensors = {value.name: value for node in self.nodes for value in node.results}
        for node in module.graph.nodes:
            if node.op == "get_attr":
                self.known[node] = getattr(module, node.target)
            elif node.op == "call_function":
                self.call(node, tensors, grad)
            elif node.op == "output":
                found = self.leaf_all(node.args[0])
                return found if isinstance(found, tuple) else (found,)
        raise AssertionError("a graph without an output")

    def call(self, node: Any, tensors: dict[str, Value], grad: bool) -> None:
        target = node.target
        name = str(target)
        if name.startswith("aten._assert_tensor_metadata") or name in _GUARDS:
            return
        if name in MARKS:
            self.regions.mark(node, name)
            return
        if name == OPAQUE:
            self.regions.copy(node, tensors)
            return
        example = node.meta.get("val")
        if isinstance(example, (torch.SymInt, int, torch.SymFloat, torch.SymBool)):
            if not isinstance(example, int) and hint_of(example) is None:
                path, line = self.origins.path(node), source_line(node)
                raise CaptureError(
                    "the forward computes with a tensor's value in Python",
                    where=f"{line}  in {path}" if path else line,
                    why="the value is not known before the model runs (.item(), int(), float())",
                    fix="keep it a tensor of no dims, which broadcasts as a number does",
                )
            self.known[node] = self.scalar(example)
            return
        if getattr(target, "__name__", "") == "getitem":
            source = self.known[node.args[0]]
            self.known[node] = source[node.args[1]]
            return
        if name in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            self.inline(node, name, tensors, grad)
            return
        if not isinstance(target, OpOverload):
            raise CaptureError(
                f"{name} is no operator of tensors alone",
                where=self.origins.where(node),
                why="control flow and function transforms (torch.cond, torch.func.vmap) hold "
                "programs of their own",
                fix="keep it in a submodule of its own, which then stays Python",
            )
        args = self.leaf_all(node.args)
        kwargs = tuple((key, self.leaf_all(value)) for key, value in node.kwargs.items())
        if name == "aten.slice.Tensor":
            # x[:, :3] is traced in two ways, even in equal blocks: with a slice of all rows, and
            # without; from 0, and from None.
            if grad and self.shape(example) == tensors[args[0].name].shape:
                self.known[node] = args[0]
                return
            args = (*args[:2], 0, *args[3:]) if args[2:] and args[2] is None else args
        if self.autocast is not None:
            args, kwargs = self.cast(node, args, kwargs, tensors, grad)
        written = _written(target, args)
        probe = Node("", "call", name, (), args, kwargs)
        flows = self.records(probe, grad, tensors)
        single = isinstance(example, torch.Tensor)
        if example is None and not schema_of(target).is_mutable:
            return  # it only checks its operands
        if example is None:
            raise CaptureError(
                f"{name} writes to tensors and returns none",
                where=self.origins.where(node),
                why=f"it writes to {', '.join(written)}; a graph is of values that are returned",
                fix="use an op that returns what it makes, for each tensor",
            )
        own = self.fresh(base_of(node.name), 1 if single else len(example))
        if single:
            results: tuple[Value, ...] = (self.value(own, example, flows),)
            self.known[node] = Ref(own)
        else:
            results = tuple(
                self.value(f"{own}_{index}", item, flows) for index, item in enumerate(example)
            )
            self.known[node] = tuple(Ref(value.name) for value in results)
        self.writes[own] = written
        for memory in written if results else ():
            self.written[results[0].name] = memory
            if flows:
                self.trained.add(owner_of(owner_of(memory, self.written), self.memory))
        if results and shares_memory(name):
            operand = probe.operands()[0]
            self.memory.update((value.name, operand) for value in results)
        scope, line = self.origins.scope(node), source_line(node)
        self.add(Node(own, "call", name, results, args, kwargs, scope, line), grad, tensors)

    def records(self, node: Node, grad: bool, tensors: Mapping[str, Value]) -> bool:
        """Whether a gradient flows back through a call. grad: whether any is recorded there."""
        return grad and not _stops(node.target) and self.carries(node.operands(), tensors)

    def carries(self, operands: tuple[str, ...], tensors: Mapping[str, Value]) -> bool:
        """Whether a gradient flows through one of them, maybe since it was written to."""
        names = [owner_of(name, self.written) for name in operands]
        return any(
            tensors[name].requires_grad or owner_of(name, self.memory) in self.trained
            for name in names
        )

    def cast(
        self, node: Any, args: Any, kwargs: Any, tensors: dict[str, Value], grad: bool
    ) -> tuple[Any, Any]:
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
                where=self.origins.where(node),
                why=f"the region is for {device}, and the model is on {on}"
                if places != {device}
                else "casts of its operands do not explain it",
                fix="cast explicitly, or run the whole model in the lower precision",
            )
        place = -1
        scope, line = self.origins.scope(node), source_line(node)

        def leaf(item: Any) -> Any:
            nonlocal place
            if not isinstance(item, Ref):
                return item
            place += 1
            if place not in found or found[place] == tensors[item.name].dtype:
                return item
            own = self.fresh(f"{item.name}_cast")
            flows = grad and tensors[item.name].requires_grad
            value = replace(tensors[item.name], name=own, dtype=found[place], requires_grad=flows)
            cast = (item, found[place])
            self.writes[own] = ()
            self.add(
                Node(own, "call", "aten.to.dtype", (value,), cast, (), scope, line), grad, tensors
            )
            return Ref(own)

        return map_leaves(leaf, args), map_leaves(leaf, kwargs)

    def add(self, node: Node, grad: bool, tensors: dict[str, Value]) -> None:
        """Append a call. grad: whether gradients are recorded where it is."""
        self.nodes.append(node)
        self.flows.append(grad)
        tensors.update((value.name, value) for value in node.results)

    def inline(self, node: Any, name: str, tensors: dict[str, Value], grad: bool) -> None:
        """A region that export wraps: its body joins the graph."""
        if name == "wrap_with_set_grad_enabled":
            enabled, module, *operands = node.args
            inner = grad and bool(enabled)
        else:
            enabled, module, operands = node.args[2], node.args[4], list(node.args[5:])
            inner = grad
        body = self.known[module]
        holes = [item for item in body.graph.nodes if item.op == "placeholder"]
        for hole, operand in zip(holes, operands, strict=True):
            self.known[hole] = self.leaf_all(operand)
        before, outer = len(self.nodes), self.autocast
        if name == "wrap_with_autocast":
            self.autocast = (node.args[0], node.args[1]) if enabled else None
        self.known[node] = self.body(body, inner)
        self.autocast = outer
        for item in self.nodes[before:]:
            tensors.update((value.name, value) for value in item.results)

    def leaf_all(self, item: Any) -> Any:
        """Arguments with nodes replaced by what they stand for; lists become tuples."""
        if isinstance(item, torch.fx.Node):
            if item not in self.known:
                raise CaptureError(
                    f"the program holds an object that is no tensor: {item.name}",
                    why="its type is " + type(item.meta.get("val")).__name__,
                    fix="make it outside of the model, or keep what uses it in a submodule of its "
                    "own, which then stays Python",
                )
            return self.known[item]
        if isinstance(item, (list, tuple)):
            return tuple(self.leaf_all(part) for part in item)
        if isinstance(item, slice):
            raise AssertionError("a slice in an aten call")
        return item

    def scalar(self, example: Any) -> Any:
        if isinstance(example, (torch.SymInt, torch.SymFloat)):
            return self.size(example)
        return example

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
                self.equal[guard.lhs] = guard.rhs

    def size(self, size: Any) -> Dim:
        if isinstance(size, int):
            return size
        expr = expression_of(size)
        if self.equal:
            expr = expr.xreplace(self.equal)
        if expr not in self.sizes:
            if expr.is_number:
                number: Any = int(expr) if expr.is_integer else float(expr)
                self.sizes[expr] = number
            else:
                if hint_of(size) is None:
                    raise CaptureError(
                        "the number of elements of a tensor depends on the values of another",
                        why="nonzero, masked_select, x[mask] and their like return as many "
                        "elements as fit, which no two ranks need agree on",
                        fix="keep the shape: torch.where(mask, x, 0), masked_fill, or weights",
                    )
                self.sizes[expr] = Sym(sympy.sympify(expr), int(hint_of(size)))
        return self.sizes[expr]

    def shape(self, example: torch.Tensor) -> tuple[Dim, ...]:
        return tuple(self.size(size) for size in example.shape)

    def value(self, name: str, example: torch.Tensor, grad: bool) -> Value:
        shape = self.shape(example)
        floating = example.dtype.is_floating_point or example.dtype.is_complex
        return Value(name, shape, example.dtype, grad and floating)


_GUARDS = {
    "aten.sym_constrain_range_for_size.default",
    "aten.sym_constrain_range.default",
    "aten._assert_scalar.default",
    "aten._assert_async.msg",
}


def _stops(target: str) -> bool:
    """Whether no gradient flows back through an op of numbers: of its operand it reads no value."""
    packet = packet_of(target)
    return packet == "detach" or packet.endswith("_like") or packet.startswith("new_")


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
