"""Tensors of a model that its forward reaches otherwise than as attributes of its modules.

A forward may read a parameter from a list, by a bound method of an inner module, or from an object
that a module keeps. While torch.export runs, modules have stand-ins in the place of their tensors,
but such a reader gets the tensor itself, and the tracer takes it for a constant. The parameter
would then stay as it was when the model was planned. Here the stand-in is put in its place, or the
model is refused.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from autoparallel.capture.block_folding import Folding
from autoparallel.capture.module_tensors import MODULE_ATTRIBUTES, named_tensors
from autoparallel.errors import AliasError, AutoParallelError, CaptureError
from autoparallel.support.memory_writes import memory_of
from autoparallel.support.module_copy import DEEPEST, originals
from autoparallel.support.module_paths import join_path
from autoparallel.support.torch_private import in_function_transform

__all__ = ["HeldTensors", "held_among", "refuse_views"]

_DEEPEST = 6  # containers and objects inside of others that are looked into
_PLAIN = (torch.Tensor, nn.Parameter)
# Names of attributes and methods that tell nothing of a tensor's values and return no tensor.
_METADATA = frozenset(
    "shape dtype device layout ndim requires_grad is_leaf is_meta names size dim numel stride "
    "storage_offset is_floating_point is_complex is_contiguous element_size nbytes itemsize "
    "__len__ __hash__ _version".split()
)


class HeldTensors(TorchFunctionMode):
    """A mode under which each function gets the model's tensors as the tracer has them.

    A parameter or buffer of `model` that is reached past its module is replaced by the stand-in
    that its module has at the time. folding: the blocks that are hidden, whose stand-ins nobody
    has. around: the model that `model` is a part of, whose other tensors the graph of the part
    cannot read; `model` itself if left out.

    places: (path, module, kind) of each of the model's tensors, by id. paths: the path of the
    tensor that owns a memory, by the memory's key. outside: paths of tensors of `around` that are
    none of `model`, by id. failure: the first error raised here, remembered as the model may catch
    it.
    """

    def __init__(self, model: nn.Module, folding: Folding, around: nn.Module | None = None) -> None:
        super().__init__()
        self.folding = folding
        self.failure: AutoParallelError | None = None
        self.places: dict[int, list[tuple[str, nn.Module, str]]] = {}
        self.paths: dict[int, str] = {}
        self.outside: dict[int, str] = {}
        self.tensors: list[torch.Tensor] = []  # kept, so that their ids stay theirs
        root = model if around is None else around
        for path, _, _, tensor in named_tensors(root):
            self.remember(path, tensor)  # by the name that the user knows
        module_paths: dict[int, str] = {}
        for path, module, kind, tensor in named_tensors(model):
            module_paths[id(module)] = path.rpartition(".")[0]
            self.places.setdefault(id(tensor), []).append((path, module, kind))
        # Where modules are copies of the user's, other objects still refer to the tensors that the
        # user's modules had: those stand for the copies' own.
        for tensor, module, path, name in originals(root):
            full = join_path(path, name)
            self.remember(full, tensor)
            if id(module) in module_paths:
                inner = join_path(module_paths[id(module)], name)
                kind = "parameter" if name in module._parameters else "buffer"
                self.places.setdefault(id(tensor), []).append((inner, module, kind))
            else:
                self.outside[id(tensor)] = full
        for path, _, _, tensor in named_tensors(root):
            if id(tensor) not in self.places:
                self.outside[id(tensor)] = path

    def remember(self, path: str, tensor: torch.Tensor) -> None:
        """Note that the memory of a tensor belongs to the one at `path`, the first to come."""
        self.tensors.append(tensor)
        key = memory_of(tensor)
        if key is not None:
            self.paths.setdefault(key, path)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # Most calls have none of the model's tensors: these are told quickly.
        if any(map(self.concerns, args)) or any(map(self.concerns, kwargs.values())):
            name = getattr(function, "__name__", "")
            # An attribute such as `shape` is read by the `__get__` of its descriptor.
            if name == "__get__":
                name = getattr(function.__self__, "__name__", "")
            if name not in _METADATA:
                args = tuple(map(self.placed, args))
                kwargs = {key: self.placed(value) for key, value in kwargs.items()}
        return function(*args, **kwargs)

    def concerns(self, item: Any) -> bool:
        """Return whether an argument is, or holds, a tensor that was there before the trace.

        The tracer's own tensors are of other types than plain tensors and parameters.
        """
        if type(item) in _PLAIN or id(item) in self.places:
            return isinstance(item, torch.Tensor)
        if isinstance(item, (list, tuple)):
            return any(map(self.concerns, item))
        return isinstance(item, dict) and any(map(self.concerns, item.values()))

    def placed(self, item: Any) -> Any:
        """Return an argument with the model's tensors in it as the tracer has them."""
        if not self.concerns(item):
            return item
        if isinstance(item, torch.Tensor):
            return self.tensor(item)
        if isinstance(item, dict):
            return {key: self.placed(value) for key, value in item.items()}
        parts = [self.placed(part) for part in item]
        return type(item)(*parts) if hasattr(item, "_fields") else type(item)(parts)

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor as the tracer has it.

        Raises Unfoldable where it is in a hidden block, and CaptureError or AliasError where it is
        none of the model's and no constant either.
        """
        for path, module, kind in self.places.get(id(tensor), ()):
            block = self.folding.block_of(path)
            if block is None:
                tensors = vars(module)["_parameters" if kind == "parameter" else "_buffers"]
                stand_in: torch.Tensor = tensors[path.rpartition(".")[2]]
                return stand_in
        if id(tensor) in self.places:
            path = self.places[id(tensor)][0][0]
            raise self.folding.entered(f"the model reads {path} past its block", path)
        error = self.refusal(tensor)
        if error is not None:
            self.failure = self.failure or error
            raise error
        return tensor

    def owns(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor lies in the memory of a parameter or buffer."""
        return (memory_of(tensor) or 0) in self.paths

    def refusal(self, tensor: torch.Tensor) -> AutoParallelError | None:
        """Return why a program must not have this tensor as a constant; None where it may.

        tensor: none of the model's own parameters and buffers.
        """
        if id(tensor) in self.outside:
            return CaptureError(
                f"the forward reads {self.outside[id(tensor)]}, which belongs to another module",
                why="the graph of a part reads the parameters and buffers of that part",
                fix="pass it to the forward, or assign it as an attribute of a module in the part",
            )
        path = self.paths.get(memory_of(tensor) or 0)
        if path is not None:
            return view_error(path)
        if in_function_transform():
            return CaptureError(
                "the forward computes under a transform of torch.func that is not traced (vjp, "
                "linearize, jacrev of a whole batch)",
                why="the tensors there are wrapped, and the tracer does not see what becomes of "
                "them",
                fix="use torch.func.grad, vmap or jvp, which are traced, or keep it in a submodule "
                "of its own, which then stays Python",
            )
        if tensor.requires_grad:
            return CaptureError(
                f"the forward reads a tensor of shape {list(tensor.shape)} that requires a "
                "gradient and is no parameter of the model",
                why="its gradient would be lost: only registered parameters are split and trained",
                fix="assign it as an nn.Parameter of a module (in an nn.ParameterList if there are "
                "several), or call requires_grad_(False)",
            )
        return None


