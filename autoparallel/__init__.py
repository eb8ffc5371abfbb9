"""Splits any PyTorch model over devices by itself.

    model = autoparallel.autoparallelize(model, world_size)

Names are imported when they are first used, so that `import autoparallel` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoparallel.api import apply_plan, autoparallelize, make_plan, simulate
    from autoparallel.errors import AutoParallelError
    from autoparallel.mesh import Mesh
    from autoparallel.placement import Invariant, Partial, Replicate, Shard
    from autoparallel.plan import Plan
    from autoparallel.runtime.checkpoint import load_checkpoint, save_checkpoint
    from autoparallel.runtime.module import full_state_dict
    from autoparallel.runtime.seeds import manual_seed, rng_state, set_rng_state
    from autoparallel.view.dot import write_svg
    from autoparallel.view.report import print_plan

_HOMES = {
    "apply_plan": "api",
    "autoparallelize": "api",
    "make_plan": "api",
    "simulate": "api",
    "AutoParallelError": "errors",
    "Mesh": "mesh",
    "Invariant": "placement",
    "Partial": "placement",
    "Replicate": "placement",
    "Shard": "placement",
    "Plan": "plan",
    "full_state_dict": "runtime.module",
    "load_checkpoint": "runtime.checkpoint",
    "manual_seed": "runtime.seeds",
    "rng_state": "runtime.seeds",
    "save_checkpoint": "runtime.checkpoint",
    "set_rng_state": "runtime.seeds",
    "print_plan": "view.report",
    "write_svg": "view.dot",
}

__all__ = [
    "AutoParallelError",
    "Invariant",
    "Mesh",
    "Partial",
    "Plan",
    "Replicate",
    "Shard",
    "apply_plan",
    "autoparallelize",
    "full_state_dict",
    "load_checkpoint",
    "make_plan",
    "manual_seed",
    "print_plan",
    "rng_state",
    "save_checkpoint",
    "set_rng_state",
    "simulate",
    "write_svg",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
