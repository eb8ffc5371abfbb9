"""From a module and example inputs to a Graph, by torch.export, which is used here alone."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from autoparallel.capture.asked_switches import (
    Switches,
    refusing_contexts,
    watching_gradient_mode,
)
from autoparallel.capture.assigned_buffers import writing_assigned_buffers
from autoparallel.capture.attribute_reads import AttributeReads, alike_reads, moving_error
from autoparallel.capture.attribute_writes import Attributes, Written
from autoparallel.capture.block_folding import Folding, Unfoldable
from autoparallel.capture.branch_ways import (
    NO_WAYS,
    Asked,
    TakeWays,
    ValueBranchError,
    Ways,
)
from autoparallel.capture.decided_draws import ConstantComparisons
from autoparallel.capture.decompose import decomposing
from autoparallel.capture.decomposition_registry import Known
from autoparallel.capture.equal_blocks import Group, find_groups
from autoparallel.capture.example_inputs import as_given, bind_inputs
from autoparallel.capture.forward_contexts import plain_surroundings, quiet, unprinted
from autoparallel.capture.global_reads import OuterVariables, global_reads
from autoparallel.capture.graph_builder import GraphBuilder
from autoparallel.capture.held_tensors import HeldTensors, held_among
from autoparallel.capture.importer import Importer
from autoparallel.capture.intricate_sizes import (
    IntricateSizes,
    WatchedSizes,
    fails_at_sizes,
    require_free_sizes,
)
from autoparallel.capture.module_conversions import idle_conversions
from autoparallel.capture.module_tensors import first_paths
from autoparallel.capture.python_draws import PythonDraws
from autoparallel.capture.refused_models import export_failure, refuse_running
from autoparallel.capture.seeded_draws import SeededDraws
from autoparallel.capture.side_effects import (
    NoReplacing,
    changed,
    effects,
    moving,
    refuse_backward_hooks,
    refuse_effects,
    written_arguments,
)
from autoparallel.capture.steady_forward import is_steady
from autoparallel.capture.tensor_facts import TensorFacts
from autoparallel.capture.traced_calls import TracedCalls
from autoparallel.errors import AliasError, AutoParallelError, CaptureError
from autoparallel.graph.attribute_read import AttributeRead, TensorRead
from autoparallel.graph.captured import Captured, SizeNumber, Surroundings, autocast_type, modes_of
from autoparallel.graph.graph import Graph
from autoparallel.support.fake_tensors import start_autograd
from autoparallel.support.model_snapshot import untouched
from autoparallel.support.pytree import SYMBOLIC, Skeleton, flatten, rebuild, with_constants
from autoparallel.support.rng_state import PythonNumbers
from autoparallel.support.torch_private import (
    expression_of,
    forward_frames_alone,
    remembering_fake_results,
)

__all__ = ["Captured", "capture"]

_log = logging.getLogger(__name__)
# A block whose call matches no traced block is traced itself in the next of three attempts.
_ATTEMPTS = 3


@dataclass
class _Ran:
    """The facts that are known when a forward has been traced.

    outputs: the skeleton of what it returned. changes: the names of all that it leaves otherwise
    than it was. written: what it writes to attributes, which is returned too. reads: the plain
    attributes that it has read. gradients, given, own, numbers: see Captured.
    """

    outputs: Skeleton
    changes: tuple[str, ...]
    written: Written
    reads: tuple[AttributeRead, ...]
    gradients: bool | None
    given: tuple[TensorRead, ...]
    own: tuple[tuple[int, str], ...]
    numbers: tuple[PythonNumbers, ...]


class _Flat(nn.Module):
    """The model with tensors in and tensors out, as torch.export takes it.

    wanted: the model and how it is traced. inputs: skeleton of its arguments. folding, tensors: the
    modes under which it runs. twice: call it twice, the second time as the first has left it (see
    steady_forward.py), and return both results. ran: a list that gets what is known afterwards;
    attributes of this module are no place for that, as export puts them back.
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
        self.calls = TracedCalls(tensors.owns)
        self.no_replacing = NoReplacing(wanted.model)
        self.remember = ran.append
        # While it is traced, the model has other parameters, but attributes may refer to these.
        self.known = {number: places[0][0] for number, places in tensors.places.items()}
        self.training = self.model.training
        self.reads = AttributeReads()
        self.asked: list[str] = []
        given = None if wanted.part else flatten(dict(wanted.bound.arguments))[0]
        self.facts = TensorFacts(wanted.model, given, folding)
        self.refused: list[CaptureError] = []
        self.numbers: tuple[PythonNumbers, ...] = ()

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the model, and return the tensors in its result and those that it leaves behind."""
        before, attributes = self.state({}), Attributes(self.model)
        hidden = self.folding.state()
        result = self.called(tensors)
        if self.folding.state() != hidden:
            raise self.folding.fail("the forward changes a block that is not called by its own")
        after = self.state({})
        changes = changed(before, after)
        written = attributes.written() if changes else Written()
        # Hooks that a forward registers once, for itself, are in the trace of what it computes.
        others = [
            name
            for name in changes
            if not name.startswith("its attribute ") and "_hooks of " not in name
        ]
        if others or written.unknown:
            unknown = (f"its attribute {name}" for name in written.unknown)
            raise _unsteady(self.model, [*unknown, *others])
        if self.twice:
            again = [torch.ops.autoparallel.again(tensor) for tensor in tensors]
            second = self.called(again)
            names = moving(after, self.state({}))
            if names:
                raise _unsteady(self.model, names)
            result = (result, second)
        elif written.places:
            result = (result, written.values)
        flat, skeleton = flatten(result)
        self.facts.refuse_marked(flat)
        refuse_running(skeleton, self.model)
        gradients = torch.is_grad_enabled() if self.asked else None
        for module in self.model.modules():
            for name in self.wanted.outer.unwatched.get(type(module), ()):
                self.reads.note(module, name)
        reads = (*self.reads.collected, *self.facts.reads, *self.wanted.switches.reads)
        reads += global_reads(self.model)
        given, own = tuple(self.facts.given), held_among(self.model, flat)
        numbers = self.numbers
        self.remember(_Ran(skeleton, changes, written, reads, gradients, given, own, numbers))
        return tuple(flat)

    def state(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return all that the model and its arguments hold and a graph would not change."""
        return effects(self.model, arguments, self.known, self.wanted.outer.objects)

    def called(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Run the model's forward under all modes of a trace, and return its result.

        tensors: the tensors of its arguments. Raises CaptureError for random numbers that are not
        torch's, and for a part's side effects.
        """
        wanted = self.wanted
        arguments = rebuild(self.inputs, list(tensors))
        args, kwargs = as_given(wanted.bound.signature, arguments, wanted.positional)
        # A cache that is given and written to is returned as well. A list or a dict is not.
        boxes = {k: v for k, v in arguments.items() if isinstance(v, (list, dict, set))}
        before = self.state(arguments) if wanted.part else written_arguments(boxes)
        draws = PythonDraws(type(self.model).__name__)
        # Not __call__: the model's own hooks run where the program is called.
        watched = WatchedSizes(tuple(tensors))
        no_replacing = self.no_replacing.installed(operators=False)
        device, autocast = wanted.device, wanted.autocast
        results: list[Any] = []
        modes = (
            writing_assigned_buffers(self.model, results),
            self.reads.installed(self.model),
            watching_gradient_mode(self.asked),
            wanted.switches.installed(),
            refusing_contexts(self.refused),
            contextlib.nullcontext()
            if autocast is None
            else torch.autocast(device.type, dtype=autocast),
            self.calls.installed(),
            self.folding.forward(),
            ConstantComparisons(),
            decomposing(wanted.known),
            watched,
            no_replacing,
            self.facts.installed(tensors),
            SeededDraws(),
            draws,
            idle_conversions(),
            unprinted(type(self.model).__name__),
            TakeWays(wanted.ways, wanted.asked, decided=self.folding.refuse_branch),
        )
        with contextlib.ExitStack() as stack:
            for mode in (*modes, self.tensors):
                stack.enter_context(mode)
            results.append(self.model.forward(*args, **kwargs))
        refuse_effects(before, self.state(arguments) if wanted.part else written_arguments(boxes))
        moving = (*self.reads.moving, *wanted.outer.moving)
        if moving:
            raise moving_error(moving)
        draws.finish()
        self.numbers = draws.left
        return results[0]


def _unsteady(model: nn.Module, names: Sequence[str]) -> CaptureError:
    """Return the error for a forward that is not the same at every call, with what it changes."""
    return CaptureError(
        f"{type(model).__name__}.forward changes {', '.join(names)} at every call, or goes another "
        "way when it is called again",
        why="a graph does the same at every call, and what it leaves behind in Python is lost",
        fix="keep it in a buffer, return it, or set it up before the model is split",
    )


def _all(_: str) -> bool:
    """Have every op traced as itself."""
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
    find_ways: Callable[[], Ways] | None = None,
    likely: Ways = NO_WAYS,
) -> Captured:
    """Trace `model(*args, **kwargs)` in the model's present mode (train or eval) into a graph.

    Every dimension of the inputs stays symbolic unless the model fixes it (sizes 0 and 1 are
    fixed), or other sizes come from it that are too intricate to follow (see WatchedSizes).
    Nothing is computed: the inputs may be on the meta device. fold: trace only some of the blocks
    that are equal; the graph is the same, and sooner there. known: whether an op, by its name, is
    to be traced as itself; others are traced as the ops by which torch defines them.
    part: Python calls the model and may look at all that it does: side effects are refused.
    around: the model that this is a part of. find_ways: returns the ways that an example run goes
    where the forward branches on values; it is called only where it does, and where it is left out,
    that is an error. likely: ways that these will probably be.
    Raises CaptureError, with the user's source line, where the model cannot be traced; AliasError
    where no part of it may run as it is.

    >>> captured = capture(nn.Linear(2, 3, bias=False), (torch.ones(4, 2),), {})
    >>> [node.target for node in captured.graph.calls]
    ['aten.linear.default']
    """
    refuse_backward_hooks(model)
    bound = bind_inputs(model, args, kwargs)
    tensors = (*model.parameters(), *model.buffers())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    # A guess is good for nothing where no example run can confirm it.
    guesses = find_ways is not None and not any(tensor.is_meta for tensor in tensors)
    wanted = _Wanted(
        *(model, bound, len(args), known, part, around, frozenset()),
        *(device, autocast_type(device), torch.is_grad_enabled(), OuterVariables(model)),
        *(Switches(), NO_WAYS, Asked(guesses, likely)),
    )
    asked = wanted.asked
    while True:
        opened = len(asked.functions)
        # Of equal blocks one alone would be traced, and go its own ways.
        folds = fold and not asked.in_blocks
        try:
            with plain_surroundings(device):
                captured = _folded(wanted) if folds else _traced(wanted, _unfolded(), True)
            if find_ways is None or not asked.has_guessed():
                return captured
            ways = find_ways()
            if asked.is_right(ways):
                return replace(captured, ways=ways)
            _log.info("traced again: the example run goes other ways than were guessed")
            asked.take()
            asked.guesses = False
            wanted = replace(wanted, ways=ways)
        except IntricateSizes as reason:
            _log.info("dims of the inputs are fixed: %s", reason)
            wanted = replace(wanted, fixed=wanted.fixed | reason.dims)
        except AliasError:
            raise
        except CaptureError:
            guessed, unanswered = asked.has_guessed(), asked.take()
            # The run tells the same again: only functions that are opened now may change a trace.
            again = not wanted.ways or len(asked.functions) > opened
            if find_ways is None or not unanswered or not again:
                raise
            ways = wanted.ways or find_ways()
            told = any(answer is not None for line in unanswered for answer in ways.get(line, ()))
            # A way that was guessed wrongly ends somewhere else than the forward does.
            if not told and not guessed:
                raise
            asked.guesses = False
            wanted = replace(wanted, ways=ways)


@dataclass(frozen=True)
class _Wanted:
    """The arguments of `capture` in one value.

    positional: how many arguments were given by position. fixed: (input, dim) pairs that are not
    symbolic. device: of the model's tensors. autocast: the type of the autocast region around the
    call, None where there is none. gradients: whether they are recorded around the call; the trace
    records them in any case, unless the forward asks for that. outer: the variables outside of the
    model to which it may write. switches: of torch, around the call. ways: see `capture`.
    asked: what the ways do not tell.
    """

    model: nn.Module
    bound: inspect.BoundArguments
    positional: int
    known: Known
    part: bool
    around: nn.Module | None
    fixed: frozenset[tuple[int, int]]
    device: torch.device
    autocast: torch.dtype | None
    gradients: bool
    outer: OuterVariables
    switches: Switches
    ways: Ways
    asked: Asked


def _folded(wanted: _Wanted) -> Captured:
    """Return a trace in which equal blocks were traced once, if that can be."""
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
            wanted.asked.in_blocks |= reason.branches
            if not reason.paths:
                break
            apart |= set(reason.paths)
        except (IntricateSizes, ValueBranchError):
            raise  # the full trace branches there, too
        except Exception as error:
            if wanted.asked.has_guessed():
                raise  # perhaps a guess is the reason: the example run tells
            # Whatever it is, the full trace has it too, and then it is explained.
            _log.info("blocks are traced one by one: %r", error)
            break
    return _traced(wanted, _unfolded(), one_by_one=bool(groups))


def _unfolded() -> Folding:
    """Return a folding that hides nothing."""
    return Folding((), frozenset())


def _traced(wanted: _Wanted, folding: Folding, one_by_one: bool = False) -> Captured:
    """Return one trace of the model, and prove by a second that it may be called again.

    folding: which blocks are hidden. one_by_one: whether equal blocks are traced one by one.
    Raises CaptureError, Unfoldable where blocks were hidden wrongly, and IntricateSizes where
    more dims are to be fixed.
    """
    model = wanted.model
    with torch.enable_grad():
        ran, importer, graph = _exported(wanted, folding, one_by_one)
    if ran.gradients is not None and not wanted.gradients:
        with torch.no_grad():
            ran, importer, graph = _exported(wanted, folding, one_by_one)
    reads = ran.reads
    # What a forward leaves behind may change its next call, which the graph would not know.
    if ran.changes:
        second_reads = _read_twice(wanted, folding)
        if second_reads is None and folding.groups:
            second_reads = _read_twice(wanted, _unfolded())
        if second_reads is None:
            raise _unsteady(model, ran.changes)
        reads = _lasting(model, ran.written, (*reads, *second_reads))
    aliases = first_paths(model)
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
        ran.written.places,
        alike_reads(reads, folding.groups, folding.hidden),
        Surroundings(torch.get_default_dtype(), wanted.autocast),
        ran.gradients,
        ran.given,
        ran.own,
        wanted.ways,
        ran.numbers,
    )


def _read_twice(wanted: _Wanted, folding: Folding) -> tuple[AttributeRead, ...] | None:
    """Return the attributes that two calls in a row read; None where they are not alike.

    folding: the one of the first trace. The second call of a block that is traced must turn out
    like the first; for the hidden ones that holds as well, as long as no forward changes them.
    None too where blocks cannot be hidden in two calls, or the two cannot be traced so.
    """
    try:
        again = Folding(folding.groups, folding.apart)
        ran, _, both = _exported(wanted, again, one_by_one=not folding.groups, twice=True)
    except (IntricateSizes, MemoryError):
        raise
    except (Unfoldable, AutoParallelError) as reason:
        if not folding.groups:
            raise
        _log.info("two calls are traced block by block: %s", reason)
        return None
    first, second = ran.outputs.children
    alike = str(first) == str(second) and is_steady(both, len(both.outputs) // 2)
    return ran.reads if alike else None


def _lasting(
    model: nn.Module, written: Written, reads: Sequence[AttributeRead]
) -> tuple[AttributeRead, ...]:
    """Return the reads of what a forward does not set itself, and of numbers that it does set.

    written: by a forward that changes attributes, and is steady. A number is right as it was before
    and as it is afterwards. model: as it was before.
    """
    lasting: dict[Any, AttributeRead] = {}
    for read, others in written.lasting(reads, model):
        lasting.setdefault((read.path, read.route, read.name), replace(read, others=others))
    return tuple(lasting.values())


def _exported(
    wanted: _Wanted, folding: Folding, one_by_one: bool, twice: bool = False
) -> tuple[_Ran, Importer, Graph]:
    """Return a graph of the model, with its importer and the facts of the run.

    twice: call the model twice in the graph. The other arguments are those of `_traced`.
    """
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
    frames = forward_frames_alone()
    start_autograd()
    try:
        outer = wanted.outer
        kept = untouched(model, bound.arguments, *outer.objects.values())
        with quiet(), frames, kept, outer.forgotten(), folding.installed(), remembers:
            flat = _Flat(wanted, inputs, folding, held, twice, ran)
            program = torch.export.export(flat, samples, strict=False, dynamic_shapes=dynamic)
        failure = flat.calls.failure or flat.no_replacing.failure or flat.facts.failure
        failure = failure or next(iter(flat.refused), None)
        if failure is not None:
            raise failure
    # Of a machine that has no memory left, the model is not the reason.
    except (Unfoldable, IntricateSizes, AutoParallelError, MemoryError):
        raise
    except Exception as error:
        if fails_at_sizes(error):
            require_free_sizes(samples, wanted.fixed)
        raise export_failure(error, model) from error
    if folding.failure is not None:
        raise folding.failure
    if held.failure is not None:
        raise held.failure
    folding.require_called()
    trained = [part or tensor.requires_grad for tensor in tensors]
    importer = Importer(
        program, GraphBuilder(), model=model, folding=folding, held=held, trained_inputs=trained
    )
    graph = importer.graph()
    outputs = with_constants(ran[-1].outputs, partial(_size_number, importer, model))
    return replace(ran[-1], outputs=outputs), importer, graph


def _size_number(importer: Importer, model: nn.Module, constant: Any) -> Any:
    """Return a constant among what the model returns; for a symbolic number, its expression.

    Raises CaptureError for a number that follows from more than the sizes of the inputs.
    """
    if not isinstance(constant, SYMBOLIC):
        return constant
    expression = expression_of(constant)
    if not expression.free_symbols <= importer.builder.input_symbols:
        raise CaptureError(
            f"{type(model).__name__}.forward returns a number that depends on the values of a "
            "tensor",
            why="the value is not known before the model runs (.item(), .tolist(), int())",
            fix="return the tensor, and make a number of it outside",
        )
    kinds = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}
    return SizeNumber(kinds[type(constant)], expression)


def _by_first_name(graph: Graph, aliases: Mapping[str, str]) -> Graph:
    """Return the graph with tied weights under the path by which the parameter goes.

    aliases: as first_paths returns them. Whichever of the paths was traced does not matter.
    """
    nodes = tuple(
        replace(node, target=aliases[node.target]) if node.kind == "parameter" else node
        for node in graph.nodes
    )
    return replace(graph, nodes=nodes)


def _sample(tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    """Return a new tensor of the same kind, so that an input given twice stays two inputs.

    device: of the model's parameters. On the meta device nothing would run with real inputs.
    """
    place = device if device is not None and device.type == "meta" else tensor.device
    return torch.empty_like(tensor, device=place, requires_grad=False)
