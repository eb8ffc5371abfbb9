"""A plan as a Python file of its own: the program of a rank, to be read, changed and run.

The file needs torch and the runtime of this package (conversions, kernels that communicate), and
neither the model nor the planner. It has the user's names: parameters are read by their paths.
"""

from __future__ import annotations

import re

from torch import nn

from autoparallel.errors import PlanError
from autoparallel.exports.export_text import Export
from autoparallel.exports.script_functions import IMPORTS, FunctionWriter
from autoparallel.exports.script_tables import script_tables
from autoparallel.graph.captured import Captured
from autoparallel.placement import Placement
from autoparallel.plan import Plan
from autoparallel.rewrite.emit import emit
from autoparallel.rewrite.emitted_program import require_graph
from autoparallel.rewrite.program import Program, drops_copies
from autoparallel.runtime.groups import Group
from autoparallel.runtime.ranks import absent_ranks
from autoparallel.support.units import seconds_text

__all__ = ["emitted_script"]

# In a program that drops copies the others have memory of their own.
_BESIDE = {
    "convert": "from autoparallel.runtime.recompute import convert_beside as convert",
    "move": "from autoparallel.runtime.recompute import move_beside as move",
}
_HEAD = '''"""{model} on {world_size} ranks, {mesh}: the program that each of them runs.

    torchrun --nproc-per-node {world_size} {file} weights.pt

runs one step on inputs of zeros; without weights.pt they are drawn at random. To train with it:

    from {module} import sharded_model
    model = sharded_model(torch.load("weights.pt"))      # whole tensors, by the names below
    loss = model({inputs})[0]
    loss.backward()
    model.finish_gradients()

Every rank is given the same, whole inputs: {inputs}. It returns {returned}.
Written by autoparallel from a plan; predicted: {seconds} a step on {hardware}.{missing}
"""
'''
_TAIL = '''

def sharded_model(weights):
    """Return this rank's module. weights: whole tensors by path, such as a state_dict."""
    return ShardedProgram(globals(), {{**EMBEDDED, **weights}})


def main():
    """Run one step, and print what is returned first."""
    if len(sys.argv) > 1:
        weights = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
    else:
        torch.manual_seed(0)
        shapes = {{path: row[2:] for path, row in PARAMETERS.items()}} | BUFFER_SHAPES
        weights = {{p: (torch.randn(s) * 0.02).to(dtype) for p, (s, dtype) in shapes.items()}}
    model = sharded_model(weights)
    inputs = [torch.zeros(shape, dtype=dtype) for shape, dtype in INPUTS]
    first = model(*inputs)[0]
    if first.requires_grad and not first.shape:
        first.backward()
        model.finish_gradients()
    if model.ranks.rank == 0:
        print(first.item() if not first.shape else tuple(first.shape))


if __name__ == "__main__":
    main()
'''


def emitted_script(plan: Plan, model: nn.Module, *, file: str = "sharded_model.py") -> Export:
    """Return a Python file that runs a plan without the model and without the planner.

    plan: with its graph. model: the one that was planned, with values for buffers that its
    state_dict does not have. file: the name of the file, for its own words. Lines that repeat are
    one function, parameters are read by their paths, and each redistribution has a comment that
    says what it is for. Ranks whose parts differ in size have programs of their own in the file.
    Raises PlanError for a plan in parts or with stages, and for objects that no text can stand for.

    Example: `Path("sharded_gpt.py").write_text(emitted_script(plan, model).text)`
    """
    if plan.breaks:
        raise PlanError(
            f"the plan for {plan.model} has parts, between which runs the user's Python",
            fix="export the plan of one part for its module: plan.parts[0].plan",
        )
    plan.refuse_stages(
        "a script",
        fix="autoparallel.emitted_program(plan, rank=rank) is the program of a rank's stages as "
        "Python; or leave pp out of the mesh",
    )
    captured = require_graph(plan)
    captured.refuse_writes("a script")
    programs = _programs(plan, captured)
    first = programs[0][0]
    missing = _missing(plan, first)
    functions, used = [], set()
    for program, numbers in programs:
        name = "forward" if len(programs) == 1 else f"forward_{numbers[0]}"
        writer = FunctionWriter(plan, program, name, plan.mesh.axes)
        functions.append(writer.text())
        used |= writer.used
        functions += [f"forward_{other} = {name}" for other in numbers[1:] if len(programs) > 1]
    text = "\n".join(
        [
            _head(plan, missing, file),
            *_imports(first, used),
            "",
            *script_tables(plan, first, model, captured.constants),
            "",
            "",
            "\n\n\n".join(functions),
            _TAIL.format(),
        ]
    )
    return Export("python", text, ".py", missing)


