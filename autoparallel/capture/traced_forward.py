"""The module that torch.export traces: the user's forward, under all that a trace watches."""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoparallel.capture.asked_switches import (
    Switches,
    refusing_contexts,
    untold,
    watching_gradient_mode,
)
from autoparallel.capture.assigned_buffers import writing_assigned_buffers
from autoparallel.capture.attribute_reads import AttributeReads, moving_error
from autoparallel.capture.attribute_writes import Attributes, Written
from autoparallel.capture.block_folding import Folding
from autoparallel.capture.branch_ways import Asked, TakeWays, Ways
from autoparallel.capture.decided_draws import ConstantComparisons
from autoparallel.capture.decompose import decomposing
from autoparallel.capture.decomposition_registry import Known
from autoparallel.capture.example_inputs import as_given
from autoparallel.capture.forward_contexts import unprinted
from autoparallel.capture.function_transforms import lowered_transforms
from autoparallel.capture.global_reads import OuterVariables
from autoparallel.capture.held_tensors import HeldTensors, held_among
from autoparallel.capture.hit_loops import HitLoops
from autoparallel.capture.intricate_sizes import WatchedSizes
from autoparallel.capture.module_conversions import idle_conversions
from autoparallel.capture.outside_answers import OutsideAnswers
from autoparallel.capture.python_draws import PythonDraws
from autoparallel.capture.read_shifts import ReadShifts
from autoparallel.capture.refused_models import refuse_running
from autoparallel.capture.repeated_calls import SeenCalls
from autoparallel.capture.seeded_draws import SeededDraws
from autoparallel.capture.side_effects import (
    NoReplacing,
    changed,
    effects,
    moving,
    refuse_effects,
    written_arguments,
)
from autoparallel.capture.size_texts import numbers_in_texts
from autoparallel.capture.tensor_facts import TensorFacts
from autoparallel.capture.traced_calls import TracedCalls
from autoparallel.errors import CaptureError
from autoparallel.graph.attribute_read import AttributeRead, TensorRead
from autoparallel.support.module_paths import join_path
from autoparallel.support.pytree import Skeleton, flatten, rebuild
from autoparallel.support.rng_state import PythonDraw, PythonNumbers

__all__ = ["FlatForward", "Ran", "Wanted", "unsteady"]


