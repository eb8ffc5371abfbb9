"""From a module and example inputs to a Graph. The only user of torch.export."""

from __future__ import annotations

import contextlib
import inspect
import logging
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from autoparallel.capture.block_folding import Folding, Unfoldable
from autoparallel.capture.decided_draws import ConstantComparisons
from autoparallel.capture.decompose import decomposing
from autoparallel.capture.decomposition_registry import Known
from autoparallel.capture.equal_blocks import Group, find_groups
from autoparallel.capture.example_inputs import as_given, bind_inputs
from autoparallel.capture.forward_contexts import quiet
from autoparallel.capture.graph_builder import GraphBuilder
from autoparallel.capture.held_tensors import HeldTensors
from autoparallel.capture.importer import Importer
from autoparallel.capture.intricate_sizes import IntricateSizes, WatchedSizes
from autoparallel.capture.side_effects import (
    NoReplacing,
    changed,
    effects,
    moving,
    refuse_effects,
    tensors_left,
)
from autoparallel.capture.steady_forward import is_steady
from autoparallel.errors import (
    AutoParallelError,
    CaptureError,
    WrappedModelError,
)
from autoparallel.graph.captured import Captured, modes_of
from autoparallel.graph.graph import Graph
from autoparallel.support.model_snapshot import untouched
from autoparallel.support.pytree import Skeleton, flatten, rebuild
from autoparallel.support.rng_state import python_numbers
from autoparallel.support.torch_private import remembering_fake_results

__all__ = ["Captured", "capture", "refuse_wrapped"]

_log = logging.getLogger(__name__)
# A block that is called as none before it is traced by itself in the next attempt.
_ATTEMPTS = 3


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


@dataclass
class _Ran:
    """What is known when a forward has been traced.

    outputs: the skeleton of what it returned. changes: the names of all that it leaves otherwise
    than it was. left: paths of attributes in which it leaves tensors, which are returned too.
    settings: other attributes that it sets, where it does nothing else to the model.
    """

    outputs: Skeleton
    changes: tuple[str, ...]
    left: tuple[str, ...]
    settings: dict[str, Any]


class _Flat(nn.Module):
    """The model with tensors in and tensors out.

    twice: it is called twice, the second time as the first has left it (see steady_forward.py).
    ran: a list for what is known afterwards; export puts back what the module's own attributes
    were.
    """

    def __init__(
        self,
        wanted: _Wanted,
        inputs: Skeleton,
        folding: Folding,
        tensors: HeldTensors,
        twice: bool,
        ran: list[_Ran],
    ) -> None:
        super().__init__()
        self.model, self.wanted, self.tensors = wanted.model, wanted, tensors
        self.inputs, self.folding, self.twice = inputs, folding, twice
        self.remember = ran.append
        # While it is traced, the model has other parameters, but attributes may refer to these.
        self.known = {number: places[0][0] for number, places in tensors.places.items()}
        self.training = self.model.training

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        before, result = self.held({}), self.called(tensors)
        after = self.held({})
        changes = changed(before, after)
        left = tensors_left(self.model, changes)
        if self.twice:
            again = [torch.ops.autoparallel.again(tensor) for tensor in tensors]
            second = self.called(again)
            names = moving(after, self.held({}))
            if names:
                raise _unsteady(self.model, names)
            result = (result, second)
        elif left:
            result = (result, left)
        flat, skeleton = flatten(result)
        settings = _settings(self.model, changes, left)
        self.remember(_Ran(skeleton, changes, tuple(left), settings))
        return tuple(flat)

    def held(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What the model holds that a graph would not change."""
        return effects(self.model, arguments, self.known)

    def called(self, tensors: Sequence[torch.Tensor]) -> Any:
        """What the model returns."""
        wanted = self.wanted
        arguments = rebuild(self.inputs, list(tensors))
        args, kwargs = as_given(wanted.bound.signature, arguments, wanted.positional)
        held = self.held(arguments) if wanted.part else {}
        numbers = python_numbers()
        # Not __call__: the model's own hooks run where the program is called.
        watched = WatchedSizes(tuple(tensors))
        kept = NoReplacing(self.model).installed(operators=False)
        modes = (
            self.folding.forward(),
            ConstantComparisons(),
            decomposing(wanted.known),
            watched,
            kept,
        )
        with contextlib.ExitStack() as stack:
            for mode in (*modes, self.tensors):
                stack.enter_context(mode)
            result = self.model.forward(*args, **kwargs)
        if wanted.part:
            refuse_effects(held, self.held(arguments))
        if python_numbers() != numbers:
            raise CaptureError(
                f"{type(self.model).__name__}.forward draws random numbers with Python or numpy",
                why="a graph would have the numbers of this one trace for ever",
                fix="draw them with torch, or in a module that is not traced",
            )
        return result


def _place(name: str) -> str:
    """The path of an attribute, of the name of an effect."""
    return name.removeprefix("its attribute ")


def _attribute(model: nn.Module, path: str) -> Any:
    owner, _, last = path.rpartition(".")
    return vars(model.get_submodule(owner)).get(last)


def _settings(model: nn.Module, names: Sequence[str], left: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes that were set to numbers and the like; none where more was done than that."""
    rest = [name for name in names if _place(name) not in left]
    values = {
        _place(name): _attribute(model, _place(name)) for name in rest if _place(name) != name
    }
    simple = (bool, int, float, str, type(None))
    whole = len(values) == len(rest) and all(type(value) in simple for value in values.values())
    return values if whole else {}


def _unsteady(model: nn.Module, names: Sequence[str]) -> CaptureError:
    return CaptureError(
        f"{type(model).__name__}.forward changes {', '.join(names)} at every call, or goes another "
        "way when it is called again",
        why="a graph does the same at every call, and what it leaves behind in Python is lost",
        fix="keep it in a buffer, return it, or set it up before the model is split",
    )


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
    around: nn.Module | None = None,
) -> Captured:
    """Trace `model(*args, **kwargs)` in the model's present mode (train or eval).

    Every dimension of the inputs stays symbolic unless the model fixes it (sizes 0 and 1 are
    fixed), or other sizes come from it that are too intricate to follow (see WatchedSizes).
    Nothing is computed: the inputs may be on the meta device. fold: trace only some of the blocks
    that are equal; the graph is the same, and sooner there. known: whether an op, by its name, is
    to be traced as itself; others are traced as the ops by which torch defines them.
    part: Python calls the model and may look at all that it does: side effects are refused.
    around: the model that this is a part of.
    Raises CaptureError, with the user's source line, where the model cannot be traced; AliasError
    where no part of it may run as it is.
    """
    bound = bind_inputs(model, args, kwargs)
    wanted = _Wanted(model, bound, len(args), known, part, around, frozenset())
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
    around: nn.Module | None
    fixed: frozenset[tuple[int, int]]


