"""The module that torch.distributed.pipelining calls for each micro-batch of a stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from autoparallel.rewrite.stage_programs import StagePrograms, part_in_time

__all__ = ["StageModule"]


class StageModule(nn.Module):
    """One stage: what the stage before sends goes in, what the next one needs comes out.

    programs: of the stage. places: of its parameters among those of the rank. last: whether it is
    the last one, which returns the micro-batch's share of what the backward pass begins with: of
    each output, the product with its gradient, added up.
    halves: whether a schedule may compute gradients of weights later than those of what comes in.
    weights: leaves in the memory of the parameters, at which gradients of all micro-batches are
    added up. made: the outputs of each micro-batch so far. settled: gradients of weights that were
    computed by themselves, added up. shared: places of weights whose gradient, once there is one,
    may be in the memory of something else.
    """

    def __init__(
        self, programs: StagePrograms, places: Sequence[int], last: bool, halves: bool = False
    ) -> None:
        super().__init__()
        self.programs, self.places, self.last, self.halves = programs, tuple(places), last, halves
        self.has_way_back = any(each.requires_grad for each in programs.enters)
        self.settled: dict[int, torch.Tensor] = {}
        self.shared: set[int] = set()
        self.weights = nn.ParameterList()
        self.sources: list[torch.Tensor] = []
        self.made: list[list[torch.Tensor]] = []
        self.call: Any = None
        self.known: Sequence[torch.Tensor] = ()
        self.wanted: Sequence[torch.Tensor | None] | None = None
        kinds = [each.dtype.to_real() for each in programs.leaves if each.requires_grad]
        self.loss_type = kinds[0] if kinds else torch.get_default_dtype()

    def take(self, parameters: Sequence[torch.Tensor]) -> None:
        """Compute with these parameters from now on."""
        same = len(parameters) == len(self.sources) and all(
            one is other and one.data_ptr() == leaf.data_ptr() and one.dtype == leaf.dtype
            and one.requires_grad == leaf.requires_grad
            for one, other, leaf in zip(parameters, self.sources, self.weights, strict=True)
        )  # fmt: skip
        if not same:
            self.sources = list(parameters)
            self.weights = nn.ParameterList(
                nn.Parameter(each.detach(), each.requires_grad) for each in parameters
            )

    def begin(
        self,
        call: Any,
        known: Sequence[torch.Tensor],
        wanted: Sequence[torch.Tensor | None] | None,
    ) -> None:
        """Begin a step. call: see pipeline_run. known: what the stage needs of the inputs alone.
        wanted: the gradients of the model's outputs; None for no backward pass.
        """
        self.call, self.known, self.wanted, self.made = call, known, wanted, []
        self.settled = {}
        self.shared = {place for place, each in enumerate(self.weights) if each.requires_grad}
        for weight in self.weights:
            weight.grad = None

    def end(self) -> None:
        """End a step: nothing of the call is kept."""
        self.call, self.known, self.wanted = None, (), None

    def separate(self, others: Iterable[torch.Tensor | None]) -> None:
        """Give the gradients that a backward pass has left at the weights memory of their own.

        Autograd leaves a gradient where it came from if nothing but a view lies between, and would
        add those of the next micro-batches there: to the gradient of another weight, too, or to
        what is being sent. others: the gradients that came in, whose memory would be kept for a
        part of it, and those that go to the stage before.
        """
        if not self.shared:
            return
        taken = {_memory(each) for each in others if each is not None}
        there = {p for p in self.shared if self.weights[p].grad is not None}
        for place in sorted(there):
            gradient = self.weights[place].grad
            if gradient.layout is torch.strided:
                if _memory(gradient) in taken:
                    self.weights[place].grad = gradient.clone()
                taken.add(_memory(gradient))
        self.shared -= there

    def settle(self) -> None:
        """Add up the gradients that one micro-batch has left at the weights.

        What torch leaves there, where it computes them by themselves, may be in the memory of
        another weight's gradient or of what came in, and it would add the next ones in place.
        """
        for place, weight in enumerate(self.weights):
            if weight.grad is None:
                continue
            if place in self.settled:
                self.settled[place] += weight.grad
            else:
                self.settled[place] = weight.grad.clone()
            weight.grad = None
            self.shared.add(place)

    def gradients(self) -> list[torch.Tensor | None]:
        """Return the gradients that the step has left, and forget them."""
        if self.settled:
            self.settle()  # of whole backward passes, which a schedule may mix with halves
        grads = [self.settled.get(place, w.grad) for place, w in enumerate(self.weights)]
        self.settled = {}
        for weight in self.weights:
            weight.grad = None
        return grads

    def forward(self, *entered: torch.Tensor, number: torch.Tensor) -> Any:
        """Compute one micro-batch. entered: what the stage before sends, padded to the longest."""
        place, call = int(number), self.call
        programs, ranks = self.programs, self.programs.places[place]
        program = programs.programs[place]
        values = [
            _cut(tensor, each.local_shape(call.symbols, ranks))
            for tensor, each in zip(entered, programs.enters, strict=True)
        ]
        outputs, _ = program.run(
            list(self.weights),
            [call.buffers[path] for path in program.buffers],
            [call.constants[path] for path in program.constants],
            [*call.inputs, *self.known, *values],
            call.device,
        )
        if self.last:
            # What came in may be what another stage of this rank has made and goes on with.
            taken = {_memory(tensor) for tensor in entered}
            detached = [output.detach() for output in outputs]
            self.made.append([o.clone() if _memory(o) in taken else o for o in detached])
            return self.joined(entered, (self.share(place, outputs),))[0]
        first = programs.places[0]
        padded = tuple(
            _padded(output, each.local_shape(call.symbols, first))
            for output, each in zip(outputs, programs.leaves, strict=True)
        )
        return self.joined(entered, padded)

    def joined(
        self, entered: Sequence[torch.Tensor], outputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        """Return the outputs, all of them on a way back to what came in.

        Torch finds what the gradients of weights begin with on that way. A weight of which
        something is made that nothing else goes into has its own way out.
        """
        anchor = next((value for value in entered if value.requires_grad), None)
        if not self.halves or anchor is None or self.wanted is None:
            return outputs
        with_gradient = [output for output in outputs if output.requires_grad]
        joined = iter(_Joined.apply(anchor, *with_gradient) if with_gradient else ())
        # Torch detaches all outputs in place, and no view can be, with a gradient or without.
        return tuple(
            next(joined) if output.requires_grad else output.detach() for output in outputs
        )

    def returns(self, call: Any) -> tuple[torch.Tensor, ...]:
        """Return tensors without numbers that say what one micro-batch returns, at its longest."""
        if self.last:
            share = torch.empty((), dtype=self.loss_type, device="meta")
            return (share.requires_grad_(self.wanted is not None),)
        first = self.programs.places[0]
        return tuple(each.empty(call.symbols, first) for each in self.programs.leaves)

    def share(self, place: int, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return what a micro-batch adds to the number that the backward pass begins with."""
        total = torch.zeros((), dtype=self.loss_type, device=self.call.device)
        for index, (output, each) in enumerate(zip(outputs, self.programs.leaves, strict=True)):
            wanted = None if self.wanted is None else self.wanted[index]
            if wanted is not None and output.requires_grad:
                parts = [made[index] for made in self.made]
                gradient = part_in_time(wanted, each.layout, parts, place)
                total = total + _product(output, gradient).to(self.loss_type)
        return total