def _programs(plan: Plan, captured: Captured) -> list[tuple[Program, list[int]]]:
    """Return the programs that differ, each with the ranks that run it."""

    def of(rank: int) -> Program:
        return emit(captured.graph, plan, absent_ranks(plan.mesh, rank), plan.model)

    first, last = of(0), of(plan.world_size - 1)
    # Parts become no larger from rank to rank: where the first and the last are alike, all are.
    if first.source == last.source:
        return [(first, list(range(plan.world_size)))]
    programs: dict[str, tuple[Program, list[int]]] = {}
    for rank in range(plan.world_size):
        program = of(rank)
        programs.setdefault(program.source, (program, []))[1].append(rank)
    return list(programs.values())


def _head(plan: Plan, missing: tuple[str, ...], file: str) -> str:
    """Return the file's docstring."""
    inputs = ", ".join(item.path.replace(".", "_") for item in plan.inputs) or "none"
    notes = "".join(f"\n- {sentence}" for sentence in missing)
    return _HEAD.format(
        model=plan.model,
        world_size=plan.world_size,
        mesh=plan.mesh,
        file=file,
        module=file.removesuffix(".py"),
        inputs=inputs,
        returned=", ".join(name or "its result" for name in plan.returned) or "its results",
        seconds=seconds_text(plan.seconds),
        hardware=plan.hardware,
        missing=f" What it does not have of the plan:\n{notes}" if notes else "",
    )


def _missing(plan: Plan, program: Program) -> tuple[str, ...]:
    """Return what of a plan the file does not do."""
    missing = []
    late = [p.path for p in plan.parameters if p.state != p.storage or p.gradient != p.storage]
    if late:
        missing.append(
            f"ZeRO-1 and ZeRO-2 of {len(late)} parameters: their gradients and optimizer states "
            "are as large as the parameter is here"
        )
    libraries = sorted(set(re.findall(r"torch\.ops\.(\w+)\.", program.source)) - {"aten", "prims"})
    if libraries:
        missing.append(f"the registration of the custom ops of {', '.join(libraries)}: import it")
    return tuple(missing)


def _imports(program: Program, used: set[str]) -> list[str]:
    """Return the lines that import what the programs call. Raises PlanError for other objects."""
    drops = drops_copies(program.source)
    known = {**IMPORTS, **(_BESIDE if drops else {})}
    lines = ["import sys", "", "import torch"]
    ours = [known[name] for name in known if name in used]
    placements = {n: v for n, v in program.names.items() if isinstance(v, Placement) and n in used}
    kinds = sorted({type(placement).__name__ for placement in placements.values()})
    if kinds:
        ours.append(f"from autoparallel.placement import {', '.join(kinds)}")
    if drops:
        ours.append("from autoparallel.runtime.recompute import dropping")
    ours.append("from autoparallel.runtime.sharded_program import ShardedProgram")
    rows = [f"{name} = {_placement_source(value)}" for name, value in sorted(placements.items())]
    standard = {"torch", "ranks", *IMPORTS, *placements}
    for name, value in program.names.items():
        if name in standard or name not in used or isinstance(value, Group):
            continue
        module, qualified = getattr(value, "__module__", ""), getattr(value, "__qualname__", "")
        if not module or not qualified or "<" in qualified or "." in qualified:
            raise PlanError(
                f"the program calls {name}, {value!r:.80}, for which a file has no words",
                fix="apply the plan in Python: autoparallel.apply_plan(model, plan)",
            )
        ours.append(f"from {module} import {qualified} as {name}")
    return [
        *lines,
        *sorted(ours, key=lambda line: (not line.startswith("import"), line)),
        "",
        *rows,
    ]


def _placement_source(placement: Placement) -> str:
    """Return Python for a placement.

    >>> from autoparallel.placement import Shard
    >>> _placement_source(Shard(0)), _placement_source(Shard(1, blocks=3))
    ('Shard(0)', 'Shard(1, blocks=3)')
    """
    text = str(placement)
    names = {"S": "Shard", "I": "Invariant", "R": "Replicate", "P": "Partial"}
    return names[text[0]] + (text[1:] or "()")
