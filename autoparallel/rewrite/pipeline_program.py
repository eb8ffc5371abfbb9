"""All stages of a pipeline as one program, which computes them in turn on one rank's parts.

No rank of a running pipeline computes so: each has one stage. Simulated ranks do, which have the
whole model, and autograd's own backward pass through all stages is what a pipeline must equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from autoparallel.graph.graph import Graph
from autoparallel.plan import Plan
from autoparallel.rewrite.emit import Program
from autoparallel.rewrite.stage_programs import StagePrograms, joined_in_time
from autoparallel.rewrite.stages import cut_plan
from autoparallel.runtime.ranks import Ranks

__all__ = ["program_in_turn"]


def program_in_turn(graph: Graph, plan: Plan, ranks: Ranks) -> Program:
    """Return a program that runs every micro-batch through every stage.

    graph: of the plan. plan: with stages. ranks: the rank's place among those of one stage.
    """
    assert plan.pipeline is not None
    count = plan.pipeline.microbatches
    stages = [StagePrograms(s, ranks, count, plan.model) for s in cut_plan(graph, plan)]
    paths: dict[str, Any] = {}
    buffers: dict[str, None] = {}
    constants: dict[str, None] = {}
    for each in stages:
        paths.update(zip(each.first.parameters, each.first.gradients, strict=True))
        for program in (each.before, each.first):
            buffers.update(dict.fromkeys(program.buffers))
            constants.update(dict.fromkeys(program.constants))
    last = stages[-1]

    def run(
        parameters: Sequence[torch.Tensor],
        given_buffers: Sequence[torch.Tensor],
        given_constants: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        device: torch.device,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        weights = dict(zip(paths, parameters, strict=True))
        held = dict(zip(buffers, given_buffers, strict=True))
        fixed = dict(zip(constants, given_constants, strict=True))

        def call(program: Program, values: Sequence[torch.Tensor]) -> Any:
            return program.run(
                [weights[path] for path in program.parameters],
                [held[path] for path in program.buffers],
                [fixed[path] for path in program.constants],
                list(values),
                device,
            )

        known = [call(each.before, inputs) for each in stages]
        made: list[list[torch.Tensor]] = []
        for number in range(count):
            passed: list[torch.Tensor] = []
            for each, (values, _) in zip(stages, known, strict=True):
                passed, _ = call(each.programs[number], (*inputs, *values, *passed))
            made.append(passed)
        outputs = [
            joined_in_time([part[place] for part in made], travelling.layout)
            for place, travelling in enumerate(last.leaves)
        ]
        returned = len(outputs) - len(last.stage.written)
        return outputs[:returned], [*known[0][1], *outputs[returned:]]

    return Program(
        "\n".join(each.source for each in stages),
        run,
        tuple(paths),
        tuple(layout[1:] for layout in paths.values()),
        tuple(buffers),
        tuple(constants),
        tuple((each.layout[1:], each.shape) for each in last.leaves)[: len(graph.outputs)],
        (*stages[0].before.mutations, *last.stage.written),
    )
