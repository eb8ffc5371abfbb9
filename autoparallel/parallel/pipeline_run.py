"""One rank's part in a pipelined step: its stage's programs, run by torch's pipeline schedules.

torch.distributed.pipelining sends and receives between stages, in the order of its schedule. Each
program takes its own part of the inputs, which all ranks have whole, so that what travels is what
stages make, and nothing else.

A call of the model computes the gradients too, where there will be some: stages that interleave
backward passes with forward passes hold fewer activations. The caller's backward pass multiplies
these by the gradient of the loss, and brings them to the parameters. Where it begins at another
output than the loss, the step is run once more, with the gradients that are known then.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from autoparallel.errors import AutoParallelError, PlanError
from autoparallel.graph.captured import Captured
from autoparallel.graph.graph import Dim
from autoparallel.parallel.compiled_calls import is_compiled
from autoparallel.parallel.pipeline_place import PipelinePlace, as_sent
from autoparallel.parallel.stage_module import StageModule
from autoparallel.plan import Plan
from autoparallel.rewrite.emit import Program
from autoparallel.rewrite.stage_programs import (
    StagePrograms,
    Travelling,
    joined_in_time,
    sizes_of_symbols,
)
from autoparallel.rewrite.stages import Stage, cut_plan, parameter_gradients
from autoparallel.rules.lookup import known_rule
from autoparallel.rules.rule import OpCall
from autoparallel.runtime import rng
from autoparallel.runtime.faults import explained, is_lost
from autoparallel.runtime.ranks import Ranks
from autoparallel.support.torch_private import without_function_overrides

__all__ = ["PipelineRun", "loss_alone", "pipeline_program"]

# Schedules for inputs of so many sizes are kept ready.
_MOST_SIZES = 16


@dataclass
class _Call:
    """A call's own values: it computes with these, also when its step runs again.

    inputs: of the model. device: where it computes. symbols: values of the inputs' sizes. known:
    what each stage needs of the inputs alone. source, step: of the random numbers; the step is None
    where none are drawn. versions: of parameters, inputs and buffers when the call began.
    """

    inputs: list[torch.Tensor]
    device: torch.device
    symbols: dict[Any, int]
    parameters: Sequence[torch.Tensor]
    buffers: dict[str, torch.Tensor]
    constants: dict[str, torch.Tensor]
    known: list[list[torch.Tensor]] = field(default_factory=list)
    source: rng.Generator | None = None
    step: int | None = None
    versions: tuple[int, ...] = ()


def _versions(call: _Call) -> tuple[int, ...]:
    """Return numbers that are others once a tensor of the call was written to."""
    tensors = (*call.parameters, *call.inputs, *call.buffers.values())
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)


class _Wanted(threading.local):
    """A setting of each thread: whether its calls want the loss of a step alone, or all outputs."""

    loss_alone = False


_wanted = _Wanted()


@contextmanager
def loss_alone() -> Iterator[None]:
    """Have steps bring nothing but the loss to all ranks: other outputs are zeros where they were
    not made.
    """
    _wanted.loss_alone = True
    try:
        yield
    finally:
        _wanted.loss_alone = False


class PipelineRun:
    """Runs steps of a pipeline on one rank.

    plan: of the model. stages: all, in order. place: this rank's. ranks: its place among those of
    its stage. shapes: of the model's inputs. draws: whether any stage draws random numbers.
    """

    def __init__(
        self,
        plan: Plan,
        stages: Sequence[Stage],
        place: PipelinePlace,
        ranks: Ranks,
        shapes: Sequence[tuple[Dim, ...]],
        draws: bool,
    ) -> None:
        assert plan.pipeline is not None
        self.pipeline, self.place, self.ranks = plan.pipeline, place, ranks
        self.shapes, self.draws = tuple(shapes), draws
        self.count = plan.pipeline.microbatches
        own = [stages[number] for number in plan.pipeline.of_rank(place.number)]
        self.programs = [StagePrograms(stage, ranks, self.count, plan.model) for stage in own]
        self.last = own[-1].number == len(stages) - 1
        values = stages[-1].graph.values
        self.outputs = tuple(
            Travelling(layout, values[name].shape, values[name].dtype, values[name].requires_grad)
            for name, layout in zip(stages[-1].gives, stages[-1].plan.outputs, strict=True)
        )
        self.written = stages[-1].written
        # Buffers that the step writes are others by the time that it is run again.
        self.changing = {*self.written, *(path for path, _ in stages[-1].before.mutations)}
        self.returned = len(self.outputs) - len(self.written)
        scalars = [i for i, out in enumerate(self.outputs) if not out.shape and out.requires_grad]
        self.loss = scalars[0] if scalars else None
        # A parameter that this stage holds with others has its gradient from them, too, and they
        # wait for this one's: even if it does not read it in this program.
        layouts = parameter_gradients(own[0], plan)
        read = tuple(dict.fromkeys(path for each in own for path in each.parameters))
        shared = [path for path in layouts if place.number in place.holders[path]]
        shared = [path for path in shared if len(place.holders[path]) > 1]
        self.paths = (*read, *(path for path in shared if path not in read))
        self.gradients = tuple(layouts[path][1:] for path in self.paths)
        self.tied = [
            (self.paths.index(path), [r for r in place.holders[path] if r != place.number])
            for path in shared
        ]
        every = [program for each in self.programs for program in (each.before, each.first)]
        self.buffers = tuple(dict.fromkeys(path for each in every for path in each.buffers))
        self.constants = tuple(dict.fromkeys(path for each in every for path in each.constants))
        self.modules = [
            StageModule(
                each,
                [self.paths.index(path) for path in each.first.parameters],
                each.stage.number == len(stages) - 1,
            )
            for each in self.programs
        ]
        self.schedules: dict[Any, Any] = {}

    def program(self) -> Program:
        """Return what the parallel module runs in place of one rank's whole program."""
        draws = [key for each in self.programs for key in (*each.before.draws, *each.first.draws)]
        return Program(
            "\n".join(each.source for each in self.programs),
            self.run,
            self.paths,
            self.gradients,
            self.buffers,
            self.constants,
            tuple((each.layout[1:], each.shape) for each in self.outputs)[: self.returned],
            (*self.programs[0].before.mutations, *self.written),
            draws=tuple(dict.fromkeys(draws)),
        )

    def run(
        self,
        parameters: Sequence[torch.Tensor],
        buffers: Sequence[torch.Tensor],
        constants: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        device: torch.device,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Run a step; return the outputs, the same on all ranks of the pipeline, and the values to
        write back to buffers.

        Raises PlanError for inputs that need a gradient, and where the call is compiled.
        """
        if is_compiled():
            raise PlanError(
                "torch.compile of a model with stages",
                why="the schedule of micro-batches is Python, which sends and receives",
                fix="call the model without torch.compile, or leave pp out of the mesh",
            )
        if any(tensor.requires_grad for tensor in inputs) and torch.is_grad_enabled():
            raise PlanError(
                "an input of the model needs a gradient, on a mesh with stages",
                why="it would come to the ranks of one stage alone",
                fix="detach the input, or leave pp out of the mesh",
            )
        call = _Call(
            list(inputs),
            parameters[0].device if parameters else inputs[0].device if inputs else device,
            sizes_of_symbols(self.shapes, inputs),
            parameters,
            dict(zip(self.buffers, buffers, strict=True)),
            dict(zip(self.constants, constants, strict=True)),
        )
        # A rank whose stage draws none counts the step all the same.
        call.source = rng.generator()
        if self.draws:
            call.step = call.source.current_step()
        with torch.no_grad():
            written = self._before(call)
        trains = torch.is_grad_enabled() and any(each.requires_grad for each in self.outputs)
        if trains:
            for path in self.changing & call.buffers.keys():
                call.buffers[path] = call.buffers[path].clone()
            call.versions = _versions(call)
        else:
            outputs = self.forward_only(call)
            return outputs[: self.returned], [*written, *outputs[self.returned :]]
        # Ranks whose stage has no parameter take part in the backward pass all the same.
        anchor = torch.zeros((), device=call.device, requires_grad=True)
        outputs = list(_Step.apply(self, call, anchor, *parameters))
        return outputs[: self.returned], [*written, *outputs[self.returned :]]

    def _before(self, call: _Call) -> list[torch.Tensor]:
        """Compute what follows from the inputs alone; return the values that buffers get of it."""
        written: list[torch.Tensor] = []
        for each in self.programs:
            before = each.before
            known, written = before.run(
                [],
                [call.buffers[path] for path in before.buffers],
                [call.constants[path] for path in before.constants],
                call.inputs,
                call.device,
            )
            call.known.append(known)
        return written

    def forward_only(self, call: _Call) -> list[torch.Tensor]:
        """Return the outputs of a step without a backward pass."""
        with torch.no_grad():
            self._step(call, None)
        return self._shared(call)

    def eagerly(self, call: _Call) -> tuple[list[torch.Tensor], list[torch.Tensor | None] | None]:
        """Return the outputs of a step, and the parameters' gradients of the loss; None where the
        model returns none.
        """
        if self.loss is None:
            return self.forward_only(call), None
        gradients: list[torch.Tensor | None] = [None] * len(self.outputs)
        gradients[self.loss] = torch.ones(
            (), dtype=self.outputs[self.loss].dtype, device=call.device
        )
        grads = self.backward(call, gradients)
        return self._shared(call), grads

    def again(
        self, call: _Call, gradients: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """Return the parameters' gradients of a step, run again, for gradients of its outputs.

        Raises AutoParallelError where the step would be another one.
        """
        # Each rank knows of its own stages; all of them refuse, or none, who would wait for others.
        changed = torch.tensor(call.versions != _versions(call), dtype=torch.int32)
        changed = changed.to(self.place.device)
        dist.all_reduce(changed, dist.ReduceOp.MAX, group=self.place.group)
        if changed:
            raise AutoParallelError(
                "a parameter, a buffer or an input was written to between a call and its backward "
                "pass",
                why="a backward pass that begins at other outputs than the loss runs the step "
                "again, and would compute with other numbers",
                fix="call backward() before the optimizer's step, and before inputs are written to",
            )
        # The backward pass is the caller's, and no generator is in use there.
        assert call.source is not None
        with rng.drawing_from(call.source.repeated(call.step, {})):
            return self.backward(call, gradients)

    def backward(
        self, call: _Call, gradients: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """Run a step with its backward pass, and return the gradients of this stage's parameters.

        gradients: of the outputs, None where none comes.
        """
        with torch.enable_grad():
            self._step(call, gradients)
        grads: list[torch.Tensor | None] = [None] * len(self.paths)
        for module in self.modules:
            for index, gradient in zip(module.places, module.gradients(), strict=True):
                # Two stages of this rank may read one parameter.
                before = grads[index]
                if before is None or gradient is None:
                    grads[index] = gradient if before is None else before
                else:
                    grads[index] = before + gradient
        self._sum_of_stages(grads, call)
        return grads

    def _step(self, call: _Call, gradients: Sequence[torch.Tensor | None] | None) -> None:
        """Run all micro-batches through this stage, as the schedule says.

        gradients: of the outputs; None for no backward pass. Raises AutoParallelError where another
        rank is gone.
        """
        for module, known in zip(self.modules, call.known, strict=True):
            module.take([call.parameters[index] for index in module.places])
            module.begin(call, known, gradients)
        schedule = self._schedule(call, gradients is not None)
        numbers = torch.arange(self.count)
        try:
            if gradients is None:
                schedule.step(number=numbers, return_outputs=False)
            else:
                schedule.step(number=numbers, target=numbers, losses=[], return_outputs=False)
        except RuntimeError as error:
            if not is_lost(error):
                # What the library says of a failed pass hides what failed.
                raise (error.__cause__ or error) from None
            raise explained(error, "a send or receive between stages", self.place.group) from error
        finally:
            for module in self.modules:
                module.end()

    def _schedule(self, call: _Call, trains: bool) -> Any:
        """Return torch's schedule for inputs of these sizes."""
        # What is made in inference mode cannot be written to outside of it.
        modes = (trains, torch.is_inference_mode_enabled())
        key = (tuple(tensor.shape for tensor in call.inputs), modes, call.device)
        if key in self.schedules:
            return self.schedules[key]
        if len(self.schedules) >= _MOST_SIZES:
            self.schedules.clear()
        # Importing it takes a while, and most meshes have no stages.
        from torch.distributed import pipelining

        stages = [
            pipelining.PipelineStage(
                module,
                each.stage.number,
                self.pipeline.stages,
                call.device,
                input_args=tuple(one.empty(call.symbols, each.places[0]) for one in each.enters),
                output_args=module.returns(call),
                group=self.place.group,
            )
            for each, module in zip(self.programs, self.modules, strict=True)
        ]
        eager = trains and self.pipeline.schedule == "1f1b"
        kind: Any
        if len(stages) > 1:
            kind = pipelining.ScheduleInterleaved1F1B if eager else pipelining.ScheduleLoopedBFS
        else:
            # Torch's takes no fewer micro-batches than there are stages, where it is GPipe's order.
            eager = eager and self.count >= self.pipeline.stages
            kind = pipelining.Schedule1F1B if eager else pipelining.ScheduleGPipe
        loss = _own_loss if trains else None
        what = stages if len(stages) > 1 else stages[0]
        self.schedules[key] = kind(what, self.count, loss_fn=loss, scale_grads=False)
        return self.schedules[key]

    def _shared(self, call: _Call) -> list[torch.Tensor]:
        """Return the outputs on every rank: those of the last stage, which is where they are made.

        A collective call of the pipeline's ranks.
        """
        source, made = self.place.process(self.place.ranks - 1), self.modules[-1].made
        outputs = []
        for place, each in enumerate(self.outputs):
            asked = self.loss is None or place == self.loss or place >= self.returned
            if _wanted.loss_alone and not asked:
                nothing = torch.zeros((), dtype=each.dtype, device=call.device)
                outputs.append(nothing.expand(self._local_shape(each, call)))
                continue
            if self.last:
                value = joined_in_time([part[place] for part in made], each.layout)
                value = value.contiguous()
            else:
                shape = self._local_shape(each, call)
                value = torch.empty(shape, dtype=each.dtype, device=call.device)
            dist.broadcast(as_sent(value), source, group=self.place.group)
            outputs.append(value)
        self.modules[-1].made = []
        return outputs

    def _local_shape(self, each: Travelling, call: _Call) -> tuple[int, ...]:
        """Return the shape of this rank's part of an output, of all micro-batches together."""
        inside = Travelling(each.layout[1:], each.shape, each.dtype, each.requires_grad)
        return inside.local_shape(call.symbols, self.ranks)

    def _sum_of_stages(self, gradients: list[torch.Tensor | None], call: _Call) -> None:
        """Add up the gradients of parameters that stages of several ranks read, on each of these.

        All of them add in the order of the ranks, so that they have the same number bit for bit.
        """
        waiting = []
        for index, others in self.tied:
            own = gradients[index]
            if own is None:
                own = torch.zeros_like(call.parameters[index])
            own = own.contiguous()
            arrived = {self.place.number: own}
            operations = []
            for other in others:
                arrived[other] = torch.empty_like(own)
                peer = self.place.process(other)
                operations += [
                    dist.P2POp(dist.isend, own, peer, self.place.group),
                    dist.P2POp(dist.irecv, arrived[other], peer, self.place.group),
                ]
            waiting.append((index, arrived, dist.batch_isend_irecv(operations)))
        for index, arrived, works in waiting:
            for work in works:
                work.wait()
            total = arrived[min(arrived)].clone()
            for stage in sorted(arrived)[1:]:
                total += arrived[stage]
            gradients[index] = total if call.parameters[index].requires_grad else None


def pipeline_program(plan: Plan, captured: Captured, place: PipelinePlace, ranks: Ranks) -> Program:
    """Return what a rank runs in place of a program of the whole model.

    plan: with stages, of `captured`. place: of the rank in the pipeline. ranks: its place among
    those of its stage.
    """
    graph = captured.graph
    shapes = [node.result.shape for node in graph.nodes if node.kind == "input"]
    rules = (known_rule(OpCall.of(graph, node)) for node in graph.calls)
    draws = any(rule is not None and rule.random for rule in rules)
    return PipelineRun(plan, cut_plan(graph, plan), place, ranks, shapes, draws).program()


def _own_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return what the last stage returns: its module has computed the micro-batch's share."""
    return output


class _Step(torch.autograd.Function):
    """A step of the pipeline: parameters in, outputs out."""

    @staticmethod
    def forward(
        ctx: Any, run: PipelineRun, call: _Call, anchor: torch.Tensor, *parameters: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        outputs, gradients = run.eagerly(call)
        ctx.run, ctx.call, ctx.gradients = run, call, gradients
        ctx.needed = ctx.needs_input_grad[3:]
        ctx.set_materialize_grads(False)
        plain = [
            value
            for value, each in zip(outputs, run.outputs, strict=True)
            if not each.requires_grad
        ]
        ctx.mark_non_differentiable(*plain)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        run: PipelineRun = ctx.run
        others = [g for place, g in enumerate(gradients) if g is not None and place != run.loss]
        loss = None if run.loss is None else gradients[run.loss]
        # They are given away, as autograd frees what it has saved; a second backward pass runs the
        # step again.
        held, ctx.gradients = ctx.gradients, None
        with without_function_overrides():
            if held is None or others:
                found = run.again(ctx.call, gradients)
            elif loss is None:
                found = [None] * len(ctx.needed)
            else:
                found = [None if g is None else g.mul_(loss.to(g.dtype)) for g in held]
        found = [g if wanted else None for g, wanted in zip(found, ctx.needed, strict=True)]
        return None, None, None, *found
