"""Side effects of a forward: attributes and objects that it writes to besides its result."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from autoparallel.capture.equal_blocks import token_of
from autoparallel.capture.module_tensors import MODULE_ATTRIBUTES
from autoparallel.errors import AutoParallelError, CaptureError
from autoparallel.support.memory_writes import Watch
from autoparallel.support.module_paths import join_path

__all__ = ["NoReplacing", "changed", "effects", "moving"]
__all__ += ["refuse_backward_hooks", "refuse_effects", "written_arguments"]

_HOOKS = tuple(name for name in sorted(MODULE_ATTRIBUTES) if name.endswith("_hooks"))
_NOTHING: Mapping[int, str] = {}
_NO_OBJECTS: Mapping[str, Any] = {}
_SETTINGS = (bool, int, float, str, list, dict, set)
_DEPTH = 3  # levels of plain objects that are opened


def effects(
    module: nn.Module,
    arguments: Mapping[str, Any],
    known: Mapping[int, str] = _NOTHING,
    outer: Mapping[str, Any] = _NO_OBJECTS,
) -> dict[str, Any]:
    """Return all that a forward could change and a caller could see, each under a name for users.

    Where the values before and after a forward are equal, it had no side effects. module: the
    model. arguments: of its forward, by name; they may be written to as well. known: names of
    tensors by id that stand for the model's parameters although they are others. outer: objects in
    variables outside of the model, by name. The values of buffers are not looked at: a graph says
    what it writes to them.

    >>> "its attribute p" in effects(nn.Dropout(0.5), {})
    True
    """
    paths = dict(known)
    for tensors in (module.named_parameters(), module.named_buffers()):
        paths.update((id(tensor), path) for path, tensor in tensors)
    state: dict[str, Any] = {}
    for path, inner in module.named_modules():
        for name, value in vars(inner).items():
            if name not in MODULE_ATTRIBUTES:
                place = join_path(path, name)
                state[f"its attribute {place}"] = token_of(value, paths, depth=_DEPTH)
        state[f"the mode of {path or 'the model'} (train or eval)"] = inner.training
        # By their dicts: a tracer shows modules in the guise of others.
        state[f"the modules in {path or 'it'}"] = [
            (name, None if child is None else id(vars(child)))
            for name, child in inner._modules.items()
        ]
        for name in _HOOKS:
            hooks = vars(inner)[name]
            where = f"{name} of {path or 'the model'}"
            state[where] = [*hooks, *map(id, hooks.values())]
            kept = [token_of(item, paths, depth=_DEPTH) for item in _kept(hooks.values())]
            if kept:
                state[f"what is kept by the {where}"] = kept
        for kind in ("_parameters", "_buffers"):
            names = [(name, value is None) for name, value in vars(inner)[kind].items()]
            state[f"the names in {join_path(path, kind)}"] = names
    for name, value in outer.items():
        state[f"the variable {name}"] = token_of(value, paths, depth=_DEPTH)
    for cls in dict.fromkeys(type(inner) for inner in module.modules()):
        if not cls.__module__.startswith("torch."):
            settings = {n: v for n, v in vars(cls).items() if isinstance(v, _SETTINGS)}
            state[f"class attributes of {cls.__name__}"] = token_of(settings, paths)
    return {**state, **written_arguments(arguments, paths)}


def written_arguments(
    arguments: Mapping[str, Any], paths: Mapping[int, str] = _NOTHING
) -> dict[str, Any]:
    """Return what a forward could change of its arguments, each under a name for users.

    arguments: by name. paths: see token_of.

    >>> written_arguments({"cache": []})
    {'its argument cache (a list)': (<class 'list'>,)}
    """
    return {
        f"its argument {name} (a {type(value).__name__})": token_of(
            value, dict(paths), depth=_DEPTH
        )
        for name, value in arguments.items()
    }


def _kept(functions: Iterable[Any]) -> Iterator[Any]:
    """Yield the objects that functions know of and may write to, such as a list in a closure."""
    for function in functions:
        if isinstance(function, functools.partial):
            yield from (*function.args, *function.keywords.values())
            function = function.func
        if isinstance(function, types.MethodType):
            yield function.__self__
            function = function.__func__
        for cell in getattr(function, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # an empty cell
                yield cell.cell_contents
        if isinstance(function, types.FunctionType):
            yield from (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        else:
            yield function


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of all that is not as it was, new and missing things among them.

    >>> changed({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4})
    ('b', 'c')
    """
    return tuple(name for name in {**before, **after} if before.get(name) != after.get(name))


