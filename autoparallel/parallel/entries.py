"""A program in a parallel module: the parameters that it reads, and what must be as it was."""

from __future__ import annotations

from torch import nn

from autoparallel.parallel.guards import Guards
from autoparallel.parallel.module_state import Entry, State
from autoparallel.parallel.parameters import LocalParameter
from autoparallel.parallel.uncaptured_python import held_by
from autoparallel.plan import Plan
from autoparallel.rewrite.emit import Program

__all__ = ["make_entry"]


def make_entry(module: nn.Module, state: State, plan: Plan, program: Program) -> Entry:
    """Return a program with the module's parameters, and with guards on what its trace has read.

    module, state: the parallel module, and its state. plan: the one that the program was emitted
    of, with its graph.
    """
    captured = plan.captured
    assert captured is not None
    bucket = state.tree.whole.bucket
    leaves = []
    for path, gradient in zip(program.parameters, program.gradients, strict=True):
        owner, _, name = path.rpartition(".")
        holder = held_by(module.get_submodule(owner))
        copy = state.tree.copies.get(id(holder[name]))
        leaves.append(
            LocalParameter(holder, name, path, state.parameters[path], gradient, bucket, copy)
        )
    nodes = captured.graph.nodes
    stored = {node.target: node.result for node in nodes if node.kind == "parameter"}
    planned = [(leaf, stored[leaf.path]) for leaf in leaves]
    reads = captured.reads
    if state.path or state.tree.depth:
        # Python that is shown whole parameters has other values in these.
        shown = {(id(inner), name) for inner, name, _, _ in state.tree.whole.references}
        reads = tuple(
            read
            for read in reads
            if (id(module.get_submodule(read.path)), read.place.rpartition(".")[2]) not in shown
        )
    return Entry(
        plan,
        captured,
        program,
        leaves,
        [node.result.shape for node in nodes if node.kind == "input"],
        Guards(module, reads),
        [(leaf.owner, leaf.name) for leaf, value in planned if not value.requires_grad],
    )
