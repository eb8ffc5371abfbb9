"""Facts of tensors that a forward reads in Python, which are others in a trace than in a call.

A trace has tensors of its own: no gradient was ever added to them, inputs need none, and they do
not have the attributes that a caller may have set (`x.mask = ...`). Here the forward gets the true
answers as far as a program can be bound to them, and is left to Python where it cannot.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from autoparallel.capture.block_folding import Folding
from autoparallel.capture.module_tensors import named_tensors
from autoparallel.errors import CaptureError
from autoparallel.graph.attribute_read import ABSENT, CONSTANTS, AttributeRead, TensorRead, Where
from autoparallel.support.module_paths import join_path
from autoparallel.support.torch_private import without_function_modes

__all__ = ["TensorFacts"]

# Properties that stay as they are during a call, and those that are a matter of the moment.
_LASTING = ("requires_grad", "is_leaf", "retains_grad", "is_inference")
_PASSING = ("grad", "_version")
_MOST_PAIRED = 16  # inputs that are compared with one another
# Functions that give the memory of a tensor, which may be larger than the tensor.
_MEMORY = frozenset(
    getattr(torch.Tensor, name) for name in ("untyped_storage", "storage", "_typed_storage")
)
# Functions that tell of the order in which the numbers of a tensor lie.
_ORDERS = (torch.Tensor.is_contiguous, torch.Tensor.stride, torch.Tensor.storage_offset)


class TensorFacts(TorchFunctionMode):
    """A mode that answers what a forward asks of tensors, and notes what it was told.

    model: the one that is to be traced, with the tensors that it has in truth. inputs: the tensors
    that it is given in truth; None where Python calls it, as they are others at each call then.
    folding: the blocks that are hidden, whose results have no attributes. reads: of the model's own
    tensors. given: of inputs. failure: the first
    refusal, remembered as the model may catch it.

    >>> layer = nn.Linear(2, 2)
    >>> facts = TensorFacts(layer, None, Folding((), frozenset()))
    >>> with facts.installed(()):
    ...     _ = eval("w.requires_grad", {"w": layer.weight, "__name__": "a_model"})
    >>> [(str(read), read.value) for read in facts.reads]
    [("_parameters.['weight'].requires_grad", True)]
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[torch.Tensor] | None,
        folding: Folding,
    ) -> None:
        super().__init__()
        self.model, self.inputs, self.folding = model, inputs, folding
        self.truth = {path: tensor for path, _, _, tensor in named_tensors(model)}
        self.paths = {id(tensor): path for path, tensor in reversed(list(self.truth.items()))}
        # By their dictionaries: to walk through the modules while they are traced would be noticed.
        self.holders = [
            (path, tensors)
            for path, module in model.named_modules(remove_duplicate=False)
            for tensors in (module._parameters, module._buffers)
        ]
        self.traced: dict[int, tuple[str, torch.Tensor]] | None = None
        self.numbers: dict[int, int] = {}
        self.marked: dict[int, tuple[torch.Tensor, str]] = {}
        self.reads: dict[AttributeRead, None] = {}
        self.given: dict[TensorRead, None] = {}
        self.failure: CaptureError | None = None

    @contextlib.contextmanager
    def installed(self, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
        """Answer within, in this thread. tensors: the inputs as the tracer has them."""
        self.numbers = {id(tensor): number for number, tensor in enumerate(tensors)}
        self.traced = None
        before = _current.facts
        with _watched_attributes(), self:
            _current.facts = self
            try:
                yield
            finally:
                _current.facts = before

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function in _ORDERS and id(args[0]) in self.numbers and _asked_by_user():
            self.order(function, args[0], (*args[1:], *(kwargs or {}).values()))
        if function in _MEMORY and id(args[0]) in self.numbers and _asked_by_user():
            raise self.refuse(
                f"the forward asks for the memory of its input {self.numbers[id(args[0])]}",
                "the input may be a part of other memory in the next call",
                "ask for the size of the tensor: x.numel() * x.element_size()",
            )
        name = _names().get(function)
        if name == "grad" and _sets_to_zero(sys._getframe(1)):
            raise self.refuse(
                "the forward sets gradients to zero",
                "a trace has tensors of its own, to which no gradient was added",
                "do it outside of the forward",
            )
        if name is None or not args or not _asked_by_user():
            return function(*args, **(kwargs or {}))
        return self.fact(args[0], name, lambda: function(*args, **(kwargs or {})))

    def fact(self, tensor: torch.Tensor, name: str, traced: Callable[[], Any]) -> Any:
        """Return the property of a tensor. traced: returns what it is in the trace."""
        path, number = self.path_of(tensor), self.numbers.get(id(tensor))
        if number is not None and self.inputs is not None and name in _LASTING:
            value = _property(self.inputs[number], name)
            self.given[TensorRead(number, name, value)] = None
            return value
        if path is not None and name in _LASTING:
            value = _property(self.truth[path], name)
            if name != "is_inference":
                self.note(path, name, value)
            return value
        if number is None and path is None and name in ("grad", "retains_grad"):
            return traced()  # such a tensor has none
        raise self.refuse(
            f"the forward reads {name} of {self.described(path, number)}",
            "a trace has tensors of its own, of which this may be another",
            "keep what reads it in a module of its own, which stays Python, or pass it as an "
            "argument",
        )

    def pairs(self, count: int) -> tuple[TensorRead, ...]:
        """Return which inputs are one object: the tracer has another tensor for each of them.

        count: the number of inputs.
        """
        given = self.inputs
        return tuple(
            TensorRead(
                number, "is", given is not None and given[number] is given[other], None, other
            )
            for number in range(min(count, _MOST_PAIRED))
            for other in range(number)
        )

    def order(self, function: Any, tensor: torch.Tensor, arguments: tuple[Any, ...]) -> None:
        """Note in which order the numbers of an input lie, which the forward asks for.

        arguments: of the function of torch's that it asks by.
        """
        number, order = self.numbers[id(tensor)], None
        if function is torch.Tensor.is_contiguous and arguments:
            order = arguments[0]
        contiguous = False
        if self.inputs is not None:
            with without_function_modes():
                given = self.inputs[number]
                contiguous = given.is_contiguous(memory_format=order or torch.contiguous_format)
            self.given[TensorRead(number, "is_contiguous", contiguous, order)] = None
        # The strides of a contiguous tensor follow from its sizes; where it begins does not.
        begins = function is torch.Tensor.storage_offset
        if self.inputs is None or begins or (function is torch.Tensor.stride and not contiguous):
            raise self.refuse(
                f"the forward asks how its input {number} lies in memory",
                "the input may lie otherwise in the next call",
                "make it contiguous before the call, or call x.contiguous() and do not ask",
            )

    def attribute(self, tensor: torch.Tensor, name: str) -> Any:
        """Return an attribute that a tensor has in truth and not in the trace, ABSENT if none."""
        path, number = self.path_of(tensor), self.numbers.get(id(tensor))
        if path is None and number is None:
            return ABSENT
        value: Any = ABSENT
        if path is not None:
            value = vars(self.truth[path]).get(name, ABSENT)
        elif self.inputs is not None:
            value = vars(self.inputs[number or 0]).get(name, ABSENT)
        # A part is given tensors that Python has computed: the program is for those without it.
        if not (value is ABSENT or isinstance(value, CONSTANTS)):
            raise self.refuse(
                f"the forward reads the attribute {name} of {self.described(path, number)}",
                "a graph is given tensors without the attributes that were set on them",
                "pass it as an argument of its own",
            )
        if path is not None:
            self.note(path, name, value)
        else:
            self.given[TensorRead(number or 0, name, value)] = None
        return value

    def marks(self, tensor: torch.Tensor, name: str) -> None:
        """Note that the forward sets an attribute on a tensor."""
        path, number = self.path_of(tensor), self.numbers.get(id(tensor))
        if path is not None or number is not None:
            raise self.unseen(name, self.described(path, number))
        if self.folding.hidden:
            raise self.folding.fail("a tensor is given an attribute")
        self.marked[id(tensor)] = (tensor, name)

    def refuse_marked(self, tensors: Sequence[torch.Tensor]) -> None:
        """Raise CaptureError where one of the results was given an attribute."""
        for tensor in tensors:
            if id(tensor) in self.marked:
                raise self.unseen(self.marked[id(tensor)][1], "a tensor that it returns")

    def unseen(self, name: str, owner: str) -> CaptureError:
        """Return the error for an attribute that a program would not set."""
        return self.refuse(
            f"the forward sets the attribute {name} of {owner}",
            "a graph returns values, and tensors of its own without attributes",
            "return it beside the tensor",
        )

    def refuse(self, what: str, why: str, fix: str) -> CaptureError:
        """Return an error, and remember it: the model may catch it."""
        error = CaptureError(what, why=why, fix=fix)
        self.failure = self.failure or error
        return error

    def path_of(self, tensor: torch.Tensor) -> str | None:
        """Return the path of a tensor of the model, as it is in truth or in the trace."""
        if self.traced is None:
            # The tensors are kept with their paths, so that none gets the identity of another.
            self.traced = {}
            for path, tensors in self.holders:
                for name, own in tensors.items():
                    if own is not None:
                        self.traced.setdefault(id(own), (join_path(path, name), own))
        known = self.traced.get(id(tensor))
        return self.paths.get(id(tensor)) if known is None else known[0]

    def note(self, path: str, name: str, value: Any) -> None:
        """Note a fact of a parameter or buffer."""
        owner, _, last = path.rpartition(".")
        kind = "_parameters" if last in self.model.get_submodule(owner)._parameters else "_buffers"
        route = (("attribute", kind), ("item", last))
        self.reads[AttributeRead(owner, route, name, Where.ASKED, value)] = None

    def described(self, path: str | None, number: int | None) -> str:
        """Return the name of a tensor for messages."""
        if path is not None:
            return path
        return "a tensor that it computes" if number is None else f"its input {number}"


_methods: dict[Any, str] = {}


def _names() -> dict[Any, str]:
    """Return by function of torch the property that it reads."""
    if not _methods:
        kind: Any = torch.Tensor
        for name in (*_LASTING, *_PASSING):
            member = getattr(kind, name)
            _methods[member if callable(member) else member.__get__] = name
        _methods[torch.is_inference] = "is_inference"
    return _methods


def _property(tensor: torch.Tensor, name: str) -> Any:
    """Return a property of a tensor, past all modes."""
    with without_function_modes():
        value = getattr(tensor, name)
        return value() if callable(value) else value


def _asked_by_user() -> bool:
    """Return whether code of the user's asks, and not torch or this project for itself."""
    frame = _asker(sys._getframe(2))
    package = "" if frame is None else str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return frame is not None and package not in ("autoparallel", "torch")


def _asker(frame: types.FrameType | None) -> types.FrameType | None:
    """Return the frame that asks: one mode hands what it does not want over to the next."""
    while frame is not None and frame.f_code.co_name == "__torch_function__":
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] != "autoparallel":
            break
        frame = frame.f_back
    return frame


