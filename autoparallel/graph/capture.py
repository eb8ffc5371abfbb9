"""From a module and example inputs to a Graph. The only user of torch.export."""

from __future__ import annotations

import contextlib
import inspect
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import nn

from autoparallel.errors import CaptureError, InputsNeededError, WrappedModelError
from autoparallel.graph.graph import Dim, Graph, Node, Ref, Sym, Value
from autoparallel.structure import Skeleton, flatten, rebuild

__all__ = ["Captured", "bind_inputs", "capture", "find_example_inputs", "refuse_wrapped"]


@dataclass(frozen=True)
class Captured:
    """graph: the program. inputs, outputs: skeletons of what goes in and what comes out.

    aliases: for each parameter path the path that is kept (another one for tied weights).
    constants: tensors that the forward makes from numbers, by the targets of "constant" nodes.
    """

    graph: Graph
    inputs: Skeleton
    outputs: Skeleton
    aliases: Mapping[str, str]
    constants: Mapping[str, torch.Tensor]


def refuse_wrapped(model: nn.Module) -> None:
    """Raises WrappedModelError for a model that another engine has already split or wrapped."""
    from torch.distributed.tensor import DTensor

    for path, module in model.named_modules():
        name = type(module).__name__
        wrapped = name in ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel")
        if wrapped or name.startswith("FSDP"):
            raise WrappedModelError(
                f"the model is already wrapped in {name}",
                where=path or "the model itself",
                why="its parameters or its forward are already another engine's",
                fix="pass the plain module (model.module for DistributedDataParallel)",
            )
    for path, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise WrappedModelError(
                "the model's parameters are already distributed (DTensor)",
                where=path,
                why="another engine, or autoparallelize itself, has split it",
                fix="pass the plain module",
            )


def find_example_inputs(model: nn.Module) -> Any:
    """The model's own `example_inputs()` or Hugging Face `dummy_inputs`.

    Raises InputsNeededError where there is neither.
    """
    own = getattr(model, "example_inputs", None)
    if callable(own):
        return own()
    try:
        dummies = getattr(model, "dummy_inputs", None)
    except (AttributeError, NotImplementedError, TypeError):
        dummies = None
    if isinstance(dummies, Mapping) and dummies:
        names = inspect.signature(model.forward).parameters
        inputs = {key: value for key, value in dummies.items() if key in names}
        if inputs:
            ids = inputs.get("input_ids")
            if isinstance(ids, torch.Tensor) and "labels" in names and "labels" not in inputs:
                inputs["labels"] = ids.clone()
            return inputs
    raise InputsNeededError(
        f"no example inputs for {type(model).__name__}",
        why="planning follows real shapes through the model, and the model offers none",
        fix="pass example_inputs=(x, ...) or a dict of keyword arguments, or give the model a "
        "method example_inputs()",
    )


def bind_inputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> inspect.BoundArguments:
    """The call's arguments by the names of the model's forward."""
    try:
        return inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(
            f"the inputs do not fit {type(model).__name__}.forward",
            why=str(error),
            fix="pass a tuple of positional or a dict of keyword arguments",
        ) from None


