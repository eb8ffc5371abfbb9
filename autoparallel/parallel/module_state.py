"""What a parallel module knows: how its parameters are kept, and its programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autoparallel.errors import AutoParallelError
from autoparallel.graph.captured import Captured, Modes
from autoparallel.parallel.inner_hooks import InnerHooks
from autoparallel.parallel.parameters import GatheredCopy, LocalParameter, ParameterLayouts
from autoparallel.parallel.seeds import generator_of
from autoparallel.parallel.uncaptured_python import WholeParameters
from autoparallel.placement import Layout
from autoparallel.plan import Plan
from autoparallel.rewrite.emit import Program
from autoparallel.runtime import rng
from autoparallel.runtime.ranks import Ranks
from autoparallel.support.pytree import Skeleton

__all__ = ["Entry", "Replan", "State", "Tree", "state_of"]

# From the model on the meta device, the path of a module in it, its inputs, how its parameters are
# stored and whether Python calls it, to a plan. Raises CaptureError where it cannot be traced.
Replan = Callable[
    [nn.Module, str, tuple[Any, ...], Mapping[str, Any], Mapping[str, Layout], bool], Plan
]


@dataclass
class Entry:
    """A program and what its inputs must look like.

    known: whether it is right for inputs of some shapes, types and need of gradients, as found out
    so far: to ask the guards takes long, and most calls are like one before.
    """

    plan: Plan
    captured: Captured
    program: Program
    leaves: list[LocalParameter]
    shapes: list[tuple[Any, ...]]
    known: dict[tuple[Any, ...], bool] = field(default_factory=dict)

    def fits(self, inputs: list[torch.Tensor]) -> bool:
        """Whether the program is right for these inputs; see `Captured.fits`."""
        key = tuple([(tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in inputs])
        if key not in self.known:
            self.known[key] = self.captured.fits(inputs)
        return self.known[key]


@dataclass
class Tree:
    """What all split modules of one model share.

    root: the model. skeleton: the same on the meta device. whole: the parameters as Python reads
    them. copies: what computes in place of parameters, by the parameters' ids. depth: how many
    Python forwards are at work.
    """

    root: nn.Module
    skeleton: nn.Module
    ranks: Ranks
    mesh: DeviceMesh | None
    replan: Replan
    strict: bool
    whole: WholeParameters
    copies: Mapping[int, GatheredCopy]
    depth: int = 0


@dataclass
class State:
    """Everything that the parallel module adds to the user's.

    path: in the model. skeleton: the original on the meta device, to trace other modes and inputs.
    kept: how its parameters are kept, by path. checks: calls left that compare the ranks' inputs.
    entries: programs by (modes, structure of the inputs). python: modes in which the module cannot
    be traced, and stays the user's Python. full: no more programs are made. own: the user's
    forward. plan: that decided how parameters are stored. members: the module and all in it.
    hooks: those inside of it, which programs leave out.
    """

    path: str
    tree: Tree
    skeleton: nn.Module
    kept: dict[str, ParameterLayouts]
    checks: int
    own: Callable[..., Any]
    plan: Plan | None
    entries: dict[tuple[Modes, Skeleton], list[Entry]] = field(default_factory=dict)
    python: set[Modes] = field(default_factory=set)
    full: bool = False
    settled: bool = False
    members: tuple[nn.Module, ...] = ()
    hooks: InnerHooks | None = None

    @property
    def ranks(self) -> Ranks:
        """The ranks."""
        return self.tree.ranks

    @property
    def storage(self) -> dict[str, Layout]:
        """How the parameters lie that compute, by path."""
        return {path: kept.storage for path, kept in self.kept.items()}

    @property
    def layouts(self) -> dict[str, Layout]:
        """How the parameters lie that the user sees, by path."""
        return {path: kept.state for path, kept in self.kept.items()}

    @property
    def mesh(self) -> DeviceMesh | None:
        """The ranks as DTensor has them."""
        return self.tree.mesh

    @property
    def generator(self) -> rng.Generator:
        """Where random numbers come from."""
        return generator_of(self.tree.root)


def state_of(module: nn.Module) -> State:
    """The state of a parallel module. Raises AutoParallelError for any other module."""
    found = module.__dict__.get("_autoparallel")
    if not isinstance(found, State):
        raise AutoParallelError(
            f"{type(module).__name__} is no parallel module",
            why="it was not made by autoparallelize() or apply_plan(), or is a part of such",
            fix="pass the parallel module itself",
        )
    return found
