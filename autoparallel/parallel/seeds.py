"""The seed and the step of a module's random numbers: set them, read them, put them back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autoparallel.errors import AutoParallelError
from autoparallel.runtime.ranks import Ranks
from autoparallel.runtime.rng import Generator
from autoparallel.support.arguments import require_kind

__all__ = ["generator_of", "give_generator", "manual_seed", "rng_state", "set_rng_state"]


def manual_seed(module: nn.Module, seed: int) -> None:
    """Seed a parallel module's random numbers and begin at step 0; the same seed on every rank.

    A module that was never seeded takes rank 0's `torch.initial_seed()`, which is what
    torch.manual_seed() was last called with, at the time when it is made.
    Raises AutoParallelError for any other module, and for a seed that is no whole number.
    """
    require_kind(seed, int, "give a whole number: manual_seed(module, 0)")
    generator_of(module).load_state_dict({"seed": seed, "step": 0})


def rng_state(module: nn.Module) -> dict[str, int]:
    """Return all that a parallel module's random numbers depend on, for a checkpoint.

    seed: see manual_seed. step: how many calls so far drew random numbers; dropout in train mode
    does, a pass in eval mode mostly does not. The same on every rank.
    """
    return generator_of(module).state_dict()


def set_rng_state(module: nn.Module, state: Mapping[str, int]) -> None:
    """Go on where `rng_state` was taken; with rng="counter" at any number of ranks and any plan."""
    generator = generator_of(module)
    if not isinstance(state, Mapping) or not {"seed", "step"} <= set(state):
        raise AutoParallelError(
            f"{state!r} is no state of random numbers", fix="give what rng_state(module) returned"
        )
    generator.load_state_dict(dict(state))


def generator_of(module: nn.Module) -> Generator:
    """Return the generator of a parallel module. Raises AutoParallelError for other modules."""
    generator = module.__dict__.get("_generator")
    if not isinstance(generator, Generator):
        raise AutoParallelError(
            f"{type(module).__name__} has no random numbers of its own",
            why="it was not made by autoparallelize() or apply_plan()",
            fix="pass the parallel module itself, not a submodule; torch.manual_seed(seed) is for "
            "plain modules",
        )
    return generator


def give_generator(module: nn.Module, mode: str, ranks: Ranks, mesh: DeviceMesh | None) -> None:
    """Give a module a generator with the seed that rank 0's torch has.

    mode: the option rng, "counter" or "fast". mesh: None for a single process. A collective call
    for several ranks.
    """
    seed = torch.initial_seed()
    if mesh is not None:
        # Seeds have 64 bits without a sign, and torch's whole numbers have one: two halves fit.
        words = torch.tensor([seed >> 32, seed & 0xFFFFFFFF], device=mesh.device_type)
        high, low = ranks.world.all_gather(words)[0].tolist()
        seed = high << 32 | low
    module.__dict__["_generator"] = Generator(seed, mode=mode)
