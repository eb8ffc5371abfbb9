"""The facts about an autograd.Function that show when both of its passes run on fake tensors.

The run has a tracer of its own, so that nothing is recorded, and no numbers, so that it costs
little. It shows what an op could not say: that the Function reads tensors that it is not given,
writes to those that it is given, or draws random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autoparallel.errors import AutoParallelError, CaptureError, UnsupportedOpError
from autoparallel.support.fake_tensors import fake_mode
from autoparallel.support.memory_writes import memory_of
from autoparallel.support.torch_private import (
    OpOverload,
    TorchDispatchMode,
    hint_of,
    schema_of,
    tree_leaves,
    without_function_modes,
    without_modes,
)

__all__ = ["Examined", "ResultSlot", "examine"]

# These make a constant of Python a tensor: what they are given was nobody's before.
_LIFTS = ("aten.lift_fresh.default", "aten.lift.default", "aten.lift_fresh_copy.default")


@dataclass(frozen=True)
class ResultSlot:
    """The place of a tensor among the results of a Function. index: among its tensors."""

    index: int


@dataclass(frozen=True)
class Examined:
    """The facts about a Function's passes.

    results: what it returns, with slots in the places of tensors. count: of those tensors. shared:
    of each, whether it lies in the memory of an operand or of a result before it. sources: of each,
    the operands whose memory it shares. differentiable: of each, whether it has a gradient.
    gradients: of each operand, whether the backward pass gives it a gradient. plain: whether it
    consists of torch's own ops, which check their operands.
    """

    results: Any
    count: int
    shared: tuple[bool, ...]
    sources: tuple[tuple[int, ...], ...]
    differentiable: tuple[bool, ...]
    gradients: tuple[bool, ...]
    plain: bool

    @property
    def token(self) -> str:
        """All that an op of the Function depends on, as text."""
        return repr(self)

    def tensors_of(self, returned: Any) -> tuple[torch.Tensor, ...]:
        """Return the tensors in what the Function has returned."""
        parts = returned if isinstance(returned, tuple) else (returned,)
        return tuple(part for part in parts if isinstance(part, torch.Tensor))


def examine(
    apply: Callable[[Sequence[Any], Sequence[Any]], Any],
    name: str,
    tensors: Sequence[torch.Tensor],
    integers: Sequence[Any],
    is_model_memory: Callable[[torch.Tensor], bool],
) -> Examined:
    """Run both passes of a Function on fake tensors, and return the facts.

    apply: applies it to tensors and integers. name: of its class. tensors, integers: of one call.
    is_model_memory: whether a real tensor lies in the memory of the model.
    Raises CaptureError where it does more than an op of its operands would, or cannot be run so,
    and UnsupportedOpError where it could not run on several ranks as it is either.
    """
    numbers = list(map(_number, integers))
    try:
        with without_function_modes(), without_modes(), torch.enable_grad():
            return _examined(apply, name, tensors, numbers, is_model_memory)
    except AutoParallelError:
        raise
    except Exception as error:  # both passes are anyone's code, and may fail in any way
        words = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        why = f"its passes cannot be followed on tensors without numbers: {words}"
        raise _refusal(name, why) from error


def _examined(
    apply: Callable[[Sequence[Any], Sequence[Any]], Any],
    name: str,
    tensors: Sequence[torch.Tensor],
    numbers: Sequence[Any],
    is_model_memory: Callable[[torch.Tensor], bool],
) -> Examined:
    """Return the facts, where no tracer is at work any more."""
    mode = fake_mode(allow_non_fake_inputs=True)
    with mode:
        leaves = [_fake(tensor) for tensor in tensors]
        watch = _Watch(name, mode, leaves, is_model_memory)
        with watch:
            # A Function whose operand is a leaf could not return it as it is.
            operands = [leaf.view_as(leaf) for leaf in leaves]
            returned = apply(operands, numbers)
        template, results = _template(returned, name)
        memories = [memory_of(leaf) for leaf in leaves]
        sources = tuple(
            tuple(at for at, memory in enumerate(memories) if memory == memory_of(result))
            for result in results
        )
        seen = [memory_of(result) for result in results]
        shared = tuple(bool(s) or seen[at] in seen[:at] for at, s in enumerate(sources))
        differentiable = tuple(result.requires_grad for result in results)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        ends = [result for result in results if result.requires_grad]
        reached = {id(leaf): True for leaf in wanted}
        if ends and wanted and not _lacks_backward(ends):
            seeds = [torch.ones_like(end) for end in ends]
            watch.knows(*seeds)
            watch.backward = True
            with watch:
                grads = torch.autograd.grad(ends, wanted, seeds, allow_unused=True)
            reached = {id(leaf): g is not None for leaf, g in zip(wanted, grads, strict=True)}
    gradients = tuple(reached.get(id(leaf), False) for leaf in leaves)
    return Examined(template, len(results), shared, sources, differentiable, gradients, watch.plain)


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    """Return a fake tensor like this one, at the sizes of the example inputs, as a leaf."""
    shape, strides = (list(map(_number, sizes)) for sizes in (tensor.shape, tensor.stride()))
    fake = torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device)
    return fake.requires_grad_(tensor.is_floating_point() or tensor.is_complex())


def _number(size: Any) -> int:
    """Return a size for the example inputs."""
    return int(hint_of(size) if isinstance(size, torch.SymInt) else size)


def _template(returned: Any, name: str) -> tuple[Any, list[torch.Tensor]]:
    """Return what a Function returned with slots in the places of tensors, and the tensors."""
    results: list[torch.Tensor] = []

    def slot(part: Any) -> Any:
        """Return the place of a tensor, or a constant."""
        if isinstance(part, torch.Tensor):
            results.append(part)
            return ResultSlot(len(results) - 1)
        if part is None or isinstance(part, (bool, str)):
            return part
        raise _refusal(name, f"it returns a {type(part).__name__}")

    template = tuple(map(slot, returned)) if isinstance(returned, tuple) else slot(returned)
    if not results:
        raise _refusal(name, "it returns no tensor")
    return template, results


def _lacks_backward(ends: Sequence[torch.Tensor]) -> bool:
    """Return whether the class defines no backward pass, so that a call of it is an error."""
    kind: Any = getattr(ends[0].grad_fn, "_forward_cls", None)
    base = torch.autograd.Function
    return kind is not None and kind.backward is base.backward and kind.vjp is base.vjp


def _refusal(name: str, why: str) -> CaptureError:
    """Return the error for a Function that does more than an op of its operands would."""
    return CaptureError(
        f"the autograd.Function {name} cannot be an op of a graph",
        why=why,
        fix="let it compute with the tensors that it is given alone, or keep it in a submodule of "
        "its own, which then stays Python",
    )


class _Watch(TorchDispatchMode):
    """A mode that follows a Function's memory: all is made from its operands, or is constant.

    known: memory of the operands and of all that was computed. operands: memory of the operands.
    plain: whether all ops were torch's own. backward: whether the backward pass runs.
    """

    def __init__(
        self,
        name: str,
        mode: Any,
        operands: Sequence[torch.Tensor],
        is_model_memory: Callable[[torch.Tensor], bool],
    ) -> None:
        super().__init__()
        self.name, self.mode, self.is_model_memory = name, mode, is_model_memory
        self.operands = {memory_of(operand) for operand in operands}
        self.known: set[int | None] = set()
        self.kept: list[torch.Tensor] = []  # so that no memory is used a second time
        self.plain, self.backward = True, False
        self.knows(*operands)

    def knows(self, *tensors: torch.Tensor) -> None:
        """Take the memory of these tensors for the Function's own."""
        self.known.update(map(memory_of, tensors))
        self.kept += tensors

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        text = str(function)
        if not isinstance(function, OpOverload):
            raise _refusal(self.name, f"it uses {text}, which holds a program of its own")
        self.plain = self.plain and function.namespace == "aten"
        if torch.Tag.nondeterministic_seeded in function.tags:
            if self.backward:
                raise UnsupportedOpError(
                    f"the backward pass of the autograd.Function {self.name} draws random numbers",
                    why="every rank would draw others, in the model's own Python too",
                    fix="draw them in its forward, and save them for the backward pass",
                )
            raise _refusal(self.name, f"it draws random numbers ({text})")
        if text not in _LIFTS:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor):
                    self.require_known(leaf)
        self.require_unwritten(function, args, kwargs)
        result = function(*args, **kwargs)
        self.knows(*(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)))
        return result

    def require_known(self, tensor: torch.Tensor) -> None:
        """Raise CaptureError for a tensor from elsewhere that is no constant."""
        if memory_of(tensor) in self.known:
            return
        fake = getattr(tensor, "fake_mode", None)
        if fake is not None or tensor.requires_grad or self.is_model_memory(tensor):
            raise _refusal(
                self.name,
                f"it reads a tensor of shape {[*map(str, tensor.shape)]} of the model that is none "
                "of its arguments",
            )

    def require_unwritten(self, function: Any, args: Any, kwargs: Any) -> None:
        """Raise CaptureError for an op that writes to an operand or to a tensor from elsewhere."""
        for at, argument in enumerate(schema_of(function).arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            item = args[at] if at < len(args) else kwargs.get(argument.name)
            for leaf in tree_leaves(item):
                if not isinstance(leaf, torch.Tensor):
                    continue
                memory = memory_of(leaf)
                if memory in self.operands or memory not in self.known:
                    why = f"it writes to a tensor that it is given ({function})"
                    raise _refusal(self.name, why)
