"""Copies of a parallel module: another one beside it, and the plain one that is saved to files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NoReturn

from torch import nn

from autoparallel.errors import AutoParallelError
from autoparallel.parallel.checkpoint_files import together
from autoparallel.parallel.fill_tree import gathered_copies
from autoparallel.parallel.module_calls import make_entry
from autoparallel.parallel.module_state import State, Tree, state_of, user_forward
from autoparallel.parallel.pipelined_parameters import note_stages
from autoparallel.parallel.seeds import generator_of
from autoparallel.parallel.tree_shape import TreeShape
from autoparallel.parallel.uncaptured_python import WholeParameters
from autoparallel.parallel.whole_values import whole_value
from autoparallel.runtime.rng import Generator
from autoparallel.support.module_copy import inherit_copies, shallow_copy

__all__ = ["deep_copy", "refuse_pickling", "saved_whole", "usual_copy", "whole_module"]


def deep_copy(module: nn.Module, memo: dict[int, Any]) -> Any:
    """Return a second module that follows the same plan, with parameters of its own.

    This is what copy.deepcopy calls, for every parallel module in the tree. memo: copy.deepcopy's.
    Plans and programs are shared; parts that the ranks hold are copied without communicating. A
    module inside of a model that is not being copied itself comes with a copy of the whole model,
    of which it remains a part. Raises AutoParallelError in the midst of a forward.
    """
    state = state_of(module)
    tree = state.tree
    if id(state) in memo:  # the model is being copied
        return usual_copy(module, memo)
    if module is not tree.root:
        root = copy.deepcopy(tree.root, memo)
        return root.get_submodule(state.path) if id(module) not in memo else memo[id(module)]
    if tree.depth:
        raise AutoParallelError(
            f"{type(module).__name__} is copied while its forward runs",
            why="its parameters are shown whole until the forward returns",
            fix="copy it before or after the call",
        )
    source = generator_of(module)
    memo[id(source)] = Generator(source.seed, source.step, source.mode)
    states = list(_states(module))
    for _, inner in states:
        memo[id(inner)] = None
    twin = usual_copy(module, memo)
    parameters = state.parameters
    gathered = gathered_copies(twin, parameters)
    # Attributes may refer to parameters of the user's model; the copied ones refer to copies.
    originals = {
        id(memo[number]): path
        for *_, paths in tree.whole.references
        for number, path in paths.items()
        if number in memo
    }
    inherit_copies(tree.skeleton, memo)
    overlap = tree.whole.overlap
    whole = WholeParameters(twin, parameters, tree.ranks, originals, gathered, overlap)
    other = replace(
        tree,
        root=twin,
        whole=whole,
        copies=gathered,
        parameters=dict(twin.named_parameters(remove_duplicate=False)),
        shape=TreeShape(twin.modules()),
        attributes=None,  # what is traced next is made of the copy
        elsewhere={},
    )
    if tree.pipeline is not None:
        note_stages(twin, tree.pipeline)
    for path, inner in states:
        module_of_state = twin.get_submodule(path)
        module_of_state.__dict__["_autoparallel"] = _state_like(inner, module_of_state, other, memo)
    return twin


def usual_copy(module: nn.Module, memo: dict[int, Any]) -> Any:
    """Return the copy that copy.deepcopy would make if there were no `__deepcopy__` of ours."""
    own: Callable[..., Any] | None = getattr(type(module).__bases__[1], "__deepcopy__", None)
    if own is not None:
        return own(module, memo)
    reduced: Any = object.__reduce_ex__(module, 4)
    make, arguments, attributes = reduced[:3]
    twin = make(*arguments)
    memo[id(module)] = twin
    attributes = copy.deepcopy(attributes, memo)
    if hasattr(twin, "__setstate__"):
        twin.__setstate__(attributes)
    else:
        twin.__dict__.update(attributes)
    return twin


def _states(module: nn.Module) -> Iterator[tuple[str, State]]:
    """Yield the states of all parallel modules in a tree, with the paths of these."""
    for path, inner in module.named_modules():
        state = inner.__dict__.get("_autoparallel")
        if isinstance(state, State):
            yield path, state


def _state_like(state: State, module: nn.Module, tree: Tree, memo: dict[int, Any]) -> State:
    """Return a state for the copy of a parallel module, with the same programs."""
    own_forward = copy.deepcopy(state.own_forward, memo)
    twin = replace(
        state,
        tree=tree,
        forward=user_forward(module, type(module).__bases__[1], own_forward),
        own_forward=own_forward,
        load_hook=copy.deepcopy(state.load_hook, memo),
        entries={},
        python=set(state.python),
        members=(),
        hooks=None,
    )
    for key, entries in state.entries.items():
        twin.entries[key] = [
            make_entry(module, twin, entry.plan, entry.program) for entry in entries
        ]
    return twin


def refuse_pickling(module: nn.Module) -> NoReturn:
    """Raise the AutoParallelError for a module that is pickled, as torch.save(module) does."""
    raise AutoParallelError(
        f"{type(module).__name__} cannot be pickled",
        why="it is one rank's share of a model, with programs for this mesh and process groups",
        fix="save_checkpoint(folder, module), or torch.save(full_state_dict(module), file) on one "
        "rank after all have called it, and module.plan.to_json() for the plan",
    )


def saved_whole(kind: type, whole: Callable[[nn.Module, type], Any]) -> dict[str, Any]:
    """Return the methods by which a module of a class derived from the user's saves itself whole.

    kind: the user's class. whole: a function that returns a plain module of that class, with whole
    parameters, on rank 0, and None elsewhere; all ranks call it. The result is empty for classes
    without `save_pretrained`, which is how Hugging Face's libraries name the method that writes a
    model to files.
    """
    if not callable(getattr(kind, "save_pretrained", None)):
        return {}

    def save_pretrained(module: Any, *args: Any, **kwargs: Any) -> Any:
        """Write the unsplit model, as the user's class does. A collective call; rank 0 writes."""
        plain = whole(module, kind)
        return together(
            f"{kind.__name__}.save_pretrained",
            lambda: None if plain is None else plain.save_pretrained(*args, **kwargs),
        )

    return {"save_pretrained": save_pretrained}


def whole_module(module: nn.Module, kind: type) -> Any:
    """Return a module of the user's class with whole parameters, to be read, on rank 0.

    A collective call; other ranks get None. It shares buffers and attributes with the parallel one.
    kind: the class.
    """
    state = state_of(module)
    first = state.ranks.rank == 0
    wholes: dict[int, nn.Parameter] = {}
    named = list(module.named_parameters(remove_duplicate=False))
    for path, parameter in named:
        if id(parameter) not in wholes:
            value = whole_value(state, path, parameter)
            # Only rank 0 needs all of them at once.
            if first:
                wholes[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
            else:
                wholes[id(parameter)] = parameter
    if not first:
        return None
    plain = shallow_copy(module)
    for inner in plain.modules():
        if inner.__dict__.pop("_autoparallel", None) is not None:
            inner.__class__ = type(inner).__bases__[1]
        inner.__dict__.pop("_generator", None)
        inner.__dict__.pop("_compiled_call_impl", None)
    assert type(plain) is kind
    for path, parameter in named:
        owner, _, name = path.rpartition(".")
        plain.get_submodule(owner)._parameters[name] = wholes[id(parameter)]
    return plain
