"""Errors for inputs that the model itself refuses, in place of a failure of tracing."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from autoparallel.capture.example_inputs import bind_inputs
from autoparallel.capture.forward_contexts import quiet, unprinted
from autoparallel.errors import InputMismatchError
from autoparallel.graph.graph import Graph, Node, Ref, Sym, hint, map_leaves
from autoparallel.graph.operators import operator_of
from autoparallel.support.fake_tensors import fake_mode
from autoparallel.support.model_snapshot import untouched
from autoparallel.support.pytree import flatten, leaf_paths
from autoparallel.support.torch_private import tree_leaves, tree_map

__all__ = ["refuse_arrays", "refuse_devices", "refuse_inputs", "refuse_types"]

# The number of elements, of all operands together, up to which an op is tried again.
_MOST_ELEMENTS = 2**24
# Torch's errors where an op needs numbers, which fake tensors lack: that is no fault of the inputs.
_LACKS_DATA = (
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "GuardOnDataDependentSymNode",
    "UnsupportedOperatorException",
)


def refuse_arrays(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse numpy arrays among the inputs: a graph would hold their numbers for ever.

    model: gives the names of the arguments. args, kwargs: of the call, at any depth in containers.
    Raises InputMismatchError with the names of the arrays.

    Example: refuse_arrays(model, (numpy.ones(3),), {})
    """
    _, skeleton = flatten(dict(bind_inputs(model, args, kwargs).arguments))
    arrays = [path for path, leaf in leaf_paths(skeleton, "constant").items() if _is_array(leaf)]
    if arrays:
        raise InputMismatchError(
            f"{', '.join(arrays)} of {type(model).__name__}.forward "
            f"{'are numpy arrays' if len(arrays) > 1 else 'is a numpy array'}",
            why="only the numbers in tensors may change from call to call",
            fix="pass torch.from_numpy(array)",
        )