def held_among(model: nn.Module, tensors: Sequence[torch.Tensor]) -> tuple[tuple[int, str], ...]:
    """Return (number, path) of the tensors that a model holds itself, in attributes as well.

    Raises CaptureError for a view of a buffer: who gets it may write to the buffer.

    >>> norm = nn.BatchNorm1d(2)
    >>> held_among(norm, [torch.ones(2), norm.running_mean])
    ((1, 'running_mean'),)
    """
    paths: dict[int, str] = {}
    memories: dict[int, str] = {}
    for module_path, module in model.named_modules():
        others = {name: value for name, value in vars(module).items() if type(value) in _PLAIN}
        for name, tensor in {**module._parameters, **module._buffers, **others}.items():
            if tensor is not None:
                paths.setdefault(id(tensor), join_path(module_path, name))
                memory = memory_of(tensor) if name not in module._parameters else None
                if memory is not None:
                    memories.setdefault(memory, join_path(module_path, name))
    for tensor in tensors:
        path = memories.get(memory_of(tensor) or 0)
        if path is not None and id(tensor) not in paths and tensor.numel():
            raise CaptureError(
                f"the forward returns a view of {path}",
                why="whoever gets it may write to it, and a graph returns tensors of its own",
                fix=f"return a copy of it ({path}[...].clone()), or {path} itself",
            )
    return tuple((n, paths[id(t)]) for n, t in enumerate(tensors) if id(t) in paths)


