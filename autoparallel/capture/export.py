"""From a module and example inputs to a Graph, by torch.export, which is used here alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from autoparallel.capture import traced_forward
from autoparallel.capture.asked_switches import (
    Switches,
)
from autoparallel.capture.attribute_reads import alike_reads
from autoparallel.capture.attribute_writes import Written
from autoparallel.capture.block_folding import Folding, Unfoldable
from autoparallel.capture.branch_ways import (
    NO_WAYS,
    Asked,
    ValueBranchError,
    Ways,
)
from autoparallel.capture.decomposition_registry import Known
from autoparallel.capture.equal_blocks import Group, find_groups
from autoparallel.capture.example_inputs import bind_inputs
from autoparallel.capture.forward_contexts import plain_surroundings, quiet
from autoparallel.capture.global_reads import OuterVariables
from autoparallel.capture.graph_builder import GraphBuilder
from autoparallel.capture.held_tensors import HeldTensors
from autoparallel.capture.importer import Importer
from autoparallel.capture.intricate_sizes import (
    IntricateSizes,
    fails_at_sizes,
    require_free_sizes,
)
from autoparallel.capture.module_tensors import first_paths
from autoparallel.capture.refused_models import export_failure
from autoparallel.capture.rehearsed_blocks import computing_groups
from autoparallel.capture.repeated_calls import SeenCalls
from autoparallel.capture.side_effects import (
    refuse_backward_hooks,
)
from autoparallel.capture.source_files import ModelFiles
from autoparallel.capture.steady_forward import is_steady
from autoparallel.capture.traced_forward import FlatForward, Ran, Wanted, unsteady
from autoparallel.errors import AliasError, AutoParallelError, CaptureError
from autoparallel.graph.attribute_read import AttributeRead
from autoparallel.graph.captured import Captured, SizeNumber, Surroundings, autocast_type, modes_of
from autoparallel.graph.graph import Graph
from autoparallel.graph.settled_parameters import without_settling
from autoparallel.support.fake_tensors import start_autograd
from autoparallel.support.model_snapshot import untouched
from autoparallel.support.pytree import SYMBOLIC, emptied, flatten, with_constants
from autoparallel.support.torch_private import (
    bare_programs,
    expression_of,
    keeping_frames,
    remembering_arithmetic,
    remembering_fake_results,
)

__all__ = ["Captured", "capture"]

_log = logging.getLogger(__name__)
# A block that is entered otherwise than by a call is traced itself in the next of three attempts.
_ATTEMPTS = 3


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
    seen: SeenCalls | None = None,
    outer: OuterVariables | None = None,
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
    that is an error. likely: ways that these will probably be. seen: gets what the forward calls.
    outer: the variables outside of the model.
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
    outer = outer or OuterVariables.of(model)
    wanted = Wanted(
        *(model, bound, len(args), known, part, around, frozenset()),
        *(device, autocast_type(device), torch.is_grad_enabled(), outer, outer.asking()),
        *(Switches(), NO_WAYS, Asked(guesses, likely), seen or SeenCalls()),
    )
    asked = wanted.asked
    groups: tuple[Group, ...] | None = None
    while True:
        opened = len(asked.functions)
        # Of equal blocks one alone would be traced, and go its own ways.
        folds = fold and not asked.in_blocks
        try:
            with plain_surroundings(device):
                if folds:
                    if groups is None:
                        groups = computing_groups(wanted, args, kwargs)
                    captured = _folded(wanted, groups)
                else:
                    captured = _traced(wanted, _unfolded(), True)
            if find_ways is None or not asked.has_guessed():
                return captured
            ways = find_ways()
            if asked.is_right(ways):
                return replace(captured, ways=ways)
            _log.info("traced again: the example run goes other ways than were guessed")
            asked.take()
            asked.guesses = False
            wanted, groups = replace(wanted, ways=ways), None
        except IntricateSizes as reason:
            _log.info("dims of the inputs are fixed: %s", reason)
            wanted = replace(wanted, fixed=wanted.fixed | reason.dims)
        except AliasError:
            raise
        except CaptureError:
            # The run tells the same again: only functions that are opened now may change a trace.
            opens = len(asked.functions) > opened
            if find_ways is None or not asked.lines or (wanted.ways and not opens):
                raise
            ways = wanted.ways or find_ways()
            told = any(answer is not None for line in asked.lines for answer in ways.get(line, ()))
            # A way that was guessed wrongly ends somewhere else than the forward does. One that was
            # guessed right ends here again, but where hidden blocks may be the reason.
            confirmed = not (asked.unanswered or groups or opens) and asked.is_right(ways)
            if confirmed if asked.has_guessed() else not told:
                raise
            asked.take()
            asked.guesses = False
            wanted, groups = replace(wanted, ways=ways), None


def _folded(wanted: Wanted, groups: tuple[Group, ...]) -> Captured:
    """Return a trace in which equal blocks were traced once, if that can be.

    groups: of equal blocks that probably only compute.
    """
    apart: frozenset[str] = frozenset()
    for _ in range(_ATTEMPTS if groups else 0):
        try:
            return _traced(wanted, Folding(groups, apart))
        except Unfoldable as reason:
            _log.info("blocks are traced one by one: %s", reason)
            wanted.asked.in_blocks |= reason.branches
            if not reason.paths:
                break
            apart |= frozenset(reason.paths)
        except (IntricateSizes, ValueBranchError):
            raise  # the full trace branches there, too
        except Exception as error:
            if wanted.asked.has_guessed():
                raise  # perhaps a guess is the reason: the example run tells
            # Whatever it is, the full trace has it too, and then it is explained.
            _log.info("blocks are traced one by one: %r", error)
            break
    return _traced(wanted, _unfolded(), one_by_one=bool(find_groups(wanted.model, called=True)))


def _unfolded() -> Folding:
    """Return a folding that hides nothing."""
    return Folding((), frozenset())


def _traced(wanted: Wanted, folding: Folding, one_by_one: bool = False) -> Captured:
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
    if ran.changes and len(ran.changes) == len(ran.written.places) and ran.written.is_unread(reads):
        reads = _lasting(model, ran.written, reads)
    elif ran.changes:
        second_reads = _read_twice(wanted, folding)
        if second_reads is None and folding.groups:
            second_reads = _read_twice(wanted, _unfolded())
        if second_reads is None:
            raise unsteady(model, ran.changes)
        reads = _lasting(model, ran.written, (*reads, *second_reads))
    aliases = first_paths(model)
    graph = _by_first_name(graph, aliases)
    # Python around a part may hold a copy of the parameter, from before the write.
    graph, settled = (graph, ()) if wanted.part else without_settling(graph)
    return Captured(
        graph,
        emptied(flatten(dict(wanted.bound.arguments))[1]),
        ran.outputs,
        aliases,
        importer.constants,
        folding.repeats(),
        importer.guards,
        wanted.part,
        modes_of(model),
        ran.written.places,
        alike_reads(reads, folding.groups, folding.hidden),
        Surroundings.now(wanted.device)._replace(autocast=wanted.autocast),
        ran.gradients,
        ran.given,
        ran.own,
        wanted.ways,
        ran.numbers,
        settled,
    )


def _read_twice(wanted: Wanted, folding: Folding) -> tuple[AttributeRead, ...] | None:
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
    wanted: Wanted, folding: Folding, one_by_one: bool, twice: bool = False
) -> tuple[Ran, Importer, Graph]:
    """Return a graph of the model, with its importer and the facts of the run.

    twice: call the model twice in the graph. The other arguments are those of `_traced`.
    """
    model, bound, part = wanted.model, wanted.bound, wanted.part
    tensors, inputs = flatten(dict(bound.arguments))
    device = next((parameter.device for parameter in model.parameters()), None)
    samples = tuple(_sample(tensor, device) for tensor in tensors)
    ran: list[Ran] = []
    refused: list[CaptureError] = []
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
    start_autograd()
    files = ModelFiles(wanted.around or model)
    try:
        outer = wanted.outer
        kept = untouched(model, bound.arguments, *outer.objects.values())
        with (
            quiet(),
            kept,
            outer.restored(),
            folding.installed(),
            remembers,
            bare_programs(),
            remembering_arithmetic(),
            keeping_frames(files.__contains__, inside=traced_forward.__file__),
        ):
            flat = FlatForward(wanted, inputs, folding, held, twice, ran, refused)
            program = torch.export.export(flat, samples, strict=False, dynamic_shapes=dynamic)
        failure = flat.calls.failure or flat.no_replacing.failure or flat.facts.failure
        failure = failure or next(iter(refused), None)
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
        program,
        GraphBuilder(files),
        model=model,
        folding=folding,
        held=held,
        trained_inputs=trained,
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
