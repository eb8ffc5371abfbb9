"""The census: what a gradient reaches in a model, found out without the tracer.

A trace may drop what it does not see, and the graph is right by its own lights. So the forward is
run once more as it is, on tensors without data, with autograd on. Autograd's own record says which
parameters and inputs a gradient reaches and which Functions it passes; the graph must say the same.
A difference is an error of this package, and better known before a plan is made than in training.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoparallel.capture.asked_switches import untold
from autoparallel.capture.branch_ways import NO_WAYS, Asked, TakeWays, Ways
from autoparallel.capture.custom_functions import function_op, is_inside_ops
from autoparallel.capture.decided_draws import ConstantComparisons
from autoparallel.capture.example_inputs import bind_inputs
from autoparallel.capture.forward_contexts import quiet, unprinted
from autoparallel.capture.global_reads import OuterVariables
from autoparallel.capture.intercepted_calls import CallWatch
from autoparallel.capture.module_conversions import idle_conversions
from autoparallel.capture.module_tensors import named_tensors
from autoparallel.capture.repeated_calls import SeenCalls
from autoparallel.errors import CaptureError
from autoparallel.graph.captured import Captured
from autoparallel.graph.graph import Graph
from autoparallel.support.fake_tensors import fake_mode
from autoparallel.support.memory_writes import Watch, memory_of
from autoparallel.support.model_snapshot import untouched
from autoparallel.support.module_copy import keep_attributes, originals
from autoparallel.support.module_paths import join_path
from autoparallel.support.pytree import flatten
from autoparallel.support.torch_private import (
    as_if_exported,
    remembering_meta_results,
    tree_map,
)

__all__ = ["Census", "census_of", "require_agreement"]

_log = logging.getLogger(__name__)
_CUSTOM = torch.autograd.function.BackwardCFunction


@dataclass(frozen=True)
class Census:
    """The record of one forward, by autograd.

    reached: paths of parameters, and numbers of inputs, that a gradient from the results reaches.
    surely: those of them that it reaches without passing a Function, which may stop it. functions:
    names of the Functions that it passes. hooks: what the forward has hooked into the backward.
    """

    reached: frozenset[str]
    surely: frozenset[str]
    functions: frozenset[str]
    hooks: tuple[str, ...]


class _Forward(nn.Module):
    """The model's forward alone: hooks of the model itself run around its program."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward."""
        return self.model.forward(*args, **kwargs)


