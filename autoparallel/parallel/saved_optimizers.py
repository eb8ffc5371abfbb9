"""The state of optimizers by the names of the module's parameters, and what they are known by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from autoparallel.errors import AutoParallelError

__all__ = [
    "Optimizers",
    "as_optimizers",
    "describe",
    "entries_of",
    "require_same_optimizers",
    "without_absent",
]

# The optimizers of one module; each parameter belongs to one of them at most.
Optimizers = tuple[torch.optim.Optimizer, ...]


def as_optimizers(
    given: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None,
) -> Optimizers:
    """Return the optimizers that a caller gave: none, one or several.

    Raises AutoParallelError for anything else.
    """
    optimizers = (given,) if isinstance(given, torch.optim.Optimizer) else tuple(given or ())
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise AutoParallelError(
                f"{type(optimizer).__name__} is no optimizer",
                fix="pass a torch.optim.Optimizer, or a list of them",
            )
    return optimizers


def describe(module: nn.Module, optimizers: Optimizers) -> list[dict[str, Any]]:
    """Return the class of each optimizer, and the names of the parameters in each of its groups.

    Raises AutoParallelError for a parameter that is not the module's, or that two optimizers have:
    the state of these has no name of its own.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    taken: set[int] = set()
    described = []
    for optimizer in optimizers:
        groups = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in names:
                    raise AutoParallelError(
                        f"{type(optimizer).__name__} has a parameter that is not the module's, "
                        f"of shape {tuple(parameter.shape)}",
                        why="its state would be saved under the name that the module has for it",
                        fix="make the optimizer after the module is split, from its parameters, "
                        "and save what else is trained with torch.save",
                    )
                if id(parameter) in taken:
                    raise AutoParallelError(
                        f"two optimizers have the parameter {names[id(parameter)]}",
                        why="the state of each parameter is saved once",
                        fix="save one of the optimizers with torch.save",
                    )
                taken.add(id(parameter))
            groups.append([names[id(parameter)] for parameter in group["params"]])
        described.append({"class": type(optimizer).__qualname__, "groups": groups})
    return described


def entries_of(
    module: nn.Module, optimizers: Optimizers
) -> Iterator[tuple[str, dict[Any, Any], Any]]:
    """Yield the name of each value of the optimizers' state, the dict that holds it, and its key
    there.

    Raises AutoParallelError for tensors inside of lists and the like, as LBFGS has them: nothing
    says which part of which parameter they are.
    """
    for path, parameter in module.named_parameters():
        for optimizer in optimizers:
            entries = optimizer.state.get(parameter, {})
            for key, value in entries.items():
                if not isinstance(value, torch.Tensor) and _has_tensors(value):
                    raise AutoParallelError(
                        f"the state of {type(optimizer).__name__} cannot be saved in parts",
                        where=f"{path}: {key}",
                        why=f"it has tensors in a {type(value).__name__}, and nothing says how "
                        "these lie on the ranks",
                        fix="leave the optimizer out of the checkpoint, and begin it anew",
                    )
                yield f"{path}.{key}", entries, key


@contextmanager
def without_absent(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[None]:
    """Take from optimizers, for a while, the parameters that the ranks of other stages hold.

    A state is made of all that an optimizer has, and these have none here.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    before = [group["params"] for group in groups]
    try:
        for group in groups:
            group["params"] = [item for item in group["params"] if not item.is_meta]
        yield
    finally:
        for group, parameters in zip(groups, before, strict=True):
            group["params"] = parameters


def _has_tensors(value: Any) -> bool:
    """Return whether there is a tensor in nested lists, tuples, sets and dicts."""
    if isinstance(value, Mapping):
        return any(map(_has_tensors, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(map(_has_tensors, value))
    return isinstance(value, torch.Tensor)


def require_same_optimizers(
    saved: Sequence[Mapping[str, Any]], described: Sequence[Mapping[str, Any]], folder: object
) -> None:
    """Raise AutoParallelError unless the optimizers are of the classes and groups that were saved.

    saved, described: as `describe` returns them.
    """
    wrong = []
    classes = [entry["class"] for entry in saved], [entry["class"] for entry in described]
    if classes[0] != classes[1]:
        wrong.append(
            f"it was saved from {' and '.join(classes[0])}, not {' and '.join(classes[1])}"
        )
    else:
        for entry, own in zip(saved, described, strict=True):
            name, counts = own["class"], (len(entry["groups"]), len(own["groups"]))
            if counts[0] != counts[1]:
                wrong.append(
                    f"{name} has {counts[1]} groups of parameters, and had {counts[0]} when it "
                    "was saved"
                )
                continue
            pairs = zip(entry["groups"], own["groups"], strict=True)
            for number, (names, other_names) in enumerate(pairs):
                differing = sorted(set(names) ^ set(other_names))
                if differing:
                    wrong.append(
                        f"group {number} of {name} has other parameters: {', '.join(differing[:4])}"
                        + (", ..." if len(differing) > 4 else "")
                    )
    if wrong:
        raise AutoParallelError(
            f"the checkpoint in {folder} is of another optimizer",
            why="; ".join(wrong),
            fix="make the optimizer as it was made when the checkpoint was saved, or load without "
            "one to begin it anew",
        )
