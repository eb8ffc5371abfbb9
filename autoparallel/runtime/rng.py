"""Random ops that do not depend on the plan.

Every element draws from a counter-based generator keyed by (seed, step, op, its index in the
whole tensor), so that a mask is the same bit for bit however the tensor is split.
"""

from __future__ import annotations

import threading
import zlib
from dataclasses import dataclass

import torch

from autoparallel.placement import Invariant, Partial, Placement, Shard
from autoparallel.runtime.collectives import take_part
from autoparallel.runtime.groups import Group

__all__ = ["Generator", "dropout", "generator", "op_key", "using"]

_MASK = 0xFFFFFFFF


@dataclass
class Generator:
    """seed: of the run. step: forward passes so far. Both belong into a checkpoint."""

    seed: int = 0
    step: int = 0

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint must hold."""
        return {"seed": self.seed, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where the checkpoint was."""
        self.seed, self.step = state["seed"], state["step"]


_current = threading.local()


class using:  # noqa: N801
    """Context in which random ops draw from `generator`."""

    def __init__(self, source: Generator) -> None:
        self.source = source

    def __enter__(self) -> None:
        self.before = getattr(_current, "generator", None)
        _current.generator = self.source

    def __exit__(self, *_: object) -> None:
        _current.generator = self.before


def generator() -> Generator:
    """The generator in use; one with seed 0 outside any module."""
    found = getattr(_current, "generator", None)
    return found if found is not None else Generator()


def op_key(name: str) -> int:
    """A 32-bit key of an op, the same in every process."""
    return zlib.crc32(name.encode())


def _mixed(bits: torch.Tensor) -> torch.Tensor:
    """32 well-mixed bits of 32 (Wellons' lowbias32), in the low half of int64."""
    bits = bits ^ (bits >> 16)
    bits = (bits * 0x7FEB352D) & _MASK
    bits = bits ^ (bits >> 15)
    bits = (bits * 0x846CA68B) & _MASK
    return bits ^ (bits >> 16)


def uniform(
    shape: tuple[int, ...],
    key: int,
    placement: Placement,
    group: Group,
    device: torch.device,
    source: Generator,
) -> torch.Tensor:
    """Uniform numbers in [0, 1) for the local part of a tensor of `shape`, float32.

    Element i of the whole draws from mixed(mixed(low half of i + key) + high half + seed, step).
    """
    index = torch.zeros((), dtype=torch.int64, device=device)
    stride = 1
    for dim in reversed(range(len(shape))):
        place = torch.arange(shape[dim], device=device)
        if isinstance(placement, Shard) and placement.dim == dim:
            shard = Shard(0, placement.blocks, placement.unit)
            place = take_part(place, shard, group.world_size, group.rank)
        index = index + (place * stride).reshape(-1, *[1] * (len(shape) - 1 - dim))
        stride *= shape[dim]
    salt = (source.seed * 0x9E3779B1 + source.step * 0x85EBCA6B + key) & _MASK
    bits = _mixed(((index & _MASK) + salt) & _MASK)
    if stride > _MASK:
        bits = _mixed((bits + (index >> 32)) & _MASK)
    bits = _mixed((bits + (salt ^ 0x27D4EB2F)) & _MASK)
    return (bits >> 8).to(torch.float32) * (1.0 / (1 << 24))


def dropout(
    x: torch.Tensor,
    probability: float,
    train: bool,
    *,
    key: int,
    shape: tuple[int, ...],
    placement: Placement,
    group: Group,
) -> torch.Tensor:
    """x with each element zeroed with `probability`, the others scaled by 1 / (1 - probability).

    shape: of the whole. placement: of x; every rank of a whole or pending sum draws alike.
    """
    if not train or probability == 0:
        return x
    if probability == 1:
        return x * 0
    whole: Placement = placement if isinstance(placement, (Shard, Partial)) else Invariant()
    with torch.no_grad():
        drawn = uniform(shape, key, whole, group, x.device, generator())
        kept = (drawn >= probability).to(x.dtype) / (1 - probability)
    return x * kept
