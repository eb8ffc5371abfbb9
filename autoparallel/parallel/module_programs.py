"""The programs that a parallel module runs, to be read as text or taken to torch.fx."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from autoparallel.errors import PlanError
from autoparallel.graph.captured import modes_of
from autoparallel.parallel.module_state import state_of
from autoparallel.parallel.parameters import refresh
from autoparallel.rewrite.emitted_program import joined_programs
from autoparallel.rewrite.program_module import program_module
from autoparallel.runtime import rng

__all__ = ["program_of", "program_text"]


def program_text(root: nn.Module) -> str:
    """Return the programs of a parallel module and of the parts in it, for the modes they are in.

    Each program stands under a comment that names its part, if there are parts. Raises PlanError
    where there is no program.
    """
    sources = []
    for module in root.modules():
        if "_autoparallel" not in module.__dict__:
            continue
        state = state_of(module)
        modes = modes_of(module)
        for (entry_modes, _), entries in state.entries.items():
            sources += [(state.path, e.program.source) for e in entries if entry_modes == modes]
    if not sources:
        mode = "train" if root.training else "eval"
        raise PlanError(
            f"{type(root).__name__} has no program in {mode} mode",
            why="a program is emitted at the first call in a mode, and none for modules that stay "
            "the user's Python",
            fix="call the module once in this mode",
        )
    if all(path == state_of(root).path for path, _ in sources):
        sources = [("", source) for _, source in sources]
    return joined_programs(sources)


def program_of(module: nn.Module) -> fx.GraphModule | None:
    """Return the program that a parallel module runs in its mode, as a torch.fx.GraphModule.

    Return None for other modules. Its parameters share memory with the rank's own, and their
    gradients reach the module's. Raises PlanError where there is no program for the mode, where
    there are several, and where programs run as parts of Python.
    """
    if "_autoparallel" not in module.__dict__:
        return None
    state = state_of(module)
    if state.plan is not None:
        state.plan.refuse_stages(
            "a program of one rank in torch.fx",
            fix="emitted_program(plan, rank=rank) is that of a rank's stages, as Python",
        )
    modes = modes_of(module)
    entries = [
        entry
        for (entry_modes, _), several in state.entries.items()
        if entry_modes == modes
        for entry in several
    ]
    if len(entries) != 1:
        mode = "train" if module.training else "eval"
        raise PlanError(
            f"{type(module).__name__} has {len(entries)} programs in {mode} mode",
            why="a program is emitted at the first call in a mode, one for each structure of the "
            "inputs, and none for modules that stay the user's Python",
            fix="call the module once in this mode"
            if not entries
            else "to_fx(plan, model, rank=0)",
        )
    (entry,) = entries
    program = entry.program
    copies = [leaf.copy for leaf in entry.leaves if leaf.copy is not None]
    refresh(copies, state.ranks)
    parameters = {leaf.path: leaf.shared() for leaf in entry.leaves}
    buffers = {path: module.get_buffer(path) for path in program.buffers}
    device = next((p.device for p in parameters.values()), torch.device("cpu"))
    constants = {path: entry.captured.constants[path].to(device) for path in program.constants}
    graph_module = program_module(
        program, parameters, buffers, constants, device, type(module).__name__
    )
    # Hooks around the call do what the parallel module does around a program. A call may be made
    # within a call (a forward in a backward hook), so that passes are a stack.
    passes: list[rng.using] = []

    def before(*_: Any) -> None:
        """Gather copies that are out of date, and begin a pass of random numbers."""
        refresh(copies, state.ranks)
        passes.append(rng.using(state.generator))
        passes[-1].__enter__()

    def after(*_: Any) -> None:
        """End the pass of random numbers."""
        passes.pop().__exit__()

    graph_module.register_forward_pre_hook(before)
    # always_call: also where the forward raises.
    graph_module.register_forward_hook(after, always_call=True)
    return graph_module