class _Checkpoints(CallWatch):
    """Enters reentrant checkpoints, which hide from autograd what is inside of them.

    seen: notes what the forward calls, and nothing of what Functions compute.
    """

    def __init__(self, seen: SeenCalls) -> None:
        self.seen = seen

    def function(self, cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Apply a Function."""
        with self.seen.resting():
            return super().function(cls, args, kwargs)

    def reentrant(self, call: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        """Run the region; without gradients where nothing that enters it has one."""
        tensors = [item for item in args if isinstance(item, torch.Tensor)]
        trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        with torch.set_grad_enabled(trained):
            return call()


class _Hooks(Watch):
    """Notes what is hooked into the backward pass."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def hooked(self, tensor: torch.Tensor, name: str) -> None:
        """Note the name."""
        self.names.append(name)


def census_of(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    part: bool = False,
    on: str = "fake",
    ways: Ways = NO_WAYS,
    seen: SeenCalls | None = None,
) -> Census:
    """Run a model's forward once more, and return what autograd has recorded.

    args, kwargs: of the call. part: whether the inputs need a gradient because Python calls the
    model; else those do that say so. on: "fake" for tensors that say they are on
    the device where the model is, "meta" for that device, which takes two thirds of the time, and
    "data" for copies of the model's tensors and of the inputs. ways: that the forward goes where it
    branches on values. seen: gets what the forward calls.
    The model is left as it was. Raises whatever its forward does where it does not run so.

    >>> sorted(census_of(nn.Linear(2, 3), (torch.ones(4, 2),), {}).reached)
    ['bias', 'weight']
    """
    seen = seen or SeenCalls()
    bound = bind_inputs(model, args, kwargs)
    tensors, _ = flatten(dict(bound.arguments))
    mode, hooks = fake_mode(allow_non_fake_inputs=True) if on == "fake" else None, _Hooks()
    # A model without weights takes inputs of any device: those on meta stand for all others.
    elsewhere = any(parameter.is_meta for parameter in model.parameters())

    def copied(tensor: torch.Tensor, trained: bool) -> torch.Tensor:
        """Return a leaf that looks like a tensor."""
        if on == "data":
            copy = tensor.detach().clone()
        elif mode is None:
            copy = torch.empty_like(tensor, device="meta", requires_grad=False)
        else:
            copy = mode.from_tensor(tensor.detach())
        if type(tensor) is nn.Parameter and type(copy) is torch.Tensor:
            # A forward that asks for the type of a parameter goes another way in a trace.
            copy.__class__ = nn.Parameter
        return copy.requires_grad_(trained)

    forward = _Forward(model)
    leaves: dict[int, str] = {}
    kept: list[torch.Tensor] = []
    for tensor, _, path, name in originals(model):
        leaves[id(tensor)] = join_path(path, name)
    for path, _, _, tensor in reversed(list(named_tensors(model))):
        leaves[id(tensor)] = path
    state = {**dict(forward.named_parameters()), **dict(forward.named_buffers())}
    with contextlib.ExitStack() as stack:
        stack.enter_context(as_if_exported())
        stack.enter_context(untold())
        stack.enter_context(quiet())
        stack.enter_context(unprinted())
        stack.enter_context(untouched(model, bound.arguments))
        # Whatever records no gradients around the call: the graph has them all.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if on != "data":
            stack.enter_context(remembering_meta_results() if mode is None else mode)
        fakes = {
            name: keep_attributes(tensor, copied(tensor, tensor.requires_grad))
            for name, tensor in state.items()
        }
        leaves.update((id(fakes[name]), leaves[id(tensor)]) for name, tensor in state.items())
        given: dict[int, torch.Tensor] = {}
        for number, tensor in enumerate(tensors):
            numbers = tensor.is_floating_point() or tensor.is_complex()
            trained = numbers and (part or tensor.requires_grad)
            fake = copied(tensor.detach().to("meta") if elsewhere else tensor, trained)
            leaves[id(fake)] = f"input {number}"
            given[id(tensor)] = keep_attributes(tensor, fake)
            kept.append(fake)
        inputs = tree_map(lambda leaf: given.get(id(leaf), leaf), (args, dict(kwargs)))
        stack.enter_context(ConstantComparisons())
        stack.enter_context(idle_conversions())
        stack.enter_context(hooks.installed(operators=False))
        stack.enter_context(_Checkpoints(seen).installed())
        stack.enter_context(TakeWays(ways, Asked(), marks=False))
        stack.enter_context(seen)
        result = torch.func.functional_call(forward, fakes, *inputs)
    returned, _ = flatten(result)
    roots = [tensor for tensor in returned if tensor.requires_grad]
    reached, functions = _walked(roots, leaves, through=True)
    surely, _ = _walked(roots, leaves, through=False)
    return Census(reached, surely, functions, tuple(hooks.names))


def _walked(
    roots: Iterable[torch.Tensor], leaves: Mapping[int, str], through: bool
) -> tuple[frozenset[str], frozenset[str]]:
    """Return the leaves that autograd's graph leads to, and the names of Functions on the way.

    through: whether to go on behind a Function.
    """
    reached: dict[str, None] = {}
    functions: dict[str, None] = {}
    todo: list[Any] = []
    for root in roots:
        if root.grad_fn is not None:
            todo.append(root.grad_fn)
        elif id(root) in leaves:
            reached[leaves[id(root)]] = None
    seen = set(todo)
    while todo:
        node = todo.pop()
        if isinstance(node, _CUSTOM):
            kind: Any = type(node)
            # Some are how an op of a library is differentiated, which the graph has itself.
            if not is_inside_ops(kind._forward_cls):
                functions[kind._forward_cls.__name__] = None
            if not through:
                continue
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) in leaves:
            reached[leaves[id(leaf)]] = None
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                todo.append(below)
    return frozenset(reached), frozenset(functions)


def _in_graph(graph: Graph, outputs: Iterable[str], aliases: Mapping[str, str]) -> frozenset[str]:
    """Return what the gradients of these outputs reach in a graph, by the names of a census."""
    producers = {value.name: node for node in graph.nodes for value in node.results}
    todo = [name for name in outputs if graph.values[name].requires_grad]
    seen = set(todo)
    reached: dict[str, None] = {}
    while todo:
        node = producers[todo.pop()]
        if node.kind == "input":
            reached[f"input {node.target}"] = None
        elif node.kind != "call":
            reached[aliases.get(node.target, node.target)] = None
        for name in node.operands():
            if name not in seen and graph.values[name].requires_grad:
                seen.add(name)
                todo.append(name)
    return frozenset(reached)