def view_error(path: str, where: str = "") -> AliasError:
    """Return the error for a view of the parameter or buffer at `path` from before the forward.

    where: the attribute that keeps the view, if it is known.
    """
    return AliasError(
        f"the forward reads a tensor that shares the memory of {path} and is not {path} itself",
        where=where,
        why="it was made before the forward (a slice, .detach(), .data, a transpose) and kept; in "
        f"the split module it would stay as {path} is now",
        fix=f"make it from {path} inside of the forward, each time",
    )


def refuse_views(model: nn.Module, paths: list[str]) -> None:
    """Raise AliasError where modules that run as plain Python keep tensors that would not follow.

    model: the user's. paths: of the modules in it that stay Python. The parameters that their
    attributes refer to, directly and in containers, are replaced while they run; views of them, and
    what other objects keep, are not. The same goes for modules that such objects keep.

    Example: `refuse_views(model, ["encoder"])`.
    """
    ids: dict[int, str] = {}
    storages: dict[int, str] = {}
    for path, _, _, tensor in named_tensors(model):
        ids.setdefault(id(tensor), path)
        key = memory_of(tensor)
        if key is not None:
            storages.setdefault(key, path)
    for path in paths:
        for name, value in vars(model.get_submodule(path)).items():
            if name in MODULE_ATTRIBUTES:
                continue
            place = join_path(path, name)
            for tensor, replaced in _reached(value, 0, {}):
                if id(tensor) not in ids and (memory_of(tensor) or 0) in storages:
                    raise view_error(storages[memory_of(tensor) or 0], place)
                if id(tensor) in ids and not replaced:
                    owner = ids[id(tensor)]
                    raise AliasError(
                        f"an object that {place} refers to keeps {owner}",
                        where=place,
                        why="the module stays Python, and such an object keeps the tensor of the "
                        "model as it is now",
                        fix=f"refer to {owner} from an attribute of the module, a list or a dict",
                    )


def _reached(
    value: Any, depth: int, above: Mapping[int, None], replaced: bool = True
) -> Iterator[tuple[torch.Tensor, bool]]:
    """Yield (tensor, whether it is replaced) for the tensors that an attribute leads to.

    value: of the attribute. depth: levels of containers and objects above it. above: ids of those.
    replaced: whether all of them are such that `referring` (support/module_copy.py) looks into
    them. Modules of the model are not entered, as they are replaced themselves; those that other
    objects keep are.
    """
    if isinstance(value, torch.Tensor):
        yield value, replaced
        return
    if isinstance(value, nn.Module) and not replaced:
        yield from ((tensor, False) for _, _, _, tensor in named_tensors(value))
    if depth > _DEEPEST or id(value) in above or isinstance(value, (nn.Module, type)):
        return
    # These are the types that `referring` looks into.
    known = type(value) in (list, tuple) or isinstance(
        value, (dict, types.MethodType, functools.partial)
    )
    replaced = replaced and known and depth <= DEEPEST
    inner = functools.partial(_reached, depth=depth + 1, above={**above, id(value): None})
    parts: list[Any] = []
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = list(value)
    elif isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, types.MethodType):
        parts = [value.__self__]
    elif isinstance(value, functools.partial):
        parts = [value.func, value.args, value.keywords]
    elif hasattr(value, "__dict__") and not isinstance(
        value, (types.ModuleType, types.FunctionType)
    ):
        parts = list(vars(value).values())
    for part in parts:
        yield from inner(part, replaced=replaced)