def refuse_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse inputs from which an op of the model gets operands that it cannot take.

    model: left as it was. args, kwargs: of the call. Raises InputMismatchError that names the op,
    the module and the line. Returns where the forward runs, and where it fails for other reasons.

    The forward is run on tensors without data. The op that fails there is tried again by itself, on
    ones and on zeros: if it takes neither, its sizes or types are wrong, not the way it is run.
    """
    bound = bind_inputs(model, args, kwargs)
    tensors, _ = flatten(dict(bound.arguments))
    # A model without weights takes inputs of any device: those on meta stand for all others.
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    mode, watch = fake_mode(allow_non_fake_inputs=True), _FirstFailure()
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    try:
        # With gradients, because a forward may want to register hooks.
        with quiet(), unprinted(), untouched(model, args, kwargs), torch.enable_grad(), mode:
            fakes: dict[str, torch.Tensor] = {
                name: mode.from_tensor(tensor) for name, tensor in state.items()
            }
            real = {id(tensor): tensor.to("meta") if on_meta else tensor for tensor in tensors}
            fake = {name: mode.from_tensor(tensor) for name, tensor in real.items()}
            inputs = tree_map(lambda leaf: fake.get(id(leaf), leaf), (args, dict(kwargs)))
            with watch:
                torch.func.functional_call(model, fakes, *inputs)
        return
    except Exception as error:
        if type(error).__name__ in _LACKS_DATA:
            return
        failed, where = watch.failed, _place(error, model)
    why = _why_refused(*failed, ask_devices=not on_meta) if failed is not None else None
    if why is not None:
        raise _refusal(model, bound.arguments, where, why)


def refuse_types(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    graph: Graph,
    is_product: Callable[[Node], bool],
) -> None:
    """Refuse inputs that bring a product factors of different types, as float64 beside float32.

    args, kwargs: of the call that was traced to `graph`. is_product: tells of a call whether it
    multiplies matrices. Tensors without data do not show it: torch's product of such looks at sizes
    alone. A product of mixed types is therefore tried on ones and zeros, as they are and in one
    type; some take them, such as attention with a mask. Raises InputMismatchError as
    `refuse_inputs` does.
    """
    seen: set[Any] = set()
    for node in graph.calls:
        operands = [graph.values[name] for name in node.operands()]
        dtypes = {value.dtype for value in operands if value.shape}
        shapes = tuple((value.dtype, tuple(map(hint, value.shape))) for value in operands)
        if len(dtypes) < 2 or (node.target, shapes) in seen or not is_product(node):
            continue
        seen.add((node.target, shapes))
        widest = max(dtypes, key=lambda kind: (kind.is_floating_point, kind.itemsize))
        why = _why_mixed(graph, node, widest)
        if why is not None:
            where = node.where or type(model).__name__
            where += f"  ({node.line})" if node.line else ""
            raise _refusal(model, bind_inputs(model, args, kwargs).arguments, where, why)


def _why_mixed(graph: Graph, node: Node, dtype: torch.dtype) -> str | None:
    """Say why a call refuses the types of its operands; None if it takes them, or does not take
    operands of one type, `dtype`, either.
    """
    function = operator_of(node.target)

    def refused(change: Callable[[torch.dtype], torch.dtype]) -> str | None:
        """Say why the op refuses operands of changed types, as `_why_refused` does."""

        def leaf(item: Any) -> Any:
            if isinstance(item, Ref):
                value = graph.values[item.name]
                sizes = tuple(map(hint, value.shape))
                return torch.empty(sizes, dtype=change(value.dtype), device="meta")
            return hint(item) if isinstance(item, Sym) else item

        kwargs = {key: map_leaves(leaf, item) for key, item in node.kwargs}
        return _why_refused(function, map_leaves(leaf, node.args), kwargs, ask_devices=False)

    why = refused(lambda kind: kind)
    return why if why is None or refused(lambda kind: dtype) is None else None


def _refusal(
    model: nn.Module, arguments: Mapping[str, Any], where: str, why: str
) -> InputMismatchError:
    """Return the error for inputs that an op of the model does not take. arguments: by name."""
    tensors, skeleton = flatten(dict(arguments))
    rows = [
        f"{path}: {_text(tensor)}"
        for path, tensor in zip(leaf_paths(skeleton, "tensor"), tensors, strict=True)
    ]
    return InputMismatchError(
        f"{type(model).__name__}.forward does not take inputs like these",
        where=where,
        why=why,
        fix="pass what the model takes when it is called by itself; given were\n"
        + ("\n".join(rows) or "no tensors"),
    )


def refuse_devices(model: nn.Module, bound: Mapping[str, Any], device: torch.device) -> None:
    """Refuse inputs that are not on the device of the parameters.

    bound: the arguments by name. device: that of the parameters. It is to be asked after a call
    has failed, because some models want lengths on the CPU whatever computes. Raises
    InputMismatchError that lists the tensors elsewhere.

    Example: refuse_devices(model, {"x": tensor_on_cpu}, torch.device("cuda:0"))
    """
    tensors, skeleton = flatten(dict(bound))
    rows = zip(leaf_paths(skeleton, "tensor"), tensors, strict=True)
    apart = [row for row in rows if row[1].device != device]
    if apart:
        raise InputMismatchError(
            f"inputs of {type(model).__name__}.forward are not on the device of its parameters",
            where="\n".join(f"{path}: {_text(tensor)}" for path, tensor in apart),
            why=f"its parameters are on {device}",
            fix=f'pass tensor.to("{device}")',
        )


class _FirstFailure(TorchFunctionMode):
    """A _FirstFailure remembers the call of torch that failed first, with its arguments."""

    failed: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except Exception:
            self.failed = self.failed or (func, args, kwargs or {})
            raise


def _why_refused(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], ask_devices: bool
) -> str | None:
    """Say why an op refuses its operands; None if it takes others like them, or is too large.

    ask_devices: whether operands on different devices are a reason; they are none where some are
    on meta, which stands for all devices.
    """
    operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    devices = dict.fromkeys(str(tensor.device) for tensor in operands if tensor.dim())
    if ask_devices and len(devices) > 1:
        return f"{_name(func)} is given tensors on {' and on '.join(devices)}"
    if sum(tensor.numel() for tensor in operands) > _MOST_ELEMENTS:
        return None

    # An index of 1 may be out of range and a division by 0 fail: one that works is enough.
    why = None
    for number in (1, 0):

        def filled(leaf: Any, number: int = number) -> Any:
            if isinstance(leaf, torch.Tensor):
                return torch.full(tuple(leaf.shape), number, dtype=leaf.dtype)
            return leaf

        try:
            func(*tree_map(filled, args), **tree_map(filled, kwargs))
        except Exception as error:
            first = str(error).strip().splitlines()
            why = f"{_name(func)}: {first[0][:300] if first else type(error).__name__}"
        else:
            return None
    return why


def _name(func: Any) -> str:
    """Return the name of a function of torch, or of an op without its overload's."""
    return str(getattr(func, "__name__", func)).partition(".")[0]


def _place(error: BaseException, model: nn.Module) -> str:
    """Return the path of the innermost module that was running, and its last line not in torch."""
    paths = {id(module): path for path, module in model.named_modules()}
    place, line = "", ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        owner, file = frame.f_locals.get("self"), frame.f_code.co_filename
        if isinstance(owner, nn.Module) and id(owner) in paths:
            place = paths[id(owner)] or type(model).__name__
            if not file.startswith(torch.__path__[0]):
                line = f"  ({file}:{number})"
    return place + line


def _is_array(leaf: Any) -> bool:
    """Return whether it is a numpy array; numpy is not imported to find out."""
    kind = type(leaf)
    return (kind.__module__, kind.__name__) == ("numpy", "ndarray")


def _text(tensor: torch.Tensor) -> str:
    """Describe a tensor: "int64 (8, 64) on cpu"."""
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{kind} {tuple(tensor.shape)} on {tensor.device}"