@dataclass(frozen=True)
class Wanted:
    """The arguments of `capture` in one value.

    positional: how many arguments were given by position. fixed: (input, dim) pairs that are not
    symbolic. device: of the model's tensors. autocast: the type of the autocast region around the
    call, None where there is none. gradients: whether they are recorded around the call; the trace
    records them in any case, unless the forward asks for that. outer: the variables outside of the
    model to which it may write. codes: the user's, where some of it may ask for what no graph
    could. switches: of torch, around the call. ways: see `capture`.
    asked: what the ways do not tell. seen: what the forward calls in the latest trace of one call.
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
    codes: Mapping[types.CodeType, Mapping[str, Any]]
    switches: Switches
    ways: Ways
    asked: Asked
    seen: SeenCalls


@dataclass
class Ran:
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
    numbers: tuple[PythonNumbers | PythonDraw, ...]


class FlatForward(nn.Module):
    """The model with tensors in and tensors out, as torch.export takes it.

    wanted: the model and how it is traced. inputs: skeleton of its arguments. folding, tensors: the
    modes under which it runs. twice: call it twice, the second time as the first has left it (see
    steady_forward.py), and return both results. ran, refused: lists that get what is known
    afterwards, and errors that the model may have caught; attributes of this module are no place
    for that, as export puts them back.

    Example: `FlatForward(wanted, inputs, folding, held, False, ran, refused)`.
    """

    def __init__(
        self,
        wanted: Wanted,
        inputs: Skeleton,
        folding: Folding,
        tensors: HeldTensors,
        twice: bool,
        ran: list[Ran],
        refused: list[CaptureError],
    ) -> None:
        super().__init__()
        self.model, self.wanted, self.tensors = wanted.model, wanted, tensors
        self.inputs, self.folding, self.twice = inputs, folding, twice
        self.calls = TracedCalls(tensors.owns, wanted.seen)
        self.no_replacing = NoReplacing(wanted.model, wanted.outer.walks())
        self.remember = ran.append
        # While it is traced, the model has other parameters, but attributes may refer to these.
        self.known = {number: places[0][0] for number, places in tensors.places.items()}
        self.training = self.model.training
        self.reads = AttributeReads()
        # By another name than torch's the question cannot be seen.
        self.asked: list[str] = ["a variable"] * wanted.outer.asks_gradients
        given = None if wanted.part else flatten(dict(wanted.bound.arguments))[0]
        self.facts = TensorFacts(wanted.model, given, folding)
        self.refused = refused
        self.numbers: tuple[PythonNumbers | PythonDraw, ...] = ()
        self.levels: dict[str, AttributeRead] = {}

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
        others += self.wanted.outer.changed()
        if self.wanted.outer.compares_objects():
            # The next call may be given the object that this one was.
            inputs = set(map(id, tensors))
            pairs = zip(written.places, written.values, strict=True)
            kept = [place for place, one in pairs if id(one) in inputs]
            others += [f"its attribute {join_path(at.path, str(at.route[0][1]))}" for at in kept]
        if others or written.unknown:
            unknown = (f"its attribute {name}" for name in written.unknown)
            raise unsteady(self.model, [*unknown, *others])
        if self.twice:
            again = [torch.ops.autoparallel.again(tensor) for tensor in tensors]
            second = self.called(again)
            names = moving(after, self.state({}))
            if names:
                raise unsteady(self.model, names)
            result = (result, second)
        elif written.places:
            result = (result, written.values)
        flat, skeleton = flatten(result)
        self.facts.refuse_marked(flat)
        refuse_running(skeleton, self.model)
        gradients = torch.is_grad_enabled() if self.asked else None
        for module in self.model.modules():
            for name in self.wanted.outer.unwatched.get(type(module), ()):
                self.reads.note(module, name) if name else self.reads.note_names(module)
        reads = (*self.reads.collected, *self.facts.reads, *self.wanted.switches.reads)
        reads += (*self.levels.values(), *self.wanted.outer.reads(), *self.wanted.seen.reads())
        given, own = tuple(self.facts.given), held_among(self.model, flat)
        if self.wanted.outer.compares_objects():
            given += self.facts.pairs(len(tensors))
        numbers = self.numbers
        self.remember(Ran(skeleton, changes, written, reads, gradients, given, own, numbers))
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
        seeds, draws = SeededDraws(), PythonDraws(type(self.model).__name__)
        answers = OutsideAnswers(type(self.model).__name__, wanted.codes)
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
            untold(),
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
            seeds,
            draws,
            idle_conversions(),
            unprinted(type(self.model).__name__),
            numbers_in_texts(),
            lowered_transforms(tensors, wanted.seen, self.refused),
            TakeWays(wanted.ways, wanted.asked, decided=self.folding.refuse_branch),
        )
        if not self.twice:
            wanted.seen.clear()
        seen = contextlib.nullcontext() if self.twice else wanted.seen
        shifts = ReadShifts()
        with contextlib.ExitStack() as stack:
            for mode in (*modes, self.tensors, HitLoops(), shifts, seen, answers.installed()):
                stack.enter_context(mode)
            results.append(self.model.forward(*args, **kwargs))
            shifts.finish()
            seeds.finish()
        refuse_effects(before, self.state(arguments) if wanted.part else written_arguments(boxes))
        moving = (*self.reads.moving, *wanted.outer.moving)
        if moving:
            raise moving_error(moving)
        answers.refuse()
        self.levels.update(answers.levels)
        draws.finish()
        self.numbers = draws.left
        return results[0]


def unsteady(model: nn.Module, names: Sequence[str]) -> CaptureError:
    """Return the error for a forward that is not the same at every call, with what it changes."""
    return CaptureError(
        f"{type(model).__name__}.forward changes {', '.join(names)} at every call, or goes another "
        "way when it is called again",
        why="a graph does the same at every call, and what it leaves behind in Python is lost",
        fix="keep it in a buffer, return it, or set it up before the model is split",
    )