def split_example(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as (args, kwargs): a tensor, a sequence or a dict of keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


class _Flat(nn.Module):
    """The model with tensors in and tensors out; remembers the skeleton of what came out."""

    def __init__(
        self,
        model: nn.Module,
        bound: inspect.BoundArguments,
        inputs: Skeleton,
        traced: list[Skeleton],
    ) -> None:
        super().__init__()
        self.model = model
        self.bound, self.inputs = bound, inputs
        self.traced = traced

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        arguments = rebuild(self.inputs, list(tensors))
        bound = inspect.BoundArguments(self.bound.signature, arguments)
        result = self.model(*bound.args, **bound.kwargs)
        flat, skeleton = flatten(result)
        self.traced.append(skeleton)
        return tuple(flat)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporting logs and warns about what the graph below makes explicit anyway."""
    loggers = [logging.getLogger(name) for name in ("torch._export", "torch.export", "torch.fx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Captured:
    """Trace `model(*args, **kwargs)` in the model's present mode (train or eval).

    Every dimension of the inputs stays symbolic unless the model fixes it (sizes 0 and 1 are
    fixed). Nothing is computed: the inputs may be on the meta device.
    Raises CaptureError, with the user's source line, where the model cannot be traced.
    """
    bound = bind_inputs(model, args, kwargs)
    tensors, inputs = flatten(dict(bound.arguments))
    device = next((parameter.device for parameter in model.parameters()), None)
    samples = [_sample(tensor, device) for tensor in tensors]
    traced: list[Skeleton] = []
    flat = _Flat(model, bound, inputs, traced)
    flat.train(model.training)
    automatic = torch.export.Dim.AUTO
    shapes = (tuple(dict.fromkeys(range(sample.dim()), automatic) for sample in samples),)
    training = {path: module.training for path, module in model.named_modules()}
    try:
        with _quiet():
            program = torch.export.export(flat, tuple(samples), strict=False, dynamic_shapes=shapes)
    except Exception as error:
        raise _explain(error, model) from error
    finally:
        for path, module in model.named_modules():
            module.training = training[path]
    graph = _Importer(program, samples).graph()
    kept: dict[int, str] = {}
    aliases: dict[str, str] = {}
    used = {node.target for node in graph.nodes if node.kind == "parameter"}
    named = list(model.named_parameters(remove_duplicate=False))
    for path, parameter in named:
        if path in used:
            kept[id(parameter)] = path
    for path, parameter in named:
        aliases[path] = kept.setdefault(id(parameter), path)
    constants = {
        key.removeprefix("model."): value
        for key, value in program.constants.items()
        if isinstance(value, torch.Tensor)
    }
    return Captured(graph, inputs, traced[-1], aliases, constants)


def _sample(tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    """An own tensor of the same kind, so that an input given twice stays two inputs."""
    place = device if device is not None and device.type == "meta" else tensor.device
    return torch.empty_like(tensor, device=place, requires_grad=False)


def _explain(error: BaseException, model: nn.Module) -> CaptureError:
    """The user's own line, and the likely cause, for an export that failed."""
    text = str(error)
    frames = traceback.extract_tb(error.__traceback__)
    root = torch.__path__[0]
    here = __file__.rsplit("/", 2)[0]
    theirs = [f for f in frames if not f.filename.startswith((root, here, "<"))]
    where = ""
    if theirs:
        last = theirs[-1]
        where = f"{last.filename}:{last.lineno}  {last.line}"
    dependent = any(
        sign in f"{type(error).__name__} {text}"
        for sign in ("GuardOnDataDependent", "data-dependent", "Could not guard", "unbacked", "u0")
    )
    if dependent:
        return CaptureError(
            f"{type(model).__name__}.forward branches on the values of a tensor",
            where=where,
            why="a graph has one path for all data; " + text.strip().split("\n")[0][:200],
            fix="write the choice with torch.where, or move it out of the module that is split",
        )
    return CaptureError(
        f"{type(model).__name__}.forward could not be traced",
        where=where,
        why=f"{type(error).__name__}: {text.strip().splitlines()[0][:300] if text else ''}",
        fix="see whether torch.export.export(model, ..., strict=False) takes it",
    )


class _Importer:
    """Translates an exported program into a Graph."""

    def __init__(self, program: Any, samples: list[torch.Tensor]) -> None:
        self.program = program
        self.nodes: list[Node] = []
        self.known: dict[Any, Any] = {}
        self.samples = samples
        self.sizes: dict[Any, Dim] = {}

    def graph(self) -> Graph:
        signature = self.program.graph_signature
        module = self.program.graph_module
        attributes = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        kinds = {
            **dict.fromkeys(signature.inputs_to_parameters, "parameter"),
            **dict.fromkeys(signature.inputs_to_buffers, "buffer"),
            **dict.fromkeys(signature.inputs_to_lifted_tensor_constants, "constant"),
        }
        position = 0
        for node in module.graph.nodes:
            if node.op != "placeholder":
                continue
            kind = kinds.get(node.name, "input")
            if kind == "input":
                target, position = str(position), position + 1
            else:
                target = attributes[node.name].removeprefix("model.")
            grad = kind in ("parameter", "input") and node.meta["val"].dtype.is_floating_point
            if kind == "parameter":
                grad = grad and _is_trained(self.program, attributes[node.name])
            name = node.name.replace("_model_", "_", 1) if kind != "input" else node.name
            value = self.value(name, node.meta["val"], grad)
            self.nodes.append(Node(name, kind, target, (value,)))
            self.known[node] = Ref(name)
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
        return Graph(tuple(self.nodes), tuple(outputs), tuple(mutations)).verify()

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
        example = node.meta.get("val")
        if isinstance(example, (torch.SymInt, int, torch.SymFloat, torch.SymBool)):
            self.known[node] = self.scalar(example)
            return
        if getattr(target, "__name__", "") == "getitem":
            source = self.known[node.args[0]]
            self.known[node] = source[node.args[1]]
            return
        if name in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            self.inline(node, name, tensors, grad)
            return
        args = self.leaf_all(node.args)
        kwargs = tuple((key, self.leaf_all(value)) for key, value in node.kwargs.items())
        probe = Node("", "call", name, (), args, kwargs)
        flows = grad and any(tensors[operand].requires_grad for operand in probe.operands())
        if isinstance(example, torch.Tensor):
            results: tuple[Value, ...] = (self.value(node.name, example, flows),)
            self.known[node] = Ref(node.name)
        else:
            results = tuple(
                self.value(f"{node.name}_{index}", item, flows)
                for index, item in enumerate(example)
            )
            self.known[node] = tuple(Ref(value.name) for value in results)
        for value in results:
            tensors[value.name] = value
        where, line = _origin(node)
        self.nodes.append(Node(node.name, "call", name, results, args, kwargs, where, line))

    def inline(self, node: Any, name: str, tensors: dict[str, Value], grad: bool) -> None:
        """A region that export wraps: its body joins the graph."""
        if name == "wrap_with_set_grad_enabled":
            enabled, module, *operands = node.args
            inner = grad and bool(enabled)
        else:
            enabled, module, operands = node.args[2], node.args[4], list(node.args[5:])
            if enabled:
                raise CaptureError(
                    "an autocast region inside the model is not supported",
                    where=_origin(node)[0],
                    fix="cast explicitly, or run the whole model in the lower precision",
                )
            inner = grad
        body = self.known[module]
        holes = [item for item in body.graph.nodes if item.op == "placeholder"]
        for hole, operand in zip(holes, operands, strict=True):
            self.known[hole] = self.leaf_all(operand)
        names = {item.name: item for item in self.nodes}
        before = len(self.nodes)
        result = self.body(body, inner)
        clash = [item.name for item in self.nodes[before:] if item.name in names]
        assert not clash, f"names repeat in a wrapped region: {clash}"
        for item in self.nodes[before:]:
            tensors.update({value.name: value for value in item.results})
        self.known[node] = result

    def leaf_all(self, item: Any) -> Any:
        """Arguments with nodes replaced by what they stand for; lists become tuples."""
        if isinstance(item, torch.fx.Node):
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

    def size(self, size: Any) -> Dim:
        if isinstance(size, int):
            return size
        expr = size.node.expr
        if expr not in self.sizes:
            if expr.is_number:
                self.sizes[expr] = int(expr)
            else:
                self.sizes[expr] = Sym(sympy.sympify(expr), int(size.node.hint))
        return self.sizes[expr]

    def value(self, name: str, example: torch.Tensor, grad: bool) -> Value:
        shape = tuple(self.size(size) for size in example.shape)
        floating = example.dtype.is_floating_point or example.dtype.is_complex
        return Value(name, shape, example.dtype, grad and floating)


_GUARDS = {
    "aten.sym_constrain_range_for_size.default",
    "aten.sym_constrain_range.default",
    "aten._assert_scalar.default",
    "aten._assert_async.msg",
}


def _is_trained(program: Any, path: str) -> bool:
    found = program.state_dict.get(path)
    return found is None or bool(found.requires_grad)


def _origin(node: Any) -> tuple[str, str]:
    """Module path and source line that made an exported node."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for qualified, _ in stack.values():
        path = qualified or path
    path = path.removeprefix("model").removeprefix(".")
    line = ""
    trace = node.meta.get("stack_trace") or ""
    rows = [row.strip() for row in trace.splitlines() if row.strip().startswith("File ")]
    if rows:
        parts = rows[-1].split('"')
        number = rows[-1].split("line ")[-1].split(",")[0]
        line = f"{parts[1].rsplit('/', 1)[-1]}:{number}" if len(parts) > 1 else ""
    return path, line
