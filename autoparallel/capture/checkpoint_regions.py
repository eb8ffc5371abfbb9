"""Regions of a program that the model itself checkpoints: marked in the trace, kept in scopes.

A checkpoint computes what its function computes, and says that the function is to be run again in
the backward pass. So the function is traced as if there were no checkpoint, between two marks, and
each call in between has the region as one of its scopes (see graph/checkpoints.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.checkpoint import noop_context_fn

from autoparallel.capture.block_folding import Folding
from autoparallel.capture.graph_builder import GraphBuilder
from autoparallel.errors import CaptureError
from autoparallel.graph.checkpoints import REGION, without_regions
from autoparallel.graph.graph import Graph, Ref

__all__ = ["BEGIN", "END", "CheckpointRegions", "marked", "require_plain", "require_unwritten"]

# The names of the marks. The first is given the tensors that a reentrant checkpoint is called with.
BEGIN, END = "autoparallel.checkpoint.default", "autoparallel.checkpointed.default"

_library = torch.library.Library("autoparallel", "FRAGMENT")
_library.define("checkpoint(Tensor[] inputs, bool reentrant) -> ()")
_library.define("checkpointed(int number) -> ()")


@torch.library.register_fake("autoparallel::checkpoint")
def _checkpoint(inputs: list[torch.Tensor], reentrant: bool) -> None:
    """Mark the beginning of a region, and what a reentrant one is called with."""


@torch.library.register_fake("autoparallel::checkpointed")
def _checkpointed(number: int) -> None:
    """Mark the end of a region."""


@contextlib.contextmanager
def marked(inputs: Sequence[torch.Tensor], reentrant: bool) -> Iterator[None]:
    """Mark what is traced within as the region of a checkpoint.

    inputs: tensors that a reentrant checkpoint is called with.
    """
    torch.ops.autoparallel.checkpoint(list(inputs), reentrant)
    yield
    torch.ops.autoparallel.checkpointed(0)


def require_plain(context: Callable[[], Any]) -> None:
    """Raise CaptureError where the user has given a checkpoint contexts of another kind."""
    if context is not noop_context_fn:
        raise CaptureError(
            "a checkpoint has a context of its own (context_fn)",
            why="what the context does to the region, now and when it is run again, is not known",
            fix="leave context_fn out; the planner's recompute= chooses what is saved",
        )


@dataclass
class _Region:
    """A region that is being translated.

    scope: module calls around it. start: the number of its first node. stopped: whether no gradient
    flows through it.
    """

    scope: tuple[str, ...]
    start: int
    stopped: bool


class CheckpointRegions:
    """The marked regions of a program whose nodes are written by `builder`.

    folding: how blocks were hidden. open: the regions around the present node, the outermost first.
    """

    def __init__(self, folding: Folding, builder: GraphBuilder) -> None:
        self.folding, self.builder = folding, builder
        self.open: list[_Region] = []
        self.counts: dict[tuple[str, ...], int] = {}

    @property
    def records(self) -> bool:
        """True if gradients are recorded here, as far as the regions have a say."""
        return not any(region.stopped for region in self.open)

    def begin(self, node: Any) -> None:
        """Begin a region. node: the mark, of the exported program.

        A reentrant checkpoint that is called without a tensor that needs a gradient has none: torch
        warns of that, and leaves the parameters that are read inside without gradients. Raises
        CaptureError where a later call decides on that.
        """
        inputs, reentrant = self.builder.leaf_all(node.args[0]), node.args[1]
        names = [leaf.name for leaf in inputs if isinstance(leaf, Ref)]
        stopped = reentrant and not self.builder.carries(names)
        if reentrant and not stopped and not self.reaches_parameters(names):
            raise CaptureError(
                "a reentrant checkpoint is entered with inputs of the module alone",
                where=self.builder.origins.where(node),
                why="if they need no gradient, nothing inside gets one; that is known when the "
                "module is called",
                fix="use_reentrant=False",
            )
        if stopped and self.folding.groups:
            raise self.folding.fail("a reentrant checkpoint without a gradient")
        scope = self.builder.origins.scope(node)
        self.open.append(_Region(scope, len(self.builder.nodes), stopped))

    def reaches_parameters(self, names: list[str]) -> bool:
        """Return whether a gradient of one of these values reaches a parameter."""
        producers = {value.name: node for node in self.builder.nodes for value in node.results}
        todo, seen = list(names), set(names)
        while todo:
            node = producers[todo.pop()]
            if node.kind == "parameter" and node.result.requires_grad:
                return True
            # In-place writes may bring in a gradient, so that values without one count as well.
            new = [name for name in node.operands() if name not in seen]
            seen.update(new)
            todo += new
        return False

    def end(self) -> None:
        """End the innermost region: each node in it gets it for a scope."""
        region = self.open.pop()
        count = self.counts[region.scope] = self.counts.get(region.scope, -1) + 1
        around = region.scope[-1] if region.scope else ""
        entry = f"{around}{REGION}{count}"
        depth, nodes = len(region.scope), self.builder.nodes
        scopes: dict[tuple[str, ...], tuple[str, ...]] = {}  # one object for equal ones
        for index in range(region.start, len(nodes)):
            scope = nodes[index].scope
            if scope not in scopes:
                scopes[scope] = (*scope[:depth], entry, *scope[depth:])
            nodes[index] = replace(nodes[index], scope=scopes[scope])


def require_unwritten(graph: Graph) -> None:
    """Raise CaptureError where a region computes the new value of a buffer.

    Torch writes it twice: in the forward pass, and where the region is run again.

    graph: after all passes. Example: `require_unwritten(captured.graph)`.
    """
    producers = {value.name: node for node in graph.calls for value in node.results}
    for path, name in graph.mutations:
        node = producers.get(name)
        if node is not None and without_regions(node.scope) != node.scope:
            raise CaptureError(
                f"a checkpoint writes to {path}",
                where=node.line,
                why="torch runs its region twice, and writes twice (running statistics go further "
                "than in one pass); a graph has each write once",
                fix="take the module that writes (a batch norm) out of the checkpoint",
            )
