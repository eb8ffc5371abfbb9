"""The subjects of the sweep: every op and module of PyTorch's databases, as small models."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.testing._internal import common_methods_invocations as database
from torch.testing._internal.common_modules import module_db

from autoparallel.support.torch_private import tree_flatten, tree_leaves, tree_unflatten

__all__ = ["Case", "SampleModel", "Subject", "all_subjects"]

# What the database calls its sizes. Both sets have all sizes above 1: one divides by two and three,
# and one by neither in most dims.
_EVEN = {"S": 6, "M": 12, "L": 24, "XS": 4}
_ODD = {"S": 5, "M": 10, "L": 20, "XS": 3}
_MOST_SAMPLES, _SAMPLES = 500, 60  # of an op: those that are read, and kept of these
_LARGEST = 15_000  # elements of an operand


@dataclass(frozen=True)
class Case:
    """A Case is one call of an op between parameters and a loss, in float64.

    model: returns the loss and all tensors of the op. text: the sizes and constants of the call.
    plain: whether all operands have dims, of sizes above 1, and finite numbers. empty: whether an
    operand has no elements.
    """

    model: SampleModel
    inputs: tuple[torch.Tensor, ...]
    text: str
    plain: bool
    empty: bool

    @property
    def with_fixed_sizes(self) -> Case:
        """The same call with parameters as operands."""
        model = SampleModel(self.model.op, list(self.inputs), fixed=True).train()
        inputs = (torch.ones(3, 2, dtype=torch.float64),)
        return replace(self, model=model, inputs=inputs, text=f"{self.text} fixed")


@dataclass(frozen=True)
class Subject:
    """A Subject is an op or a module. sources: functions that make its cases, at two sets of sizes
    where it has them.
    """

    name: str
    sources: tuple[Callable[[], Iterator[Case]], ...]


class _Op(nn.Module):
    """An op with its constants. The plan's rows that are its own begin with its path, "op".

    template: the leaves of the call's arguments, None for a tensor.
    """

    def __init__(self, run: Callable[..., Any], template: list[Any], spec: Any) -> None:
        super().__init__()
        self.run, self.template, self.spec = run, template, spec

    def forward(self, *tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        leaves = [next(given) if leaf is None else leaf[0] for leaf in self.template]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return self.run(*args, **kwargs)


class _Before(nn.Module):
    """Gives an operand a parameter before it, which leaves its numbers as they are.

    A last dim is multiplied by the identity where that is exact; else zeros are added. Integers
    are given as they are.
    """

    def __init__(self, operand: torch.Tensor) -> None:
        super().__init__()
        floating = operand.is_floating_point() or operand.is_complex()
        self.multiplies = (
            floating
            and operand.dim() > 0
            and operand.numel() > 0
            and 1 < operand.shape[-1] <= 64
            and bool(operand.isfinite().all())
        )
        zeros = torch.zeros_like(operand, memory_format=torch.contiguous_format)
        weight = torch.eye(operand.shape[-1], dtype=operand.dtype) if self.multiplies else zeros
        self.weight = nn.Parameter(weight) if floating else None

    def forward(self, operand: torch.Tensor) -> torch.Tensor:
        if self.weight is None:
            return operand
        return operand @ self.weight if self.multiplies else operand + self.weight


class _Held(nn.Module):
    """Gives an operand that is a parameter, or a buffer of integers."""

    def __init__(self, operand: torch.Tensor) -> None:
        super().__init__()
        floating = operand.is_floating_point() or operand.is_complex()
        self.weight = nn.Parameter(operand.clone()) if floating else None
        self.register_buffer("held", None if floating else operand.clone())

    def forward(self) -> torch.Tensor:
        held: torch.Tensor = self.held if self.weight is None else self.weight
        return held.clone()


class SampleModel(nn.Module):
    """Parameters, the op and a loss. An op that reads no tensor leaves one unused.

    fixed: the operands are parameters, whose sizes are numbers; else they are computed from inputs
    of any sizes. detached: the op is not differentiated, and the loss is of what it reads.
    """

    def __init__(self, op: nn.Module, operands: list[torch.Tensor], fixed: bool) -> None:
        super().__init__()
        self.op = op
        self.before = nn.ModuleList(map(_Held if fixed else _Before, operands))
        self.fixed = fixed
        self.detached = False

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.fixed:
            operands = [held() for held in self.before]
        else:
            operands = [before(tensor) for before, tensor in zip(self.before, tensors, strict=True)]
        terms = operands if self.detached else []
        given = [operand.detach() for operand in operands] if self.detached else operands
        results = [t for t in tree_leaves(self.op(*given)) if isinstance(t, torch.Tensor)]
        results = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in results]
        loss = tensors[0].sum() if self.fixed else torch.zeros((), dtype=torch.float64)
        for term in terms or results:
            real = torch.view_as_real(term.resolve_conj()) if term.is_complex() else term
            if real.is_floating_point():
                # The loss itself is summed in full precision, and of numbers alone: a sum that is
                # pending is 0 on most ranks, and 0 times infinity is no number.
                real = real.double().nan_to_num(0, 0, 0)
                loss = loss + (real * (real * 0.5 + 0.3)).sum()
        return (loss, *results)


def _case(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Case | None:
    """Return the case of one sample, None where its operands are no ordinary small tensors."""
    leaves, spec = tree_flatten((args, kwargs))
    operands = [leaf.detach().clone() for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if any(t.layout != torch.strided or t.numel() > _LARGEST for t in operands):
        return None
    template = [None if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in leaves]
    op = _Op(run, template, spec)
    constants = [leaf[0] for leaf in template if leaf]
    operands = operands or [torch.arange(1.0, 7.0, dtype=torch.float64)]
    return Case(
        SampleModel(op, operands, fixed=False).train(),
        tuple(operands),
        f"{[tuple(t.shape) for t in operands]} {constants}"[:200],
        all(t.dim() and min(t.shape) > 1 and bool(t.isfinite().all()) for t in operands),
        any(not t.numel() for t in operands),
    )


def _undisturbed_op(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run an op without setting torch's seed before it, as the database does."""
    return run(*args, **kwargs)


