"""A torch.autograd.Function of the user's as an op: its own forward and its own backward.

A tracer would record the ops of its forward and have autograd differentiate those, which is not
what the Function says. So each Function gets an op, by class and constant arguments, that applies
the class; rules for it are discovered by running both passes, as for any op that nobody knows.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import operator
import re
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autoparallel.capture.function_examination import Examined, examine
from autoparallel.capture.function_slots import (
    PLAIN,
    Slot,
    Slots,
    containers,
    content,
    filled,
    is_held_elsewhere,
    is_same,
    refused,
)
from autoparallel.capture.intercepted_calls import apply_function, unwatched
from autoparallel.support.torch_private import differentiates_custom_op, without_function_modes

__all__ = ["FunctionOp", "applied", "function_op", "is_inside_ops", "note_inside_op"]

_SPACE = "autograd_function"
_library = torch.library.Library(_SPACE, "DEF")
_DEEPEST = 6  # levels of functions and containers that a class refers to


@dataclass(frozen=True)
class FunctionOp:
    """The op of one Function with certain constants.

    target: the op's name in a graph. name: of the class, for people. examined: the facts that are
    known of its passes. keeps: whether its forward keeps a list or a dict that it is given.
    """

    target: str
    name: str
    examined: Examined
    keeps: bool

    @property
    def operator(self) -> Any:
        """The op as torch has it."""
        _, packet, overload = self.target.split(".")
        return getattr(getattr(getattr(torch.ops, _SPACE), packet), overload)


# By target, the op and its class; by what an op is of, its target.
_OPS: dict[str, FunctionOp] = {}
_CLASSES: dict[str, Any] = {}
_TARGETS: dict[Any, str] = {}
_INSIDE: weakref.WeakSet[Any] = weakref.WeakSet()
_lock = threading.Lock()


def function_op(target: str) -> FunctionOp | None:
    """Return the op of a Function by its name in a graph; None for all other ops.

    >>> function_op("aten.mm.default") is None
    True
    """
    return _OPS.get(target)


def note_inside_op(cls: Any) -> None:
    """Remember that a Function is how an op of some library is differentiated."""
    _INSIDE.add(cls)


def is_inside_ops(cls: Any) -> bool:
    """Return whether a Function is how an op of some library is differentiated.

    Torch makes one for each op of torch.library; others are those that an op applied in a trace.

    >>> is_inside_ops(torch.autograd.Function)
    False
    """
    return cls in _INSIDE or differentiates_custom_op(cls)


def applied(cls: Any, args: Sequence[Any], is_model_memory: Callable[[Any], bool]) -> Any:
    """Record one op for `cls.apply(*args)`, inside of a trace, and return its result.

    cls: the Function. args: tensors, integers and constants, perhaps in lists, tuples and dicts.
    is_model_memory: whether a tensor lies in the memory of the model. Raises CaptureError where an
    op of tensors and numbers cannot stand for it.

    Example: `applied(Reverse, (x, 0.5), lambda tensor: False)`.
    """
    slots = Slots(cls)
    template = slots.template(tuple(args))
    if not slots.tensors:
        raise refused(cls, "no tensor is among its arguments", "give it the tensors it works on")
    device = slots.tensors[0].device.type
    kinds = tuple(dict.fromkeys((device, *(("cpu", "cuda") if device == "meta" else ()))))
    autocast = tuple(
        (kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)
    )
    operation = _registered(cls, template, slots, autocast, is_model_memory)
    # The backward pass would see what is put there after the forward; an op has its own.
    if operation.keeps and is_held_elsewhere(args):
        raise refused(
            cls,
            "it keeps a list or a dict that may change before its backward pass",
            "pass the numbers in it as arguments of their own",
        )
    with _applying():
        results = operation.operator(*slots.tensors, *slots.integers)
    results = (results,) if isinstance(results, torch.Tensor) else tuple(results)
    return filled(operation.examined.results, results, (), None)


# -- the op


_local = threading.local()


@contextlib.contextmanager
def _applying() -> Iterator[None]:
    """Have kernels know, within, that a tracer is at work, whose modes their Python must not see.

    A `torch.no_grad` in a Function's forward would be recorded as one of the model's.
    """
    before, _local.tracing = getattr(_local, "tracing", False), True
    try:
        yield
    finally:
        _local.tracing = before


def _registered(
    cls: Any,
    template: Any,
    slots: Slots,
    autocast: tuple[tuple[str, torch.dtype], ...],
    is_model_memory: Callable[[Any], bool],
) -> FunctionOp:
    """Return the op of a Function with these constants, which is defined where it is new."""
    kinds = (len(slots.tensors), len(slots.integers))
    parts, constants = _Content(), _Content()
    text = repr((parts.of(cls), constants.of(template), kinds, [str(kind) for kind in autocast]))
    if constants.opaque:
        raise refused(
            cls,
            "one of its arguments is a function, and what that refers to is unknown",
            "pass the numbers that the function needs",
        )
    # Objects whose content cannot be told make two classes with one text two Functions.
    looks = tuple((tensor.dtype, tensor.dim(), tensor.device) for tensor in slots.tensors)
    key = (text, looks, cls if parts.opaque else None)
    with _lock:
        known = _TARGETS.get(key)
        if known is not None:
            _CLASSES[known] = cls
            return _OPS[known]

    given: list[tuple[Any, Any]] = []
    kept: list[bool] = []

    def apply(tensors: Sequence[Any], integers: Sequence[Any]) -> Any:
        """Apply the class to the arguments of the call, with these tensors and integers."""
        arguments = filled(template, tensors, integers, tensors[0].device)
        given.append((arguments, content(arguments)))
        inside = containers(arguments)
        before = list(map(sys.getrefcount, inside))
        results = apply_function(cls, *arguments)
        kept.extend(map(operator.gt, map(sys.getrefcount, inside), before))
        return results

    with unwatched():
        examined = examine(apply, cls.__name__, slots.tensors, slots.integers, is_model_memory)
    # An op is given containers of its own: nobody would see what either pass puts into them.
    if not all(is_same(content(arguments), before) for arguments, before in given):
        raise refused(
            cls,
            "it writes to a list or a dict that it is given",
            "return what it computes, and put it there outside",
        )
    with _lock:
        # The same Function may stop other gradients for operands of other types.
        digest = hashlib.sha256(repr((text, examined.token)).encode()).hexdigest()[:8]
        packet, target = re.sub(r"\W", "_", cls.__name__), ""
        for number in itertools.count():
            # No overloads: torch aborts when it takes several of one name back, as it does at exit.
            version = digest + (f"_{number}" if number else "")
            target = f"{_SPACE}.{packet}_v{version}.default"
            if target not in _OPS or not parts.opaque or _CLASSES[target] is cls:
                break
        _CLASSES[target] = cls
        _TARGETS[key] = target
        if target not in _OPS:
            _OPS[target] = FunctionOp(target, cls.__name__, examined, any(kept))
            _define(_OPS[target], template, kinds, autocast)
        return _OPS[target]


def _define(
    operation: FunctionOp,
    template: Any,
    kinds: tuple[int, int],
    autocast: tuple[tuple[str, torch.dtype], ...],
) -> None:
    """Define the op: its schema, and kernels that apply the class to what they are given."""
    target, examined = operation.target, operation.examined
    tensors = [f"Tensor x{index}" for index in range(kinds[0])]
    integers = [f"SymInt n{index}" for index in range(kinds[1])]
    count = examined.count
    returned = "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"
    name = target.split(".")[1]
    _library.define(f"{name}({', '.join([*tensors, *integers])}) -> {returned}")

    def run(*operands: Any) -> Any:
        """Apply the class, and return its tensors, each in memory of its own."""
        given, numbers = operands[: kinds[0]], operands[kinds[0] :]
        with contextlib.ExitStack() as stack:
            for kind, dtype in autocast:
                stack.enter_context(torch.autocast(kind, dtype))
            if getattr(_local, "tracing", False):
                stack.enter_context(without_function_modes())
                stack.enter_context(unwatched())
            arguments = filled(template, given, numbers, given[0].device)
            returned = apply_function(_CLASSES[target], *arguments)
        results = examined.tensors_of(returned)
        # Torch returns an operand, and a view of one, as they are. What an op returns is new.
        own = tuple(
            result.clone() if shared else result
            for result, shared in zip(results, examined.shared, strict=True)
        )
        return own[0] if count == 1 else own

    def without_gradient(*operands: Any) -> Any:
        """Apply the class where no gradient is recorded."""
        with torch.no_grad():
            return run(*operands)

    _library.impl(name, run, "Autograd")
    _library.impl(name, without_gradient, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_SPACE}::{name}", without_gradient, lib=_library)


# -- what an op is of


class _Content:
    """The content of classes, functions and constants, as text that is the same in every process.

    opaque: whether there was an object of which no such text is known.
    """

    def __init__(self) -> None:
        self.opaque = False

    def of(self, item: Any, depth: int = 0) -> Any:
        """Return the content of anything that a Function may refer to."""
        inner = depth + 1
        if isinstance(item, (int, *PLAIN)) or item is Ellipsis:
            return (type(item).__name__, repr(item))
        if isinstance(item, (Slot, torch.device)):
            return repr(item)
        if isinstance(item, (list, tuple)):
            return (type(item).__name__, *(self.of(part, inner) for part in item))
        if isinstance(item, (set, frozenset)):
            return (type(item).__name__, *sorted(repr(self.of(part, inner)) for part in item))
        if depth <= _DEEPEST:
            if isinstance(item, (staticmethod, classmethod)):
                return self.of(item.__func__, depth)
            if isinstance(item, types.FunctionType):
                return self.function(item, inner)
            if isinstance(item, types.CodeType):
                return self.code(item, inner)
            if isinstance(item, type) and issubclass(item, torch.autograd.Function):
                return self.function_class(item, inner)
            if isinstance(item, dict):
                return [(self.of(k, inner), self.of(v, inner)) for k, v in item.items()]
        # Such as `table.get`, a method of an object.
        bound = isinstance(item, types.BuiltinFunctionType) and not isinstance(
            item.__self__, (types.ModuleType, type, type(None))
        )
        if isinstance(item, (types.BuiltinFunctionType, types.ModuleType, type)) and not bound:
            return (getattr(item, "__module__", ""), getattr(item, "__qualname__", item.__name__))
        self.opaque = True
        return type(item).__qualname__

    def function_class(self, cls: Any, depth: int) -> Any:
        """Return the content of a Function: all that its classes below torch's own have."""
        rows: list[Any] = []
        for kind in cls.__mro__:
            if kind.__module__.partition(".")[0] == "torch" or kind is object:
                break
            rows.append((kind.__module__, kind.__qualname__))
            rows += [
                (name, self.of(value, depth))
                for name, value in vars(kind).items()
                if name == "__defaults__" or not _is_dunder(name)
            ]
        return rows or (cls.__module__, cls.__qualname__)

    def function(self, function: types.FunctionType, depth: int) -> Any:
        """Return the content of a function: its code, and the values of variables around it."""
        cells = [_content_of(cell) for cell in function.__closure__ or ()]
        named = function.__kwdefaults__ or {}
        every = (*cells, *(function.__defaults__ or ()), *named, *named.values())
        around = [self.of(item, depth) for item in every]
        code = self.code(function.__code__, depth)
        return (function.__module__, function.__qualname__, code, around)

    def code(self, code: types.CodeType, depth: int) -> Any:
        """Return the content of compiled code, without the place where it is written."""
        constants = [self.of(item, depth) for item in code.co_consts]
        return (code.co_code.hex(), code.co_names, constants)


def _content_of(cell: Any) -> Any:
    """Return what a variable around a function holds; None where it has no value yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _is_dunder(name: str) -> bool:
    """Return whether it is one of the names that Python gives every class."""
    return name.startswith("__") and name.endswith("__")
