"""The nodes that one call of a block became: checked to be the block's alone, and copied."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from autoparallel.capture.block_folding import Folding
from autoparallel.capture.graph_builder import GraphBuilder
from autoparallel.graph.graph import Graph, Ref, Sym, leaves, map_leaves

__all__ = ["MARKS", "OPAQUE", "Regions", "base_of"]

MARKS = ("autoparallel.enter.default", "autoparallel.leave.default")
OPAQUE = "autoparallel.block.default"
_NUMBER = re.compile(r"_\d+$")


def base_of(name: str) -> str:
    """The name without the number that made it unique."""
    return _NUMBER.sub("", name)


@dataclass
class _Region:
    """What the call of one block became: nodes[start:stop], from inputs to outputs by name.

    frames: the lines of the forwards that call the block.
    """

    path: str
    scope: tuple[str, ...]
    frames: tuple[str, ...]
    inputs: tuple[str, ...]
    start: int
    stop: int = -1
    outputs: tuple[str, ...] = ()


class Regions:
    """The marked regions of a program, whose nodes are those of `builder`, and their copies.

    folding: which blocks were traced, and which calls stand for others.
    """

    def __init__(self, folding: Folding, builder: GraphBuilder) -> None:
        self.folding, self.builder = folding, builder
        self.modules = dict(member for group in folding.groups for member in group.members)
        self.found: dict[int, _Region] = {}
        self.blocks: dict[str, dict[int, str]] = {}

    def mark(self, node: Any, name: str) -> None:
        """A block that was traced begins or ends here."""
        names, key = self.names_of(node), node.args[1]
        if name == MARKS[0]:
            origins = self.builder.origins
            scope, frames = origins.scope(node), origins.frames(node)
            path, start = self.folding.marks[key], len(self.builder.nodes)
            self.found[key] = _Region(path, scope, frames, names, start)
            return
        region = self.found[key]
        region.outputs, region.stop = names, len(self.builder.nodes)
        self.confine(region)
        twin = self.folding.twins.get(key)
        if twin is not None and self.text(region) != self.text(self.found[twin.key]):
            raise self.folding.fail(f"{region.path} computes something else than {twin.path}")

    def names_of(self, node: Any) -> tuple[str, ...]:
        """The values that an opaque call or a mark names."""
        refs = self.builder.leaf_all(node.args[0])
        if not all(isinstance(ref, Ref) for ref in refs):
            raise self.folding.fail("a block is called with a tensor from outside of the program")
        return tuple(ref.name for ref in refs)

    def confine(self, region: _Region) -> None:
        """A region may read its inputs and what is its own, and must write to neither."""
        internal = {
            value.name
            for node in self.builder.nodes[region.start : region.stop]
            for value in node.results
        }
        inputs = set(region.inputs)
        if any(
            name in self.builder.tensor_ids and self.is_own(name, region.path) for name in inputs
        ):
            raise self.folding.fail(f"{region.path} is called with its own parameter")
        for node in self.builder.nodes[region.start : region.stop]:
            for name in node.operands():
                if name in internal or name in inputs or name in self.builder.lifted:
                    continue
                if name not in self.builder.tensor_ids or not self.is_own(name, region.path):
                    raise self.folding.fail(f"{region.path} reads %{name} from elsewhere")
            outside = [name for name in self.builder.writes[node.name] if name not in internal]
            if outside:
                raise self.folding.fail(f"{region.path} writes to %{outside[0]}")
            for leaf in leaves((node.args, node.kwargs, *(v.shape for v in node.results))):
                if (
                    isinstance(leaf, Sym)
                    and not leaf.expr.free_symbols <= self.builder.input_symbols
                ):
                    raise self.folding.fail(f"{region.path} has sizes that depend on values")
        if not internal.issuperset(region.outputs):
            raise self.folding.fail(f"{region.path} returns what it did not make")

    def is_own(self, name: str, path: str) -> bool:
        """Whether a stored tensor belongs to the block at `path`, perhaps among others."""
        return self.builder.tensor_ids[name] in self.inside(path)

    def inside(self, path: str) -> dict[int, str]:
        """Paths inside a block by the tensor's id."""
        if path not in self.blocks:
            block = self.modules[path]
            self.blocks[path] = {
                id(tensor): inner
                for inner, tensor in (
                    *block.named_parameters(remove_duplicate=False),
                    *block.named_buffers(remove_duplicate=False),
                )
            }
        return self.blocks[path]

    def text(self, region: _Region) -> list[Any]:
        """The region without names: equal for regions that compute the same."""
        numbers: dict[str, Any] = {name: index for index, name in enumerate(region.inputs)}
        own = self.inside(region.path)

        def plain(leaf: Any) -> Any:
            if not isinstance(leaf, Ref):
                return (type(leaf), leaf)
            if leaf.name in numbers:
                return numbers[leaf.name]
            return own.get(self.builder.tensor_ids.get(leaf.name, 0), leaf.name)

        rows: list[Any] = []
        for node, grad in zip(
            self.builder.nodes[region.start : region.stop],
            self.builder.grad_enabled[region.start : region.stop],
            strict=True,
        ):
            args, kwargs = map_leaves(plain, node.args), map_leaves(plain, node.kwargs)
            shapes = [(value.shape, value.dtype) for value in node.results]
            rows.append((node.target, args, kwargs, shapes, grad))
            for value in node.results:
                numbers[value.name] = len(numbers)
        return [*rows, [numbers[name] for name in region.outputs]]

    def copy(self, node: Any) -> None:
        """The nodes of the block that was traced, for the block of an opaque call."""
        path, traced = self.folding.calls[node.args[1]]
        region = self.found[traced.key]
        renamed: dict[str, str] = {}
        for old, new in zip(region.inputs, self.names_of(node), strict=True):
            if renamed.setdefault(old, new) != new:
                raise self.folding.fail(f"{path} is called otherwise than {region.path}")
        if len(set(renamed.values())) != len(renamed):
            raise self.folding.fail(f"{path} is called otherwise than {region.path}")
        block = {inner: tensor for tensor, inner in self.inside(path).items()}
        for tensor, inner in self.inside(region.path).items():
            renamed[self.builder.names_of_tensors[tensor]] = self.builder.names_of_tensors[
                block[inner]
            ]

        def leaf(item: Any) -> Any:
            if isinstance(item, Ref) and item.name in renamed:
                return Ref(renamed[item.name])
            return item

        def moved(entry: str) -> str:
            inside = entry.startswith(f"{region.path}.")
            return path + entry.removeprefix(region.path) if inside else entry

        scope, frames = self.builder.origins.scope(node), self.builder.origins.frames(node)
        scopes: dict[tuple[str, ...], tuple[str, ...]] = {}
        for index in range(region.start, region.stop):
            like, grad = self.builder.nodes[index], self.builder.grad_enabled[index]
            args, kwargs = map_leaves(leaf, like.args), map_leaves(leaf, like.kwargs)
            own = self.builder.fresh(base_of(like.name), len(like.results))
            made = replace(like, name=own, args=args, kwargs=kwargs)
            flows = self.builder.records(made, grad)
            single = len(like.results) == 1 and like.results[0].name == like.name
            results = []
            for position, value in enumerate(like.results):
                name = own if single else f"{own}_{position}"
                renamed[value.name] = name
                floating = value.dtype.is_floating_point or value.dtype.is_complex
                results.append(replace(value, name=name, requires_grad=flows and floating))
            below = like.scope[len(region.scope) :]
            if below not in scopes:
                scopes[below] = (*scope, *map(moved, below))
            made = replace(made, results=tuple(results), scope=scopes[below])
            self.builder.add(made, grad)
            written = tuple(renamed[name] for name in self.builder.writes[like.name])
            self.builder.follow(made, written, flows)
            own_frames = self.builder.frames[like.name][len(region.frames) :]
            self.builder.frames[own] = (*frames, *own_frames)
        self.builder.translated[node] = tuple(Ref(renamed[name]) for name in region.outputs)

    def check(self, graph: Graph) -> None:
        """Nobody reads from a traced block what it did not return."""
        inner: dict[str, int] = {}
        for key, region in self.found.items():
            for node in graph.nodes[region.start : region.stop]:
                for value in node.results:
                    if value.name not in region.outputs:
                        inner[value.name] = key
        for index, node in enumerate(graph.nodes):
            for name in node.operands():
                if name in inner:
                    region = self.found[inner[name]]
                    if not region.start <= index < region.stop:
                        raise self.folding.fail(f"%{name} is read outside of {region.path}")
        for name in (*graph.outputs, *(name for _, name in graph.mutations)):
            if name in inner:
                raise self.folding.fail(f"%{name} leaves {self.found[inner[name]].path}")
