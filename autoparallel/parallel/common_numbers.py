"""The user's own Python draws the same random numbers on all ranks of a split model."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch

from autoparallel.errors import AutoParallelError
from autoparallel.parallel.launch import communication_device
from autoparallel.runtime.groups import Group, ProcessGroup, SingleGroup
from autoparallel.runtime.rng import Generator
from autoparallel.support.rng_state import (
    python_numbers_sums,
    restore,
    seeded,
    snapshot,
    torch_generators,
)

__all__ = ["common_numbers"]


@contextlib.contextmanager
def common_numbers(generator: Generator, group: Group) -> Iterator[None]:
    """Have Python draw the same random numbers on all ranks: torch's by the generator's seed and
    step, Python's and numpy's from the user's own generator where it is in one state on all
    ranks of the group, else by seed and step, too. A collective call.

    The user's torch goes on afterwards where it was, but for the one number by which
    the generator recognizes a pass that is repeated. A part of a pass that is repeated (by
    checkpointing inside of the model) finds torch's generator as it was, and draws from it.
    """
    python, numpy = _are_alike(group)
    before = snapshot()
    generator.between_passes()
    try:
        step = generator.current_step()
    except AutoParallelError:
        restore(before)
        yield
        return
    # Seed and step are hashed, so that no two steps of any two seeds have one stream by design; 56
    # bits are a seed that torch takes.
    digest = hashlib.blake2b(f"{generator.seed} {step}".encode(), digest_size=7).digest()
    number = int.from_bytes(digest)
    left: list[tuple[torch.Generator, torch.Tensor]] = []
    with seeded(number, python=not python, numpy=not numpy):
        yield
        # A forward that seeds torch itself decides what is drawn after it.
        seeds = [item for item in torch_generators() if item.initial_seed() != number]
        left += [(item, item.get_state()) for item in seeds]
    for item, state in left:
        item.set_state(state)


def _are_alike(group: Group) -> tuple[bool, bool]:
    """Return whether Python's global generator, and numpy's, are in one state on all ranks.

    Ranks that are threads of one process have these generators in common.
    """
    if isinstance(group, SingleGroup):
        return True, True
    if not isinstance(group, ProcessGroup) or torch.compiler.is_compiling():
        return False, False
    sums = torch.tensor(python_numbers_sums(), device=communication_device())
    same = (group.all_gather(sums) == sums).all(dim=0).tolist()
    return same[0], same[1]