def _with_sizes(sizes: dict[str, int]) -> None:
    """Give the database's modules these sizes, and let random ops draw freely."""
    names = [name for name in sys.modules if name.startswith("torch.testing._internal.opinfo")]
    for module in (database, *(sys.modules[name] for name in names)):
        for name, size in sizes.items():
            if isinstance(vars(module).get(name), int):
                setattr(module, name, size)
        if "wrapper_set_seed" in vars(module):
            module.wrapper_set_seed = _undisturbed_op  # type: ignore[attr-defined]


def _spread(samples: Any) -> list[Any]:
    """Return some samples of all places: the database varies one thing after the other."""
    read = list(islice(samples, _MOST_SAMPLES))
    return read[:: max(1, len(read) // _SAMPLES)]


def _op_cases(info: Any, sizes: dict[str, int]) -> Iterator[Case]:
    _with_sizes(sizes)
    torch.manual_seed(0)
    samples = info.sample_inputs("cpu", torch.float64, requires_grad=False)
    for sample in _spread(samples):
        # What the database compares of results that are not unique, as eigenvectors.
        run = partial(_compared, info.op, sample.output_process_fn_grad)
        case = _case(run, (sample.input, *sample.args), dict(sample.kwargs))
        if case is not None:
            yield case


def _compared(op: Callable[..., Any], process: Callable[[Any], Any], *args: Any, **kwargs: Any):
    return process(op(*args, **kwargs))


def _module_cases(info: Any) -> Iterator[Case]:
    torch.manual_seed(0)
    samples = info.module_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=False, training=True
    )
    for sample in _spread(samples):
        made, given = sample.constructor_input, sample.forward_input
        module = info.module_cls(*made.args, **made.kwargs).double()
        if any(map(is_lazy, module.parameters())):
            module(*given.args, **given.kwargs)  # gives its parameters their shapes
        case = _case(module, given.args, dict(given.kwargs))
        if case is not None:
            yield case


def all_subjects() -> tuple[Subject, ...]:
    """Return every op that knows float64, and every module, in alphabetical order."""
    subjects = []
    for info in database.op_db:
        if torch.float64 in info.supported_dtypes("cpu"):
            variant = f" ({info.variant_test_name})" if info.variant_test_name else ""
            sources = tuple(partial(_op_cases, info, sizes) for sizes in (_EVEN, _ODD))
            subjects.append(Subject(info.name + variant, sources))
    for info in module_db:
        subjects.append(Subject(f"torch.{info.name}", (partial(_module_cases, info),)))
    return tuple(sorted(subjects, key=lambda subject: subject.name))
