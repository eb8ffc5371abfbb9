"""Plans of a running model's modules for other modes and inputs than its plan is for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from autoparallel.capture.branch_ways import Ways
from autoparallel.capture.equal_modules import EqualModules
from autoparallel.capture.graph_breaks import trace_alike
from autoparallel.errors import CaptureError, PlanError
from autoparallel.graph.captured import Surroundings
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.placement import Layout
from autoparallel.plan import Plan
from autoparallel.planning.pipelines import is_pipeline, pipeline_plan
from autoparallel.planning.search import search
from autoparallel.planning.whole_trace import trace_whole
from autoparallel.rules.lookup import find_rule
from autoparallel.support.one_at_a_time import planning
from autoparallel.support.pytree import flatten

__all__ = ["Replanner"]


class Replanner:
    """Plans modules of a running model for other modes and inputs. Equal modules share a plan.

    model: the name that plans give the model. mesh, options: those of the model's first plan.
    holders: on a mesh with stages, those that have each parameter, by path.
    """

    def __init__(
        self,
        model: str,
        mesh: Mesh,
        options: Options,
        holders: Mapping[str, Collection[int]] | None = None,
    ) -> None:
        self.model, self.mesh, self.holders = model, mesh, holders
        # Parameters stay as they are stored, so that the demands on that are not made again.
        recompute = "model" if options.recompute == "auto" else options.recompute
        self.options = replace(options, memory_limit=None, constraints=(), recompute=recompute)
        self.alike: EqualModules | None = None
        self.root: nn.Module | None = None
        self.known: dict[Any, Plan | CaptureError] = {}

    def __call__(
        self,
        root: nn.Module,
        path: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        stored: Mapping[str, Layout],
        part: bool,
        ways: Ways,
    ) -> Plan:
        """Return a plan of the module at `path` below `root`, for a call of it.

        root: the model on the meta device, in the modes of the call. stored: the layouts of the
        module's parameters, by their paths in it, which they keep. part: whether Python calls it,
        as a part of a model that is not traced whole; such a part returns whole tensors. ways: that
        calls in other modes go where the module branches on values: this model has no values by
        which to tell. A program checks them all.
        Raises CaptureError where it cannot be traced, which is remembered, PlanError and
        UnsupportedOpError, and InputMismatchError for a call that the module does not take.
        """
        with planning.held():
            return self.plan(root, path, args, kwargs, stored, part, ways)

    def plan(
        self,
        root: nn.Module,
        path: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        stored: Mapping[str, Layout],
        part: bool,
        ways: Ways,
    ) -> Plan:
        """Return a plan as `__call__` does, while no other thread plans."""
        pipelined = is_pipeline(self.mesh)
        if pipelined and (part or path):
            raise PlanError(
                f"{path or self.model} is called by itself, and is part of a model with stages",
                why="the ranks of other stages do not hold its parameters",
                fix="call the model, or leave pp out of the mesh",
            )
        if not part:
            module = root.get_submodule(path)
            captured = trace_whole(module, args, kwargs, ways)
            if pipelined:
                return pipeline_plan(
                    captured, self.model, self.mesh, self.options, stored, self.holders or None
                )
            return search(captured, self.model, self.mesh, self.options, stored=stored)
        if self.alike is None or self.root is not root:
            # Another root is the model with other attributes.
            self.alike, self.root, self.known = EqualModules(root), root, {}
        module = root.get_submodule(path)
        tensors, skeleton = flatten((args, kwargs))
        # All that a trace depends on, besides the module: the state of torch around the call, its
        # inputs, modes, layouts of parameters.
        device = next((t.device for t in module.parameters()), torch.device("cpu"))
        rest = (
            *(Surroundings.now(device), torch.is_grad_enabled()),
            str(skeleton),
            tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors),
            tuple(inner.training for inner in module.modules()),
            tuple(stored.items()),
            repr(ways),
        )
        canonical = self.alike.canonical(path)
        shared, alone = (canonical, rest), (path, rest, "alone")
        plan = self.known.get(shared) or self.known.get(alone)
        if plan is None:
            counters = self.alike.counters(canonical)
            traced, common = trace_alike(
                module, args, kwargs, counters, known=find_rule, around=root, ways=ways
            )
            if isinstance(traced, CaptureError):
                plan = traced
            else:
                plan = search(traced, path, self.mesh, self.options, stored=stored)
            # A trace that has met something of this module alone is not for those equal to it.
            self.known[shared if common else alone] = plan
        if isinstance(plan, CaptureError):
            raise plan
        return plan
