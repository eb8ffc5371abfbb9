"""The ranks compare what must be the same on all of them: the model, its plan, and the inputs.

They exchange digests of a few numbers, in one all-gather: each rank sees all rows, so that all of
them raise the same error, and none is left waiting in a collective.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from autoparallel.capture.global_reads import OuterVariables
from autoparallel.errors import AutoParallelError, InputMismatchError
from autoparallel.parallel.launch import communication_device
from autoparallel.plan import Plan
from autoparallel.runtime.groups import Group, ProcessGroup
from autoparallel.support.module_paths import join_path
from autoparallel.support.object_state import random_state

__all__ = [
    "digest",
    "require_equal",
    "require_equal_weights",
    "require_same_parts",
    "require_same_plan",
    "require_same_start",
]

# Elements of a weight that are compared: every k-th, so that other seeds and other files show.
_SAMPLE = 1024


def require_same_start(model: nn.Module, group: Group) -> None:
    """Compare samples of all weights between the ranks; of a meta model, torch's random state.

    A collective call. group: all ranks; a single one has nothing to compare. Each rank cuts its
    part out of its own whole model, so that parts of different models would be put together.
    Raises AutoParallelError, on every rank, naming the tensors that differ.
    """
    if not isinstance(group, ProcessGroup):
        return
    names, sums = [], []
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_meta:
            flat = tensor.detach().flatten()
            names.append(path)
            sums.append(digest(flat[:: max(1, flat.numel() // _SAMPLE)]))
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        names.append("torch's random state")
        sums.append(digest(torch.get_rng_state()))
    for name, state in _random_states(model):
        names.append(name)
        sums.append(digest(torch.tensor(list(hashlib.sha256(repr(state).encode()).digest()))))
    if not sums:
        return
    # Weights may lie on another device than the one on which the group communicates.
    device = communication_device()
    different = _differing(torch.stack([each.to(device) for each in sums]), group)
    wrong = [name for name, bad in zip(names, different, strict=True) if bad]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise AutoParallelError(
            f"the ranks start from different models: {', '.join(wrong[:4])}{more}",
            where=f"rank {group.rank}, {type(model).__name__}",
            why="each rank keeps its part of the whole, and the wholes are not the same",
            fix="torch.manual_seed(seed) with one seed on every rank before the model is built, or "
            "load the same weights on every rank; give generators of its own one seed, too",
        )


def _random_states(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the name and the state of each random generator that the model keeps or draws from.

    Its Python runs on all ranks, which must draw the same numbers.
    """
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            drawn = random_state(value)
            if drawn is not None:
                yield join_path(path, name), drawn[0]
    for name, value in OuterVariables(model).objects.items():
        drawn = random_state(value)
        if drawn is not None:
            yield f"the variable {name}", drawn[0]


def require_same_plan(plan: Plan, group: Group) -> None:
    """Compare digests of the plans between the ranks. A collective call.

    Each rank makes the plan by itself. Raises AutoParallelError, on every rank, where the plans
    differ: their collectives would not match, and the job would hang.
    """
    if not isinstance(group, ProcessGroup):
        return
    if not _is_everywhere(plan, group):
        raise AutoParallelError(
            "the ranks have made different plans",
            where=f"rank {group.rank}, {plan.model}",
            why="the model, the example inputs, the options, the version of torch, or what was "
            "found out about ops without a rule (AUTOPARALLEL_CACHE) are not the same on all ranks",
            fix="make them the same; or make the plan once (make_plan, Plan.to_json) and let every "
            "rank apply it (Plan.from_json, apply_plan)",
        )


def require_same_parts(plan: Plan, group: Group) -> None:
    """Compare digests of the plan of a model in parts between the ranks. A collective call.

    The parts are found by running the example inputs, so that they depend on their values.
    Raises InputMismatchError, on every rank, where they differ.
    """
    if not _is_everywhere(plan, group):
        raise InputMismatchError(
            "the ranks have found different parts of the model that can be split",
            why="the path through the model depends on the values of the example inputs",
            fix="pass the same example_inputs on every rank",
        )


