"""Plans of a running model's modules for other modes and inputs than its plan is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from autoparallel.capture.equal_modules import EqualModules
from autoparallel.capture.graph_breaks import trace, trace_alike
from autoparallel.capture.refused_inputs import refuse_arrays, refuse_inputs
from autoparallel.errors import CaptureError
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.placement import Layout
from autoparallel.plan import Plan
from autoparallel.planning.search import search
from autoparallel.rules.lookup import find_rule
from autoparallel.support.pytree import flatten

__all__ = ["Replanner"]


class Replanner:
    """Plans modules of a running model for other modes and inputs. Equal modules share a plan."""

    def __init__(self, model: str, mesh: Mesh, options: Options) -> None:
        self.model, self.mesh = model, mesh
        # How parameters are stored is decided: what was demanded of that is not asked again.
        recompute = "none" if options.recompute == "auto" else options.recompute
        self.options = replace(options, memory_limit=None, constraints=(), recompute=recompute)
        self.alike: EqualModules | None = None
        self.known: dict[Any, Plan | CaptureError] = {}

    def __call__(
        self,
        root: nn.Module,
        path: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        stored: Mapping[str, Layout],
        part: bool,
    ) -> Plan:
        """The plan of the module at `path`, whose parameters are `stored` already.

        part: whether Python calls it. Raises CaptureError, PlanError and UnsupportedOpError, and
        InputMismatchError for a call that the module itself does not take.
        """
        if not part:
            module = root.get_submodule(path)
            refuse_arrays(module, args, kwargs)
            try:
                captured = trace(module, args, kwargs, known=find_rule)
            except CaptureError:
                refuse_inputs(module, args, kwargs)
                raise
            return search(captured, self.model, self.mesh, self.options, stored=stored)
        self.alike = self.alike or EqualModules(root)
        module = root.get_submodule(path)
        tensors, skeleton = flatten((args, kwargs))
        rest = (
            str(skeleton),
            tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors),
            tuple(inner.training for inner in module.modules()),
            tuple(stored.items()),
        )
        canonical = self.alike.canonical(path)
        shared, alone = (canonical, rest), (path, rest, "alone")
        found = self.known.get(shared) or self.known.get(alone)
        if found is None:
            counters = self.alike.counters(canonical)
            traced, common = trace_alike(
                module, args, kwargs, counters, known=find_rule, around=root
            )
            if isinstance(traced, CaptureError):
                found = traced
            else:
                found = search(traced, path, self.mesh, self.options, stored=stored)
            self.known[shared if common else alone] = found
        if isinstance(found, CaptureError):
            raise found
        return found