def _folded(wanted: _Wanted) -> Captured:
    """One trace, with equal blocks traced once where that can be."""
    apart: frozenset[str] = frozenset()
    groups: tuple[Group, ...] = ()
    for _ in range(_ATTEMPTS):
        try:
            groups = find_groups(wanted.model, called=True)
            if not groups:
                break
            return _traced(wanted, Folding(groups, apart))
        except Unfoldable as reason:
            _log.info("blocks are traced one by one: %s", reason)
            if not reason.paths:
                break
            apart |= set(reason.paths)
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
    model = wanted.model
    ran, importer, graph = _exported(wanted, folding, one_by_one)
    if ran.changes:
        twice, _, both = _exported(wanted, _unfolded(), one_by_one, twice=True)
        first, second = twice.outputs.children
        if str(first) != str(second) or not is_steady(both, len(both.outputs) // 2):
            raise _unsteady(model, ran.changes)
    first_named: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    aliases = {path: first_named.setdefault(id(parameter), path) for path, parameter in named}
    return Captured(
        _by_first_name(graph, aliases),
        flatten(dict(wanted.bound.arguments))[1],
        ran.outputs,
        aliases,
        importer.constants,
        folding.repeats(),
        importer.guards,
        wanted.part,
        modes_of(model),
        ran.left,
        tuple(ran.settings.items()),
    )


def _exported(
    wanted: _Wanted, folding: Folding, one_by_one: bool, twice: bool = False
) -> tuple[_Ran, Importer, Graph]:
    """The model as torch.export sees it, in one call, or twice."""
    model, bound, part = wanted.model, wanted.bound, wanted.part
    tensors, inputs = flatten(dict(bound.arguments))
    device = next((parameter.device for parameter in model.parameters()), None)
    samples = tuple(_sample(tensor, device) for tensor in tensors)
    ran: list[_Ran] = []
    held = HeldTensors(model, folding, wanted.around)
    free, static = torch.export.Dim.AUTO, torch.export.Dim.STATIC
    shapes = tuple(
        {dim: static if (number, dim) in wanted.fixed else free for dim in range(sample.dim())}
        for number, sample in enumerate(samples)
    )
    dynamic = (shapes,) if samples else None
    # Torch can remember what an op makes of tensors of which sizes. Where sizes are symbolic, that
    # costs as much as to find out twice: it pays only for blocks that come again and again.
    remembers = remembering_fake_results(one_by_one)
    try:
        with quiet(), untouched(model, bound.arguments), folding.installed(), remembers:
            flat = _Flat(wanted, inputs, folding, held, twice, ran)
            program = torch.export.export(flat, samples, strict=False, dynamic_shapes=dynamic)
    except (Unfoldable, IntricateSizes, CaptureError):
        raise
    except Exception as error:
        raise _explain(error, model) from error
    if folding.failure is not None:
        raise folding.failure
    if held.failure is not None:
        raise held.failure
    folding.require_called()
    trained = [part or tensor.requires_grad for tensor in tensors]
    importer = Importer(
        program, GraphBuilder(), model=model, folding=folding, held=held, trained_inputs=trained
    )
    return ran[-1], importer, importer.graph()


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
