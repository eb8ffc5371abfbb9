"""A split model in which the user has put other modules or parameters: its parts are taken anew."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from autoparallel.errors import PlanError
from autoparallel.parallel.distributed_layouts import distributed_placements
from autoparallel.parallel.fill_tree import gathered_copies
from autoparallel.parallel.module_state import State, Tree
from autoparallel.parallel.parameters import ParameterLayouts
from autoparallel.parallel.rank_agreement import require_equal_weights
from autoparallel.parallel.tree_shape import TreeShape
from autoparallel.parallel.uncaptured_python import WholeParameters

__all__ = ["restructure"]

_log = logging.getLogger(__name__)


def restructure(tree: Tree) -> None:
    """Take up the modules and parameters that the model has now; its programs are made anew.

    tree: of the model. Parameters that it had keep their layouts, wherever they are now. A new one
    that every rank has whole stays so. A collective call where there are such. Raises PlanError for
    a parameter that is split otherwise than it was, and AutoParallelError where the ranks have put
    different ones in place.
    """
    root = tree.root
    if _are_alike(tree):
        # As after `model.to(device)`: programs read what is there now.
        tree.take_up_parameters()
        return
    state: State = vars(root)["_autoparallel"]
    known = {id(item): state.parameters[path] for path, item in tree.parameters.items()}
    parameters: dict[str, ParameterLayouts] = {}
    added: dict[str, torch.Tensor] = {}
    now = dict(root.named_parameters(remove_duplicate=False))
    for path, parameter in now.items():
        before = state.parameters.get(path)
        if id(parameter) in known:
            parameters[path] = known[id(parameter)]
        elif isinstance(parameter, DTensor):
            parameters[path] = _same_split(path, parameter, before, tree)
        else:
            shape = tuple(parameter.shape)
            parameters[path] = ParameterLayouts.of(None, shape, tree.ranks.sizes)
            added[path] = parameter
    if added and tree.ranks.world_size > 1:
        require_equal_weights(added, tree.ranks.world, type(root).__name__)
        _log.warning("%s: whole on every rank, as it was put in after planning", ", ".join(added))
    for module in root.modules():
        if module is not root:
            _forget(module)
    state.parameters = parameters
    tree.copies = gathered_copies(root, parameters)
    originals = {number: path for number, path in tree.whole.originals.items() if path in now}
    tree.whole = WholeParameters(
        root, parameters, tree.ranks, originals, tree.copies, tree.whole.overlap
    )
    tree.parameters = now
    state.entries.clear()
    state.python.clear()
    state.full = False
    state.members, state.hooks = tuple(root.modules()), None
    tree.shape = TreeShape(state.members)


def _are_alike(tree: Tree) -> bool:
    """Return whether programs are right for the parameters that there are now, in equal modules."""
    now = dict(tree.root.named_parameters(remove_duplicate=False))
    if not tree.shape.has_same_modules() or list(now) != list(tree.parameters):
        return False
    pairs = {(id(before), id(now[path])) for path, before in tree.parameters.items()}
    if not len(pairs) == len({one for one, _ in pairs}) == len({other for _, other in pairs}):
        return False  # others are tied
    dtypes = tree.shape.dtypes_by_id()
    return all(
        _looks(now[path], now[path].dtype) == _looks(before, dtypes[id(before)])
        for path, before in tree.parameters.items()
    )


def _looks(parameter: torch.Tensor, dtype: torch.dtype) -> Any:
    """Return the facts about a parameter that a program depends on."""
    placements = parameter.placements if isinstance(parameter, DTensor) else None
    return (type(parameter), tuple(parameter.shape), dtype, placements)


def _same_split(
    path: str, parameter: Any, before: ParameterLayouts | None, tree: Tree
) -> ParameterLayouts:
    """Return the layouts of a DTensor that takes the place of one that was split alike."""
    known = before is not None and before.shape == tuple(parameter.shape)
    if before is not None and known and tree.mesh is not None:
        placements = distributed_placements(before.state, tree.mesh.shape)
        if list(parameter.placements) == placements:
            return before
    raise PlanError(
        f"parameter {path} is a DTensor that this model's plan does not know",
        where=path,
        why=f"it is placed as {parameter.placements}"
        + (f", and {path} is stored as {before.state}" if before is not None else ""),
        fix="put a whole tensor in its place, equal on every rank, or split the model again",
    )


def _forget(module: nn.Module) -> None:
    """Make a plain module of the user's class of a split one inside of the model."""
    state = vars(module).pop("_autoparallel", None)
    if state is not None:
        if len(type(module).__bases__) < 2:
            raise PlanError(
                f"{type(module).__name__} has another class than when it was split",
                why="a parametrization, say, was registered on a module of the split model",
                fix="register it before the model is split",
            )
        module.__class__ = type(module).__bases__[1]
        if state.own_forward is not None:
            vars(module)["forward"] = state.own_forward
        state.load_hook.remove()
