"""Graph breaks: the largest submodules that can be traced, and why the rest of a model cannot."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from autoparallel.capture.branch_ways import NO_WAYS, Ways, refuse_drawn
from autoparallel.capture.call_recorder import Call, record
from autoparallel.capture.census import require_agreement
from autoparallel.capture.checkpoint_regions import require_unwritten
from autoparallel.capture.decomposition_registry import Known
from autoparallel.capture.equal_modules import EqualModules, Watch
from autoparallel.capture.export import Captured, capture
from autoparallel.capture.global_reads import OuterVariables
from autoparallel.capture.graph_builder import has_unknown_sizes, require_known_sizes
from autoparallel.capture.held_tensors import refuse_views
from autoparallel.capture.module_tensors import first_paths
from autoparallel.capture.repeated_calls import SeenCalls
from autoparallel.errors import AliasError, CaptureError
from autoparallel.graph.graph import Graph
from autoparallel.graph.passes.run_passes import run_passes
from autoparallel.plan import Break

__all__ = ["GraphBreaks", "TracedPart", "trace", "trace_alike", "trace_parts"]

_log = logging.getLogger(__name__)
_RUNS = 3  # example runs, with other random numbers, to see modules that are left out by chance


@dataclass(frozen=True)
class TracedPart:
    """One graph of a model that has several.

    paths: of the modules that the graph is of: equal ones, in the model's order. captured: the
    graph with its inputs and outputs, as of the first of them.
    """

    paths: tuple[str, ...]
    captured: Captured


@dataclass(frozen=True)
class GraphBreaks:
    """A model that cannot be traced whole, in parts that can.

    parts: the graphs, each of one or more modules; no module is inside of another. breaks: the
    modules around them that stay Python, each with the reason. aliases: as in Captured, of the
    whole model.
    """

    parts: tuple[TracedPart, ...]
    breaks: tuple[Break, ...]
    aliases: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        """A digest of the parts and their places, by which a plan knows its model again."""
        rows = [(part.paths, part.captured.graph.fingerprint) for part in self.parts]
        text = repr((rows, [item.path for item in self.breaks]))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    known: Known,
    part: bool = False,
    around: nn.Module | None = None,
    ways: Ways | None = None,
) -> Captured:
    """Return the graph of the whole model after all passes.

    model: in the mode (train or eval) that the graph is for. args, kwargs: example inputs, maybe on
    the meta device. known: says of an op's name whether the op is traced as itself, as those are
    that have a rule. part: whether Python calls the model, so that side effects are refused.
    around: the model that this is a part of, if it is one. ways: that the call goes where it
    branches on values; where they are not given, an example run of the model finds them.
    Raises CaptureError where there is no such graph.

    >>> import torch
    >>> graph = trace(nn.Linear(2, 3), (torch.ones(4, 2),), {}, known=lambda op: True).graph
    >>> [node.target for node in graph.calls][0]
    'aten.linear.default'
    """

    def find_ways() -> Ways:
        """Return the ways that are known, else those of an example run."""
        if ways is not None or part:
            return ways or NO_WAYS
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            return NO_WAYS
        try:
            return record(model, args, kwargs).ways
        except CaptureError as error:
            _log.info("no example run of %s: %s", type(model).__name__, error.what)
            return NO_WAYS

    seen, outer = SeenCalls(), OuterVariables.of(model)
    captured = capture(
        model,
        args,
        kwargs,
        known=known,
        part=part,
        around=around,
        find_ways=find_ways,
        likely=ways or NO_WAYS,
        seen=seen,
        outer=outer,
    )
    refuse_drawn(captured.graph)
    graph = _passed(captured.graph)
    require_unwritten(graph)
    captured = replace(captured, graph=graph)
    require_agreement(captured, model, args, kwargs, seen, outer)
    return captured


def _passed(graph: Graph) -> Graph:
    """Return the graph after all passes. Raises CaptureError where sizes that depend on values are
    left in it.
    """
    if not has_unknown_sizes(graph):
        return run_passes(graph)
    try:
        graph = run_passes(graph)
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError):
        require_known_sizes(graph)  # passes may take any size to have a hint
        raise
    require_known_sizes(graph)
    return graph


def trace_alike(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    counters: tuple[tuple[str, str], ...],
    *,
    known: Known,
    around: nn.Module,
    ways: Ways = NO_WAYS,
) -> tuple[Captured | CaptureError, bool]:
    """Return the graph of a part, or why there is none; and whether that goes for its equals too.

    model: the part. args, kwargs: of one call of it. counters: (path inside the part, attribute) of
    the integers that number it among its equals: where the trace reads one of them, it is of this
    part alone. known, ways: as in `trace`. around: the model that it is a part of.
    Raises AliasError where the part may not stay Python either.

    Example: `trace_alike(block, args, {}, (("", "layer_idx"),), known=find_rule, around=model)`.
    """
    watch = Watch(counters)
    result: Captured | CaptureError
    try:
        with watch.installed(model):
            result = trace(model, args, kwargs, known=known, part=True, around=around, ways=ways)
    except AliasError:
        raise
    except CaptureError as error:
        result = error
    return result, not watch.touched


def trace_parts(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    error: CaptureError,
    *,
    known: Known,
) -> GraphBreaks:
    """Trace the largest submodules of `model` that can be traced, with the inputs they are given.

    args, kwargs: example inputs of the model, with which it is run to see what its modules are
    called with. error: why the whole cannot be traced. known: as in `trace`. Only modules with
    parameters are tried, as there is nothing to gain from the others.
    Raises CaptureError where the model has no weights to run with, where it does not run, and where
    none of its modules can be traced.

    Example: `trace_parts(model, args, {}, error, known=find_rule).breaks`.
    """
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise CaptureError(
            error.what,
            where=error.where,
            why=f"{error.why}\nIts submodules could be split one by one, but what they are called "
            "with is known from an example run only, which needs weights",
            fix=f"pass the model with real weights (not on the meta device), or {error.fix}",
        )
    try:
        finder = _Finder(model, args, kwargs, known)
    except CaptureError as failed:
        raise CaptureError(
            error.what,
            where=error.where,
            why=f"{error.why}\nNor can its submodules be split one by one: {failed.what}, "
            f"{failed.why}",
            fix=error.fix,
        ) from failed
    finder.broken("", error)
    finder.uncalled()
    finder.count()
    refuse_views(model, [item.path for item in finder.breaks])
    if not finder.parts:
        raise CaptureError(
            f"nothing of {type(model).__name__} can be split",
            where="\n".join(map(str, finder.breaks)),
            why="no submodule with parameters can be traced",
            fix="see the reasons above; any module that is free of them will be split",
        )
    order = {path: index for index, path in enumerate(finder.modules)}
    parts = tuple(
        TracedPart(tuple(sorted(paths, key=order.__getitem__)), captured)
        for captured, paths in finder.parts.values()
    )
    return GraphBreaks(parts, tuple(finder.breaks), first_paths(model))


class _Finder:
    """The search down the tree of calls.

    known_ops: as `known` in `trace`. alike: the equal modules. weighty: paths of the modules with
    parameters. calls: the first call of each module. children: the paths that each path calls.
    breaks: the modules that stay Python. parts: graphs with the paths of their modules, by what
    makes two calls the same to the tracer. known: all that was tried, by the same keys. done: paths
    that were visited. flops: as in Recorded, of the first run.
    """

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], known: Known
    ) -> None:
        self.model, self.known_ops = model, known
        self.alike = EqualModules(model)
        self.modules = dict(model.named_modules())
        self.weighty = {path for path, module in self.modules.items() if _has_parameters(module)}
        self.calls: dict[str, Call] = {}
        self.flops: Mapping[str, int] = {}
        for seed in range(_RUNS):
            run = record(model, args, kwargs, seed)
            self.flops = self.flops or run.flops
            for path, call in run.calls.items():
                first = self.calls.setdefault(path, call)
                first.callers.update(call.callers)
            # Modules may be left out by chance (LayerDrop): another run shows others.
            seen = {self.alike.canonical(path) for path in self.calls}
            if all(self.alike.canonical(path) in seen for path in self.weighty if path):
                break
        self.children: dict[str, list[str]] = {}
        for path, call in self.calls.items():
            for caller in call.callers:
                self.children.setdefault(caller, []).append(path)
        self.breaks: list[Break] = []
        self.parts: dict[Any, tuple[Captured, list[str]]] = {}
        self.known: dict[Any, Captured | CaptureError] = {}
        self.done: set[str] = set()

    def broken(self, path: str, error: CaptureError) -> None:
        """Note that the module at `path` stays Python, and why, and try the modules it calls."""
        reason = error.what + (f": {error.why}" if error.why else "")
        place, _, code = error.where.partition("  ")
        line = "  ".join(filter(None, (place.rsplit("/", 1)[-1], code)))
        self.breaks.append(Break(path, line, " ".join(reason.split())))
        for child in self.children.get(path, ()):
            self.visit(child)

    def visit(self, path: str) -> None:
        """Trace the module at `path` or, where that fails, the modules that it calls."""
        if path in self.done or path not in self.weighty:
            return
        self.done.add(path)
        call = self.calls[path]
        canonical = self.alike.canonical(path)
        key: tuple[Any, ...] = (canonical, call.signature, call.repeated, repr(call.ways))
        if key not in self.known:
            args, kwargs = call.arguments()
            counters = self.alike.counters(canonical)
            traced, common = trace_alike(
                self.modules[path],
                args,
                kwargs,
                counters,
                known=self.known_ops,
                around=self.model,
                ways=call.ways,
            )
            if not common:
                key = (path, call.signature, "alone")
            self.known[key] = traced
        result = self.known[key]
        if call.repeated and isinstance(result, Captured) and result.graph.mutations:
            result = self.known[key] = _written_twice(result)
        if isinstance(result, CaptureError):
            _log.info("%s stays Python: %s", path, result.what)
            self.broken(path, result)
        else:
            self.parts.setdefault(key, (result, []))[1].append(path)

    def count(self) -> None:
        """Note how much of the matrix products each module that stays Python computes itself."""
        in_parts = {path for _, paths in self.parts.values() for path in paths}
        stay = {item.path for item in self.breaks}
        own: dict[str, int] = {}
        for path, flops in self.flops.items():
            # A module without parameters belongs to the part, or to the Python, that it is in.
            names = path.split(".") if path else []
            around = (".".join(names[:end]) for end in range(len(names), -1, -1))
            owner = next(place for place in around if place in in_parts or place in stay)
            if owner not in in_parts:
                own[owner] = own.get(owner, 0) + flops
        total = sum(self.flops.values()) or 1
        self.breaks = [replace(item, flops=own.get(item.path, 0) / total) for item in self.breaks]

    def uncalled(self) -> None:
        """Take modules that no example run has called for what their equals are."""
        parts: dict[str, Any] = {}
        for key in self.parts:
            if key[-1] != "alone":
                parts.setdefault(key[0], key)
        breaks = {self.alike.canonical(item.path): item for item in reversed(self.breaks)}
        in_parts = {path for _, paths in self.parts.values() for path in paths}
        for path in self.modules:
            above = path.split(".")
            inside = any(".".join(above[:end]) in in_parts for end in range(1, len(above)))
            if path in self.calls or path not in self.weighty or inside:
                continue
            canonical = self.alike.canonical(path)
            if canonical in parts:
                self.parts[parts[canonical]][1].append(path)
                in_parts.add(path)
            elif canonical in breaks and path:
                self.breaks.append(replace(breaks[canonical], path=path))


def _written_twice(captured: Captured) -> CaptureError:
    """Return the error for a part that writes to buffers and is called in a checkpoint."""
    names = ", ".join(path for path, _ in captured.graph.mutations)
    return CaptureError(
        f"it writes to {names} and is called in a checkpoint",
        why="torch runs it twice, and writes twice; a graph has each write once",
        fix="take it out of the checkpoint",
    )


def _has_parameters(module: nn.Module) -> bool:
    """Return whether the module or one in it has a parameter."""
    return next(module.parameters(), None) is not None
