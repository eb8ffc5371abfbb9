"""From a module and example inputs to a Graph. The only user of torch.export."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import nn

from autoparallel.errors import (
    AutoParallelError,
    CaptureError,
    InputsNeededError,
    WrappedModelError,
)
from autoparallel.graph.blocks import Group, find_groups
from autoparallel.graph.draws import DecidedDraws
from autoparallel.graph.effects import effects, refuse_effects
from autoparallel.graph.folding import Folding, Unfoldable
from autoparallel.graph.graph import Dim, Graph, Sym
from autoparallel.graph.importer import Importer
from autoparallel.graph.repeats import Repeats, find_repeats
from autoparallel.graph.sizes import IntricateSizes, WatchedSizes
from autoparallel.graph.spelled import Known, spelled_out
from autoparallel.randomness import python_numbers
from autoparallel.structure import Skeleton, flatten, rebuild

__all__ = [
    "Captured",
    "Modes",
    "bind_inputs",
    "capture",
    "find_example_inputs",
    "modes_of",
    "refuse_wrapped",
]

Modes = tuple[bool, ...]

_log = logging.getLogger(__name__)
# A block that is called as none before it is traced by itself in the next attempt.
_ATTEMPTS = 3


def modes_of(model: nn.Module) -> Modes:
    """Of the model and of each module in it, whether it trains: another mode, another program."""
    return tuple(module.training for module in model.modules())


@dataclass(frozen=True)
class Captured:
    """graph: the program. inputs, outputs: skeletons of what goes in and what comes out.

    aliases: for each parameter path the one that stands for it (another one for tied weights).
    constants: tensors that the forward makes from numbers, by the targets of "constant" nodes.
    repeats: paths of modules that are instances of one traced block. guards: what the tracer
    took for granted about the symbolic sizes, such as which way a branch goes. part: whether the
    module is called by Python that goes on with what it returns. modes: see `modes_of`.
    """

    graph: Graph
    inputs: Skeleton
    outputs: Skeleton
    aliases: Mapping[str, str]
    constants: Mapping[str, torch.Tensor]
    repeats: tuple[tuple[str, ...], ...] = ()
    guards: tuple[sympy.Basic, ...] = ()
    part: bool = False
    modes: Modes = ()

    def fits(self, inputs: list[torch.Tensor]) -> bool:
        """Whether the program is right for tensors of these types and sizes.

        Where it is not, tracing with them would give another program.
        """
        shapes = tuple(tuple(tensor.shape) for tensor in inputs)
        types = [tensor.dtype for tensor in inputs]
        values = [node.result for node in self.graph.nodes if node.kind == "input"]
        if types != [value.dtype for value in values]:
            return False
        if shapes not in self._known_shapes:
            self._known_shapes[shapes] = self._holds(shapes, [value.shape for value in values])
        return self._known_shapes[shapes]

    @cached_property
    def blocks(self) -> Repeats:
        """The repeated blocks of the graph."""
        return find_repeats(self.graph)

    @cached_property
    def _known_shapes(self) -> dict[tuple[tuple[int, ...], ...], bool]:
        return {}

    def _holds(self, shapes: tuple[tuple[int, ...], ...], expected: list[tuple[Dim, ...]]) -> bool:
        sizes: dict[Any, int] = {}
        derived: list[tuple[sympy.Expr, int]] = []
        for shape, dims in zip(shapes, expected, strict=True):
            if len(shape) != len(dims):
                return False
            for actual, dim in zip(shape, dims, strict=True):
                if not isinstance(dim, Sym):
                    if actual != dim:
                        return False
                elif dim.expr.is_Symbol:
                    # The tracer treats 0 and 1 apart.
                    if actual < 2 or sizes.setdefault(dim.expr, actual) != actual:
                        return False
                else:
                    derived.append((dim.expr, actual))
        if any(expr.subs(sizes) != actual for expr, actual in derived):
            return False
        return all(guard.subs(sizes) != sympy.false for guard in self.guards)


def refuse_wrapped(model: object) -> None:
    """Raises WrappedModelError for a model that another engine has already split or wrapped.

    And AutoParallelError for what is no module at all.
    """
    from torch.distributed.tensor import DTensor

    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else repr(model)
        raise AutoParallelError(
            f"the model is no nn.Module but {given}",
            fix="pass a module: an instance of a class, or a function wrapped in one's forward",
        )
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
        positional: int,
        inputs: Skeleton,
        outputs: list[Skeleton],
        folding: Folding,
        known: Known,
        part: bool,
    ) -> None:
        super().__init__()
        self.known = known
        self.model = model
        self.bound, self.positional = bound, positional
        self.inputs, self.folding, self.part = inputs, folding, part
        self.outputs = outputs
        self.training = model.training

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        arguments = rebuild(self.inputs, list(tensors))
        args, kwargs = _as_given(self.bound.signature, arguments, self.positional)
        held = effects(self.model, arguments) if self.part else {}
        numbers = python_numbers()
        # Not __call__: the model's own hooks run where the program is called.
        watched = WatchedSizes(tensors)
        with self.folding.forward(), DecidedDraws(), spelled_out(self.known), watched:
            result = self.model.forward(*args, **kwargs)
        if self.part:
            refuse_effects(held, effects(self.model, arguments))
        if python_numbers() != numbers:
            raise CaptureError(
                f"{type(self.model).__name__}.forward draws random numbers with Python or numpy",
                why="a graph would have the numbers of this one trace for ever",
                fix="draw them with torch, or in a module that is not traced",
            )
        flat, skeleton = flatten(result)
        self.outputs.append(skeleton)
        return tuple(flat)


def _as_given(
    signature: inspect.Signature, arguments: Mapping[str, Any], positional: int
) -> tuple[list[Any], dict[str, Any]]:
    """Arguments by name, as they were given: the first `positional` ones by position.

    A decorated forward may have a keyword argument that it must not be given twice.
    """
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for name, value in arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            args.extend(value)
        elif kind is inspect.Parameter.VAR_KEYWORD:
            kwargs.update(value)
        elif len(args) < positional and kind is not inspect.Parameter.KEYWORD_ONLY:
            args.append(value)
        else:
            kwargs[name] = value
    return args, kwargs


@contextlib.contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Modules get their attributes back: the traced forward, or export, may have set some."""
    held = [(vars(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for now, before in held:
            now.clear()
            now.update(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporting logs and warns about what the graph below makes explicit anyway."""
    loggers = [logging.getLogger(name) for name in ("torch._export", "torch.export", "torch.fx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _all(_: str) -> bool:
    return True


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    fold: bool = True,
    known: Known = _all,
    part: bool = False,
) -> Captured:
    """Trace `model(*args, **kwargs)` in the model's present mode (train or eval).

    Every dimension of the inputs stays symbolic unless the model fixes it (sizes 0 and 1 are
    fixed), or other sizes come from it that are too intricate to follow (see WatchedSizes).
    Nothing is computed: the inputs may be on the meta device. fold: trace only some of the blocks
    that are equal; the graph is the same, and sooner there. known: whether an op, by its name, is
    to be traced as itself; others are traced as the ops by which torch defines them.
    part: Python calls the model and may look at all that it does: side effects are refused.
    Raises CaptureError, with the user's source line, where the model cannot be traced.
    """
    bound = bind_inputs(model, args, kwargs)
    wanted = _Wanted(model, bound, len(args), known, part, frozenset())
    while True:
        try:
            return _folded(wanted) if fold else _traced(wanted, _unfolded(), one_by_one=True)
        except IntricateSizes as reason:
            _log.info("dims of the inputs are fixed: %s", reason)
            wanted = replace(wanted, fixed=wanted.fixed | reason.dims)


@dataclass(frozen=True)
class _Wanted:
    """What to trace, and how: see `capture`.

    positional: how many arguments were given by position. fixed: (input, dim) pairs that are not
    symbolic.
    """

    model: nn.Module
    bound: inspect.BoundArguments
    positional: int
    known: Known
    part: bool
    fixed: frozenset[tuple[int, int]]


def _folded(wanted: _Wanted) -> Captured:
    """One trace, with equal blocks traced once where that can be."""
    apart: frozenset[str] = frozenset()
    groups: tuple[Group, ...] = ()
    for _ in range(_ATTEMPTS):
        try:
            groups = find_groups(wanted.model)
            if not groups:
                break
            return _traced(wanted, Folding(groups, apart))
        except Unfoldable as reason:
            _log.info("blocks are traced one by one: %s", reason)
            if not reason.path:
                break
            apart |= {reason.path}
        except IntricateSizes:
            raise
        except Exception as error:
            # Whatever it is, the full trace has it too, and then it is explained.
            _log.info("blocks are traced one by one: %r", error)
            break
    return _traced(wanted, _unfolded(), one_by_one=bool(groups))


def _unfolded() -> Folding:
    return Folding((), frozenset())


def _traced(wanted: _Wanted, folding: Folding, one_by_one: bool = False) -> Captured:
    """One trace. one_by_one: whether equal blocks are traced one by one.

    Raises CaptureError, Unfoldable where blocks were hidden wrongly, and IntricateSizes where
    more dims are to be fixed.
    """
    model, bound, part = wanted.model, wanted.bound, wanted.part
    tensors, inputs = flatten(dict(bound.arguments))
    device = next((parameter.device for parameter in model.parameters()), None)
    samples = tuple(_sample(tensor, device) for tensor in tensors)
    outputs: list[Skeleton] = []
    flat = _Flat(model, bound, wanted.positional, inputs, outputs, folding, wanted.known, part)
    free, static = torch.export.Dim.AUTO, torch.export.Dim.STATIC
    shapes = tuple(
        {dim: static if (number, dim) in wanted.fixed else free for dim in range(sample.dim())}
        for number, sample in enumerate(samples)
    )
    dynamic = (shapes,) if samples else None
    # Torch can remember what an op makes of tensors of which sizes. Where sizes are symbolic, that
    # costs as much as to find out twice: it pays only for blocks that come again and again.
    remembers = torch._dynamo.config.patch(fake_tensor_cache_enabled=one_by_one)
    try:
        with _quiet(), _left_alone(model), folding.installed(), remembers:
            program = torch.export.export(flat, samples, strict=False, dynamic_shapes=dynamic)
    except (Unfoldable, IntricateSizes, CaptureError):
        raise
    except Exception as error:
        raise _explain(error, model) from error
    if folding.failure is not None:
        raise folding.failure
    importer = Importer(program, model, folding)
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    aliases = {path: first.setdefault(id(parameter), path) for path, parameter in named}
    graph = _by_first_name(importer.graph(), aliases)
    repeats = folding.repeats()
    return Captured(
        graph,
        inputs,
        outputs[-1],
        aliases,
        importer.constants,
        repeats,
        importer.guards,
        part,
        modes_of(model),
    )


def _by_first_name(graph: Graph, aliases: Mapping[str, str]) -> Graph:
    """Tied weights go by the name that `named_parameters` gives them, whichever was traced."""
    nodes = tuple(
        replace(node, target=aliases[node.target]) if node.kind == "parameter" else node
        for node in graph.nodes
    )
    return replace(graph, nodes=nodes)


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
            why="a graph has one path for all data"
            + ("" if where else "; " + text.strip().split("\n")[0][:200]),
            fix="write the choice with torch.where, or move it out of the module that is split",
        )
    return CaptureError(
        f"{type(model).__name__}.forward could not be traced",
        where=where,
        why=f"{type(error).__name__}: {text.strip().splitlines()[0][:300] if text else ''}",
        fix="see whether torch.export.export(model, ..., strict=False) takes it",
    )