def require_equal(inputs: list[torch.Tensor], names: list[str], group: Group, model: str) -> None:
    """Compare digests of all inputs between the ranks. A collective call.

    inputs: the tensors of a call. names: the model's arguments, by which the error calls them where
    each is one tensor. model: the name of its class. Raises InputMismatchError, on every rank,
    naming the inputs that differ.
    """
    if not inputs:
        return
    different = _differing(torch.stack([digest(tensor) for tensor in inputs]), group)
    which = [index for index, bad in enumerate(different) if bad]
    if which:
        shown = ", ".join(names[i] if len(names) == len(inputs) else f"input {i}" for i in which)
        raise InputMismatchError(
            f"the ranks were given different inputs: {shown}",
            where=f"rank {group.rank}, call of {model}",
            why="all ranks of a tensor-parallel group work on one batch; the plan says that "
            "inputs are equal",
            fix="give every rank the same batch (seed the sampler alike), or switch the check "
            "off with check_inputs=0 where differences are meant",
        )


def require_equal_weights(weights: Mapping[str, torch.Tensor], group: Group, model: str) -> None:
    """Compare parameters that were put into a split model, by path. A collective call.

    model: the name of its class. Raises AutoParallelError, on every rank, naming those that differ.
    """
    digests = [digest(tensor) for tensor in weights.values()]
    different = _differing(torch.stack(digests), group)
    wrong = [path for path, bad in zip(weights, different, strict=True) if bad]
    if wrong:
        raise AutoParallelError(
            f"the ranks have put different parameters into a split model: {', '.join(wrong)}",
            where=f"rank {group.rank}, {model}",
            why="a parameter that comes after planning is whole on every rank, and the same",
            fix="torch.manual_seed(seed) with one seed on every rank before it is made",
        )


def _is_everywhere(plan: Plan, group: Group) -> bool:
    """Return whether all ranks of the group have this plan. A collective call."""
    hashed = hashlib.sha256(plan.to_json().encode()).digest()
    # Seven bytes are a whole number that fits torch's int64, which has a sign.
    words = [int.from_bytes(hashed[start : start + 7]) for start in range(0, 28, 7)]
    rows = group.all_gather(torch.tensor(words, device=communication_device()))
    return bool((rows == rows[0]).all())


def _differing(digests: torch.Tensor, group: Group) -> list[bool]:
    """Return for each tensor whether its digest is another one on some rank. A collective call.

    digests: (number of tensors, 3), on the device on which the group communicates.
    """
    rows = group.all_gather(digests.contiguous())
    # The rows are (ranks, tensors, 3). Two NaNs are no difference.
    same = (rows == rows[0]) | (rows.isnan() & rows[0].isnan())
    different: list[bool] = (~same.all(-1).all(0)).tolist()
    return different


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """Return three numbers, float64, that tell tensors apart: of shape, sum, and weighted sum.

    The weights are the fractions of multiples of 0.618, near the golden ratio, which are spread
    evenly over 0 to 1 and repeat after 500 elements: most swaps of elements change that sum.

    >>> digest(torch.tensor([1.0, 2.0])).equal(digest(torch.tensor([2.0, 1.0])))
    False
    """
    if tensor.is_meta:
        return torch.tensor([float(tensor.ndim), float(tensor.numel()), 0.0]).to(torch.float64)
    if tensor.is_nested:
        jagged: Any = tensor
        return digest(jagged.values()) + digest(jagged.offsets())
    if tensor.layout is not torch.strided:
        # The order of entries is that of places; a matrix of fewer entries has another digest.
        entries = tensor.detach().to_sparse_coo().coalesce()
        return digest(entries.values()) + digest(entries.indices())
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    flat = real.detach().reshape(-1).to(torch.float64)
    place = torch.arange(flat.numel(), device=flat.device, dtype=torch.float64)
    sizes = float(sum(size * 31**index for index, size in enumerate(tensor.shape)))
    return torch.stack([flat.new_tensor(sizes), flat.sum(), (flat * ((place * 0.618) % 1)).sum()])
