"""The nodes that one call of a block became: checked to be the block's alone, and copied."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from autoparallel.capture.block_calls import MARKS
from autoparallel.capture.block_folding import Folding
from autoparallel.capture.graph_builder import GraphBuilder
from autoparallel.capture.module_tensors import named_tensors
from autoparallel.graph.checkpoints import REGION
from autoparallel.graph.graph import Graph, Node, Ref, Sym, leaves, map_leaves

__all__ = ["Regions", "base_of"]

_NUMBER = re.compile(r"_\d+$")


def base_of(name: str) -> str:
    """Return the name without the number that made it unique.

    name: of a node, in an exported program or in a graph.

    >>> base_of("linear_12"), base_of("scaled_dot_product_attention")
    ('linear', 'scaled_dot_product_attention')
    """
    return _NUMBER.sub("", name)


@dataclass
class _Region:
    """The nodes that the call of one traced block became: nodes[start:stop] of the builder.

    path: of the block. scope, frames: the module calls and the lines of forwards around the call,
    as in GraphBuilder. inputs, outputs: names of the tensors that the block is called with and of
    those that it returns, without the inputs that it passes on.
    """

    path: str
    scope: tuple[str, ...]
    frames: tuple[str, ...]
    inputs: tuple[str, ...]
    start: int
    stop: int = -1
    outputs: tuple[str, ...] = ()


class Regions:
    """The marked regions of a program whose nodes are written by `builder`, and their copies.

    folding: which blocks were traced, and which opaque calls stand for others. A block that turns
    out not to be the block's alone, or not to be like its equals, raises Unfoldable, and the whole
    model is traced instead.
    """

    def __init__(self, folding: Folding, builder: GraphBuilder) -> None:
        self.folding, self.builder = folding, builder
        self.modules = dict(member for group in folding.groups for member in group.members)
        self.regions: dict[int, _Region] = {}  # by the key of their marks
        self.paths: dict[str, dict[int, str]] = {}

    def mark(self, node: Any, name: str) -> None:
        """Begin or end the region of a block that was traced.

        node: the mark, of the exported program. name: of its op. Raises Unfoldable.
        """
        names, key = self.names_of(node), node.args[1]
        if name == MARKS[0]:
            origins = self.builder.origins
            scope, frames = origins.scope(node), origins.frames(node)
            path, start = self.folding.marks[key], len(self.builder.nodes)
            self.regions[key] = _Region(path, scope, frames, names, start)
            return
        region = self.regions[key]
        region.outputs, region.stop = names, len(self.builder.nodes)
        self.confine(region)
        # The last block of a group is traced as well, as a check on the first.
        twin = self.folding.twins.get(key)
        if twin is not None and self.text(region) != self.text(self.regions[twin.key]):
            raise self.folding.fail(f"{region.path} computes something else than {twin.path}")

    def names_of(self, node: Any) -> tuple[str, ...]:
        """Return the names of the tensors that an opaque call or a mark is given."""
        refs = self.builder.leaf_all(node.args[0])
        if not all(isinstance(ref, Ref) for ref in refs):
            raise self.folding.fail("a block is called with a tensor from outside of the program")
        return tuple(ref.name for ref in refs)

    def confine(self, region: _Region) -> None:
        """Raise Unfoldable where a region reads or writes more than its block alone accounts for.

        It may read its inputs, its own parameters and buffers, and constants. It may write to what
        it has computed itself, and must return nothing else.
        """
        nodes = self.builder.nodes[region.start : region.stop]
        internal = {value.name for node in nodes for value in node.results}
        inputs = set(region.inputs)
        if any(self.is_inside(name, region.path) for name in inputs):
            raise self.folding.fail(f"{region.path} is called with its own parameter")
        for node in nodes:
            for name in node.operands():
                if name in internal or name in inputs or name in self.builder.lifted:
                    continue
                if not self.is_inside(name, region.path):
                    raise self.folding.fail(f"{region.path} reads %{name} from elsewhere")
            outside = [name for name in self.builder.writes[node.name] if name not in internal]
            if outside:
                raise self.folding.fail(f"{region.path} writes to %{outside[0]}")
            # A size that comes from values would be one symbol in all copies, though each has its
            # own values.
            for leaf in leaves((node.args, node.kwargs, *(v.shape for v in node.results))):
                if isinstance(leaf, Sym) and leaf.expr.free_symbols - self.builder.input_symbols:
                    raise self.folding.fail(f"{region.path} has sizes that depend on values")
        if not internal.issuperset(region.outputs):
            raise self.folding.fail(f"{region.path} returns what it did not make")

    def is_inside(self, name: str, path: str) -> bool:
        """Return whether it is a parameter or buffer of the block at `path`, perhaps of others too.

        name: of any value.
        """
        return self.builder.tensor_ids.get(name) in self.inside(path)

    def inside(self, path: str) -> dict[int, str]:
        """Return the paths inside of a block of its parameters and buffers, by the tensor's id.

        A tensor that has several paths goes by the last one: parameters first, then buffers.
        """
        if path not in self.paths:
            tensors = sorted(named_tensors(self.modules[path]), key=lambda row: row[2] == "buffer")
            self.paths[path] = {id(tensor): inner for inner, _, _, tensor in tensors}
        return self.paths[path]

    def text(self, region: _Region) -> list[Any]:
        """Return the region without names: equal for regions that compute the same.

        Values are numbered, from the inputs on; the block's own tensors go by their paths inside.
        """
        numbers: dict[str, Any] = {name: index for index, name in enumerate(region.inputs)}
        inside = self.inside(region.path)

        def plain(leaf: Any) -> Any:
            """Return a leaf that is equal in equal regions."""
            if not isinstance(leaf, Ref):
                return (type(leaf), leaf)
            if leaf.name in numbers:
                return numbers[leaf.name]
            return inside.get(self.builder.tensor_ids.get(leaf.name, 0), leaf.name)

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
        """Add, in the place of an opaque call, the nodes of the traced block that it stands for.

        node: the opaque call, of the exported program. The copies read the tensors of the block
        that was hidden. Raises Unfoldable where the call cannot be that of an equal block.
        """
        path, traced = self.folding.calls[node.args[1]]
        region = self.regions[traced.key]
        renamed = self.correspondence(node, path, region)

        def leaf(item: Any) -> Any:
            """Return an argument of the copy, of one of the traced block."""
            if isinstance(item, Ref) and item.name in renamed:
                return Ref(renamed[item.name])
            return item

        def moved(entry: str) -> str:
            """Return a module call inside of the copy, of one inside of the traced block."""
            inside = entry.startswith((f"{region.path}.", f"{region.path}{REGION}"))
            return path + entry.removeprefix(region.path) if inside else entry

        builder = self.builder
        scope, frames = builder.origins.scope(node), builder.origins.frames(node)
        scopes: dict[tuple[str, ...], tuple[str, ...]] = {}  # one object for equal ones
        for index in range(region.start, region.stop):
            original, grad = builder.nodes[index], builder.grad_enabled[index]
            below = original.scope[len(region.scope) :]
            if below not in scopes:
                scopes[below] = (*scope, *map(moved, below))
            name = builder.fresh(base_of(original.name), len(original.results))
            copied = replace(
                original,
                name=name,
                args=map_leaves(leaf, original.args),
                kwargs=map_leaves(leaf, original.kwargs),
                scope=scopes[below],
            )
            # The first block may be called with a tensor that has no gradient, and others not.
            flows = builder.records(copied, grad)
            copied = _with_results(copied, original, flows)
            names = zip(original.results, copied.results, strict=True)
            renamed |= {old.name: new.name for old, new in names}
            inner_frames = builder.frames[original.name][len(region.frames) :]
            builder.add(copied, grad, (*frames, *inner_frames))
            builder.follow(copied, flows)
        builder.translated[node] = tuple(Ref(renamed[name]) for name in region.outputs)

    def correspondence(self, node: Any, path: str, region: _Region) -> dict[str, str]:
        """Return for each value that a traced block reads the one that its copy reads.

        node: the opaque call of the block at `path`. Raises Unfoldable where one tensor stands for
        two or two for one.
        """
        renamed: dict[str, str] = {}
        for old, new in zip(region.inputs, self.names_of(node), strict=True):
            if renamed.setdefault(old, new) != new:
                raise self.folding.fail(f"{path} is called otherwise than {region.path}")
        if len(set(renamed.values())) != len(renamed):
            raise self.folding.fail(f"{path} is called otherwise than {region.path}")
        names = self.builder.names_of_tensors
        copies = {inner: tensor for tensor, inner in self.inside(path).items()}
        for tensor, inner in self.inside(region.path).items():
            renamed[names[tensor]] = names[copies[inner]]
        return renamed

    def without_patterns(self, graph: Graph) -> Graph:
        """Return the graph without the nodes that are there only to be copied.

        graph: with its nodes in the builder's order.
        """
        regions = [self.regions[key] for key in self.folding.patterns]
        left_out = {
            node.name for region in regions for node in graph.nodes[region.start : region.stop]
        }
        return replace(graph, nodes=tuple(n for n in graph.nodes if n.name not in left_out))

    def check(self, graph: Graph) -> None:
        """Raise Unfoldable where a node outside of a region reads what the block did not return.

        graph: the finished one, in the builder's order. In a hidden block that value is not there
        to be read, and the tracer would not have seen it.
        """
        inner: dict[str, int] = {}
        for key, region in self.regions.items():
            for node in graph.nodes[region.start : region.stop]:
                for value in node.results:
                    if value.name not in region.outputs:
                        inner[value.name] = key
        for index, node in enumerate(graph.nodes):
            for name in node.operands():
                if name in inner:
                    region = self.regions[inner[name]]
                    if not region.start <= index < region.stop:
                        raise self.folding.fail(f"%{name} is read outside of {region.path}")
        for name in (*graph.outputs, *(name for _, name in graph.mutations)):
            if name in inner:
                raise self.folding.fail(f"%{name} leaves {self.regions[inner[name]].path}")


def _with_results(copied: Node, original: Node, flows: bool) -> Node:
    """Return the copy of a node with results like the original's, under names of its own.

    flows: whether a gradient flows back through the copy.
    """
    single = len(original.results) == 1 and original.result.name == original.name
    results = []
    for index, value in enumerate(original.results):
        name = copied.name if single else f"{copied.name}_{index}"
        floating = value.dtype.is_floating_point or value.dtype.is_complex
        results.append(replace(value, name=name, requires_grad=flows and floating))
    return replace(copied, results=tuple(results))