class _Joined(torch.autograd.Function):
    """Values as they are, whose backward pass goes by one place, from which a way leads to the
    anchor, too, with nothing on it.
    """

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        # Torch detaches them in place when they are done, which views cannot be.
        return tuple(value.detach() for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        return (None, *gradients)


def _memory(tensor: torch.Tensor) -> int:
    """Return a number that tensors in the same memory have in common."""
    return tensor.untyped_storage().data_ptr()


def _product(output: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return a number whose gradient with respect to `output` is `gradient`."""
    if output.is_complex():
        output, gradient = torch.view_as_real(output), torch.view_as_real(gradient)
    return output if not output.shape and bool(gradient == 1) else (output * gradient).sum()


def _cut(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor without what it was padded with."""
    for dim, size in enumerate(shape):
        if tensor.size(dim) != size:
            tensor = tensor.narrow(dim, 0, size)
    return tensor


def _padded(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor with zeros behind it, up to a shape: all micro-batches send as much."""
    if tuple(tensor.shape) != shape:
        padding: list[int] = []
        for held, size in zip(reversed(tensor.shape), reversed(shape), strict=True):
            padding += [0, size - held]
        tensor = torch.constant_pad_nd(tensor, padding)
    # What was received and goes on is a leaf: a view of it is none.
    return tensor.contiguous().view_as(tensor)
