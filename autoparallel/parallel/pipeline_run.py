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

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from autoparallel.errors import AutoParallelError, PlanError
from autoparallel.graph.captured import Captured
from autoparallel.graph.graph import Dim
from autoparallel.parallel.compiled_calls import is_compiled
from autoparallel.parallel.pipeline_call import PipelineCall, wants_loss_alone
from autoparallel.parallel.pipeline_node import PipelineStep
from autoparallel.parallel.pipeline_place import PipelinePlace, as_sent
from autoparallel.parallel.pipeline_schedules import (
    IN_HALVES,
    PipelineSchedules,
    joins_weights_once,
    schedule_of_run,
)
from autoparallel.parallel.shared_gradients import add_over_stages
from autoparallel.parallel.stage_module import StageModule
from autoparallel.plan import Plan
from autoparallel.rewrite.emit import Program
from autoparallel.rewrite.stage_programs import (
    StagePrograms,
    Travelling,
    joined_in_time,
    sizes_of_symbols,
)
from autoparallel.rewrite.stages import (
    Stage,
    cut_plan,
    parameter_gradients,
    reached_parameters,
)
from autoparallel.rules.lookup import known_rule
from autoparallel.rules.rule import OpCall
from autoparallel.runtime import rng
from autoparallel.runtime.ranks import Ranks