def _sets_to_zero(frame: types.FrameType) -> bool:
    """Return whether a module's gradients are about to be set to zero."""
    asker = _asker(frame)
    return asker is not None and asker.f_code is nn.Module.zero_grad.__code__


class _Current(threading.local):
    """The facts that a thread's reads of attributes go to, None where nobody wants to know."""

    facts: TensorFacts | None = None


_current = _Current()
_lock = threading.Lock()
_count = 0


@contextlib.contextmanager
def _watched_attributes() -> Iterator[None]:
    """Have attributes that tensors do not have, and those that are set, reported within."""
    global _count
    kind: Any = torch.Tensor
    with _lock:
        _count += 1
        kind.__getattr__, kind.__setattr__ = _missing, _setting
    try:
        yield
    finally:
        with _lock:
            _count -= 1
            if not _count:
                del kind.__getattr__, kind.__setattr__


def _missing(tensor: torch.Tensor, name: str) -> Any:
    """Return an attribute that a tensor does not have in the trace."""
    facts = _current.facts
    if facts is not None and not name.startswith("__") and _asked_by_user():
        value = facts.attribute(tensor, name)
        if value is not ABSENT:
            return value
    raise AttributeError(f"{type(tensor).__name__!r} object has no attribute {name!r}")


def _setting(tensor: torch.Tensor, name: str, value: Any) -> None:
    """Set an attribute of a tensor."""
    # Torch sets dozens of attributes on each tensor that it traces with: this has to be quick.
    if sys._getframe(1).f_globals.get("__name__", "")[:6] == "torch.":
        object.__setattr__(tensor, name, value)
        return
    facts = _current.facts
    if facts is not None and not hasattr(type(tensor), name) and _asked_by_user():
        facts.marks(tensor, name)
    object.__setattr__(tensor, name, value)