def moving(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of what is not as it was, where a tensor may be another in the same place.

    A forward that remembers tensors in attributes, or in lists and objects there, does not change
    in this sense: the program returns them, and they are put there again. Nothing puts them
    anywhere else, such as into what a hook keeps. before, after: as `effects` returns them.

    >>> moving({"its attribute a": ("tensor", 11, 0)}, {"its attribute a": ("tensor", 12, 0)})
    ()
    >>> moving({"the variable a": ("tensor", 11, 0)}, {"the variable a": ("tensor", 12, 0)})
    ('the variable a',)
    """
    return tuple(
        name
        for name in changed(before, after)
        if not name.startswith("its attribute ")
        or _places(before.get(name)) != _places(after.get(name))
    )


def _places(token: Any) -> Any:
    """Return the token with all tensors made alike that the model does not know."""
    if not isinstance(token, (tuple, list)):
        return token
    if len(token) == 3 and token[0] == "tensor":
        return "tensor"
    return tuple(map(_places, token))


def refuse_effects(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Raise CaptureError, naming all that has changed, as a graph would not change it again.

    before, after: as `effects` returns them. Example: `refuse_effects(before, effects(model, {}))`.
    """
    names = changed(before, after)
    if names:
        raise CaptureError(
            f"the forward writes to {', '.join(names)}",
            why="a graph returns values; what it leaves behind in Python objects is lost",
            fix="return the new value instead (for a cache: use_cache=False)",
        )


def refuse_backward_hooks(model: nn.Module) -> None:
    """Raise CaptureError for a submodule with hooks on its backward pass.

    They run around the call of the module, and a graph has no calls of modules. The model's own
    hooks are no matter: they run around its program.

    Example: `refuse_backward_hooks(nn.Linear(2, 3))` returns.
    """
    for path, module in model.named_modules():
        if path and (module._backward_hooks or module._backward_pre_hooks):
            raise CaptureError(
                f"{path} has a hook on its backward pass",
                where=path,
                why="it runs around the call of the module, which a graph does not have",
                fix="remove the hook before the model is split; else what calls the module stays "
                "Python",
            )


class NoReplacing(Watch):
    """Refuses what a tracer does not see: writes of memory and of training, and hooks.

    `tensor.data = value` gives a tensor other memory, and `requires_grad` decides whether it is
    trained. A hook on a tensor would be lost with the tensor of the trace. model: its parameters
    must stay where they are and go on being trained as they are. walks: whether the forward may go
    from node to node in what autograd has recorded. failure: the first refusal of a hook,
    remembered as the model may catch it.
    """

    failure: AutoParallelError | None = None

    def __init__(self, model: nn.Module, walks: bool = False) -> None:
        self.walks = walks
        named = model.named_parameters(remove_duplicate=False)
        self.names = {id(parameter): path for path, parameter in named}

    def assigned(self, tensor: torch.Tensor, value: Any) -> bool:
        """Raise CaptureError: the forward has assigned to `tensor.data`."""
        name = self.names.get(id(tensor))
        raise CaptureError(
            "the forward gives other memory to "
            + (f"parameter {name}" if name else "a tensor")
            + " (tensor.data = value)",
            why="a graph returns values, and its parameters stay where they are",
            fix="write the values in place: under torch.no_grad, tensor.copy_(value)",
        )

    def hooked(self, tensor: torch.Tensor, name: str) -> None:
        """Raise CaptureError: a gradient inside of the model is to be seen, or changed.

        Raises AutoParallelError where Python would not be right either.
        """
        if name == "grad_fn" and self.walks:
            self.failure = self.failure or AutoParallelError(
                "the forward walks through what autograd has recorded (grad_fn.next_functions)",
                why="of a split module this is another graph, with other nodes: its parts are one "
                "node each, and whole parameters are gathered from parts",
                fix="walk through it outside of the model, before it is split",
            )
            raise self.failure
        self.failure = self.failure or CaptureError(
            f"the forward reaches into the backward pass ({name})",
            why="a hook is given the gradient of a tensor of this one run; a graph has no such "
            "tensors",
            fix="change gradients by a torch.autograd.Function, whose backward is kept",
        )
        raise self.failure

    def trained(self, tensor: torch.Tensor, value: bool) -> None:
        """Raise CaptureError where the forward changes whether a parameter is trained."""
        name = self.names.get(id(tensor))
        if name is not None and tensor.requires_grad != value:
            raise CaptureError(
                f"the forward sets requires_grad of parameter {name}",
                why="what is trained is planned before the model runs",
                fix="set it before the model is split",
            )