def require_agreement(
    captured: Captured,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    seen: SeenCalls | None = None,
    outer: OuterVariables | None = None,
) -> None:
    """Raise CaptureError where a graph and the census of its model differ.

    captured: of the model, after all passes. args, kwargs: of the call that was traced. seen: what
    its forward called, None where only gradients are compared. outer: the variables outside of the
    model. A forward that does not run on
    tensors without data has no census.

    Example: `require_agreement(captured, model, (x,), {}, seen)`.
    """
    _require_own_constants(captured, model)
    outer = outer or OuterVariables.of(model)
    if captured.gradients is False:
        return  # the forward asks whether gradients are recorded, and this is the graph without
    difference: CaptureError | None = None
    moved = False
    # Some forwards run on their own device alone, and some go another way on another one.
    for on in ("meta", "fake", "data"):
        if on == "data" and (difference is not None or not moved):
            break
        try:
            again = SeenCalls()
            # What functions remember of one run is no answer in another one.
            with outer.restored():
                census = census_of(model, args, kwargs, captured.part, on, captured.ways, again)
        except Exception as error:  # the forward is anyone's code, and may fail in any way
            _log.info("no census of %s: %r", type(model).__name__, error)
            continue
        difference = _difference(captured, census, type(model).__name__)
        if seen is not None and difference is None:
            difference = _moved(seen, again, type(model).__name__)
            moved = moved or difference is not None
        # What knows a fake tensor when it sees one goes the way of the trace.
        if difference is None and not (on == "fake" and moved and _has_data(model)):
            return
    if difference is not None:
        raise difference


def _has_data(model: nn.Module) -> bool:
    """Return whether a model has weights to run with."""
    return not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def _difference(captured: Captured, census: Census, name: str) -> CaptureError | None:
    """Return the error for a graph that differs from the census of its model, None if none does.

    name: of the model.
    """
    graph, aliases = captured.graph, captured.aliases
    named = _first_names(aliases)
    everywhere = _in_graph(graph, graph.outputs, aliases)
    returned = _in_graph(graph, graph.outputs[: captured.returned_tensors], aliases)
    operations = [function_op(node.target) for node in graph.calls]
    carried = {operation.name for operation in operations if operation is not None}
    rows: tuple[tuple[str, frozenset[str], Iterable[str]], ...] = (
        ("a gradient reaches this in the model alone", named(census.surely), everywhere),
        ("a gradient reaches this in the graph alone", returned, named(census.reached)),
        ("the model alone applies this Function", census.functions, carried),
        ("the model hooks into its backward pass by this", frozenset(census.hooks), ()),
    )
    for what, some, others in rows:
        missing = sorted(some.difference(others))
        if missing:
            return CaptureError(
                f"the graph of {name} is not what the model computes: {', '.join(missing)}",
                why=f"{what}; this is an error of the tracer",
                fix="please report it with the model; keep what does this in a submodule of its "
                "own, which then stays Python",
            )
    return None


def _moved(seen: SeenCalls, again: SeenCalls, name: str) -> CaptureError | None:
    """Return the error for a forward that calls something else when it runs again, None if it does
    not. seen, again: what it called in the trace, and now. name: of the model.
    """
    first, second = seen.difference(again), again.difference(seen)
    if not first and not second:
        return None
    calls = f"{first or 'nothing'}, and {second or 'nothing'} when it runs again"
    return CaptureError(
        f"{name}.forward computes something else when it runs again: {calls}",
        why="it asks for something that a trace does not see, and a graph would have the answer of "
        "this one run for ever",
        fix="pass what it asks for as an argument, or ask in a module without parameters, which "
        "stays Python",
    )


def _first_names(aliases: Mapping[str, str]) -> Callable[[Iterable[str]], frozenset[str]]:
    """Return a function that gives tied parameters one name."""
    return lambda names: frozenset(aliases.get(name, name) for name in names)


def _require_own_constants(captured: Captured, model: nn.Module) -> None:
    """Raise CaptureError where a constant of the graph lies in the memory of the model."""
    paths = {memory_of(tensor): path for path, _, _, tensor in named_tensors(model)}
    for path, value in captured.constants.items():
        memory = memory_of(value)
        if memory is not None and memory in paths and value.numel():
            raise CaptureError(
                f"the graph of {type(model).__name__} holds {paths[memory]} as the constant {path}",
                why="it would stay as it is now; this is an error of the tracer",
                fix="please report it with the model",
            )