__all__ = ["PipelineRun", "pipeline_program"]


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
        self.stages = tuple(stages)
        self._reached: dict[tuple[bool, ...], frozenset[str]] = {}
        self.shapes, self.draws = tuple(shapes), draws
        self.count = plan.pipeline.microbatches
        own = [stages[number] for number in plan.pipeline.of_rank(place.number)]
        self.programs = [StagePrograms(stage, ranks, self.count, plan.model) for stage in own]
        self.last = own[-1].number == len(stages) - 1
        self.source = plan.pipeline.rank_of(len(stages) - 1)
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
        # Ops that communicate compute all of their gradients at once: several ranks of a stage go
        # back in whole passes, in the same order.
        alone = math.prod(ranks.sizes) == 1
        halves = alone and schedule_of_run(self.pipeline, trains=True) in IN_HALVES
        self.modules = [
            StageModule(
                each,
                [self.paths.index(path) for path in each.first.parameters],
                each.stage.number == len(stages) - 1,
                halves and joins_weights_once(each.stage),
            )
            for each in self.programs
        ]
        # The gradient of the loss with which calls begin.
        self.seed = 1.0
        self.narrow = any(
            value.dtype == torch.float16 and value.requires_grad
            for stage in stages
            for value in stage.graph.values.values()
        )
        self.schedules = PipelineSchedules(self.pipeline, place, self.programs, self.modules)

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
        call = PipelineCall(
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
            call.began = call.versions()
        else:
            outputs = self.forward_only(call)
            return outputs[: self.returned], [*written, *outputs[self.returned :]]
        # Ranks whose stage has no parameter take part in the backward pass all the same.
        anchor = torch.zeros((), device=call.device, requires_grad=True)
        outputs = list(PipelineStep.apply(self, call, anchor, *parameters))
        return outputs[: self.returned], [*written, *outputs[self.returned :]]

    def _before(self, call: PipelineCall) -> list[torch.Tensor]:
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

    def forward_only(self, call: PipelineCall) -> list[torch.Tensor]:
        """Return the outputs of a step without a backward pass."""
        with torch.no_grad():
            self._step(call, None)
        return self._shared(call)

    def eagerly(
        self, call: PipelineCall
    ) -> tuple[list[torch.Tensor], list[torch.Tensor | None] | None]:
        """Return the outputs of a step, and the parameters' gradients of the loss; None where the
        model returns none.
        """
        if self.loss is None:
            return self.forward_only(call), None
        gradients: list[torch.Tensor | None] = [None] * len(self.outputs)
        gradients[self.loss] = torch.full(
            (), self.seed, dtype=self.outputs[self.loss].dtype, device=call.device
        )
        grads = self.backward(call, gradients)
        return self._shared(call), grads

    def again(
        self, call: PipelineCall, gradients: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """Return the parameters' gradients of a step, run again, for gradients of its outputs.

        Raises AutoParallelError where the step would be another one.
        """
        # Each rank knows of its own stages; all of them refuse, or none, who would wait for others.
        changed = torch.tensor(call.began != call.versions(), dtype=torch.int32)
        changed = changed.to(self.place.device)
        with self.place.answered("an all_reduce between stages, before a step that is run again"):
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
        self, call: PipelineCall, gradients: Sequence[torch.Tensor | None]
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
        reached = self.reached(tuple(each is not None for each in gradients))
        tied = [each for each in self.tied if self.paths[each[0]] in reached]
        with self.place.answered("an exchange of gradients that several stages have"):
            add_over_stages(grads, call.parameters, tied, self.place)
        # Between stages, nothing that has no gradient is sent: zeros go in its place.
        return [
            gradient if path in reached else None
            for path, gradient in zip(self.paths, grads, strict=True)
        ]

    def reached(self, wanted: tuple[bool, ...]) -> frozenset[str]:
        """Return the paths of the parameters that have a gradient on any rank.

        wanted: whether each output has one. All ranks know all stages, and answer alike.
        """
        if wanted not in self._reached:
            names = [
                name for name, asked in zip(self.stages[-1].gives, wanted, strict=True) if asked
            ]
            self._reached[wanted] = reached_parameters(self.stages, names)
        return self._reached[wanted]

    def scaled(
        self, call: PipelineCall, held: Sequence[torch.Tensor | None], gradient: torch.Tensor
    ) -> list[torch.Tensor | None]:
        """Return the parameters' gradients for a gradient of the loss.

        held: for the one that the call has begun with; they are multiplied in place. Numbers of
        float16 that were too small for it then are not in a product: the step is run again, and
        the next calls begin with this gradient.
        """
        if self.narrow and float(gradient) != self.seed:
            self.seed = float(gradient)
            gradients: list[torch.Tensor | None] = [None] * len(self.outputs)
            assert self.loss is not None
            gradients[self.loss] = gradient
            return self.again(call, gradients)
        if self.narrow:
            return list(held)
        return [None if g is None else _multiplied(g, gradient) for g in held]

    def _step(self, call: PipelineCall, gradients: Sequence[torch.Tensor | None] | None) -> None:
        """Run all micro-batches through this stage, as the schedule says.

        gradients: of the outputs; None for no backward pass. Raises AutoParallelError where another
        rank is gone.
        """
        for module, known in zip(self.modules, call.known, strict=True):
            module.take([call.parameters[index] for index in module.places])
            module.begin(call, known, gradients)
        schedule = self.schedules.of(call, gradients is not None)
        numbers = torch.arange(self.count)
        try:
            with self.place.answered("a send or receive between stages"):
                if gradients is None:
                    schedule.step(number=numbers)
                else:
                    schedule.step(number=numbers, target=numbers, losses=[])
        except Exception as error:
            # It remembers the micro-batches that it was at.
            self.schedules.forget()
            if isinstance(error, AutoParallelError) or not isinstance(error, RuntimeError):
                raise
            # What the library says of a failed pass hides what failed.
            raise (error.__cause__ or error) from None
        finally:
            for module in self.modules:
                module.end()

    def _shared(self, call: PipelineCall) -> list[torch.Tensor]:
        """Return the outputs on every rank: those of the last stage, which is where they are made.

        A collective call of the pipeline's ranks.
        """
        source, made = self.place.process(self.source), self.modules[-1].made
        outputs = []
        for place, each in enumerate(self.outputs):
            asked = self.loss is None or place == self.loss or place >= self.returned
            if wants_loss_alone() and not asked:
                nothing = torch.zeros((), dtype=each.dtype, device=call.device)
                outputs.append(nothing.expand(self._local_shape(each, call)))
                continue
            if self.last:
                value = joined_in_time([part[place] for part in made], each.layout)
                value = value.contiguous()
            else:
                shape = self._local_shape(each, call)
                value = torch.empty(shape, dtype=each.dtype, device=call.device)
            with self.place.answered("a broadcast of what the last stage returns"):
                dist.broadcast(as_sent(value), source, group=self.place.group)
            outputs.append(value)
        self.modules[-1].made = []
        return outputs

    def _local_shape(self, each: Travelling, call: PipelineCall) -> tuple[int, ...]:
        """Return the shape of this rank's part of an output, of all micro-batches together."""
        inside = Travelling(each.layout[1:], each.shape, each.dtype, each.requires_grad)
        return inside.local_shape(call.symbols, self.ranks)


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


def _multiplied(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return a tensor multiplied in place by a number of a type that may be more exact."""
    if torch.promote_types(tensor.dtype, factor.dtype) == tensor.dtype:
        return tensor.mul_(factor.to(tensor.dtype))
    return tensor.copy_(tensor.to(factor.dtype) * factor)
