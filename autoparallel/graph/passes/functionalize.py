"""A pass that turns in-place ops into ops with new values, also through views."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any

import torch

from autoparallel.errors import CaptureError
from autoparallel.graph.aliasing import (
    is_view,
    owner_of,
    shares_memory,
    written_back,
)
from autoparallel.graph.graph import Graph, Node, Ref, Value, hint, leaves, map_leaves
from autoparallel.graph.operators import operator_of, packet_of
from autoparallel.graph.passes.editing import Rename, rebuilt, renamed
from autoparallel.support.torch_private import schema_of

__all__ = ["functional"]


def functional(graph: Graph) -> Graph:
    """%y = add_(%x, 1) becomes %y = add(%x, 1), and later reads of %x read %y.

    A write to a view produces the value that it is a view of anew (by slice_scatter and its like),
    and all other views of that are taken again where they are read next.

    Why: a value must have one meaning. After: no in-place op is left; values written to buffers are
    in the graph's mutations; a second run is a no-op. Raises CaptureError where the memory written
    belongs to an input or a parameter, or is read through an op that may give a view or a copy.
    """
    return _Functional(graph).run()


class _Functional:
    """One run of the pass.

    names: the value that stands for each value of the old graph now. views: for each value, the one
    that it shares memory with. made_by: the call that took each view, and the index among its
    results. versions: how often the memory of an owner was written. fresh: the version that a name
    has seen. values: of the new graph, by name. taken: names that are in use. mutations: the owner
    whose memory is each buffer's, by the buffer's path.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[Node] = []
        self.names: Rename = {}
        self.views: dict[str, str] = {}
        self.made_by: dict[str, tuple[Node, int]] = {}
        self.versions: dict[str, int] = {}
        self.fresh: dict[str, int] = {}
        self.values: dict[str, Value] = {}
        self.taken = {*graph.values, *(node.name for node in graph.nodes)}
        self.mutations = dict(graph.mutations)

    def run(self) -> Graph:
        """Return the new graph: in-place ops are written out,
        and stale views are taken again where they are read.
        """
        for node in self.graph.nodes:
            if _is_in_place(node):
                self.write(node)
                continue
            _require_pure(node)
            for name in node.operands():
                self.refresh(name, node)
            self.append(renamed(node, self.names))
            if node.kind == "call" and node.operands() and shares_memory(node.target):
                for index, value in enumerate(node.results):
                    self.views[value.name] = node.operands()[0]
                    self.made_by[value.name] = (node, index)
                    self.fresh[value.name] = self.versions.get(self.owner(value.name), 0)
        last = self.graph.nodes[-1] if self.graph.nodes else None
        # Returned views must show writes that came after they were taken.
        for name in (*self.graph.outputs, *self.mutations.values()):
            self.refresh(name, last)
        rebuilt_graph = rebuilt(self.graph, self.nodes, self.names)
        final = tuple((path, self.names.get(name, name)) for path, name in self.mutations.items())
        return replace(rebuilt_graph, mutations=final)

    def append(self, node: Node) -> None:
        """Append a node to the new graph."""
        self.nodes.append(node)
        self.values.update((value.name, value) for value in node.results)

    def free(self, base: str) -> str:
        """Return a name that nothing has: the base with the first number that is free."""
        name = next(candidate for i in count(1) if (candidate := f"{base}_{i}") not in self.taken)
        self.taken.add(name)
        return name

    def owner(self, name: str) -> str:
        """Return the value of the old graph whose memory `name` is."""
        return owner_of(name, self.views)

    def current(self, name: str) -> Value:
        """Return the value of the new graph that stands for a value of the old one now."""
        return self.values[self.names.get(name, name)]

    def refresh(self, name: str, reader: Node | None) -> None:
        """Let `name` stand for what its memory holds now,
        by taking its view again if it is stale.
        """
        version = self.versions.get(self.owner(name), 0)
        if name not in self.views or self.fresh[name] == version:
            return
        parent = self.views[name]
        self.refresh(parent, reader)
        # An alias from an earlier write, not a view that some op took: it is what its parent is.
        if name not in self.made_by:
            self.names[name] = self.names.get(parent, parent)
            self.fresh[name] = version
            return
        view, _ = self.made_by[name]
        # Taking again what may be a copy would show a write that a copy does not see.
        if not is_view(view.target):
            raise _unclear(reader or view, name, self.owner(name), view.target)
        source = self.current(parent)
        results = tuple(
            replace(value, name=self.free(value.name), requires_grad=source.requires_grad)
            for value in view.results
        )
        args = (Ref(source.name), *renamed(view, self.names).args[1:])
        node_name = results[0].name if len(results) == 1 else self.free(view.name)
        self.append(replace(view, name=node_name, results=results, args=args))
        for value, result in zip(view.results, results, strict=True):
            if self.fresh[value.name] != version:
                self.names[value.name] = result.name
                self.fresh[value.name] = version

    def write(self, node: Node) -> None:
        """Write out an in-place op: its first operand, and all that shares its memory,
        is another value.
        """
        target = node.operands()[0]
        owner = self.owner(target)
        home = self.graph.producers[owner]
        if home.kind in ("input", "parameter"):
            raise CaptureError(
                f"{node.target} writes to {home.kind} {home.target} of the model",
                where=_place(node),
                why="what belongs to the caller would change behind its back, on every rank",
                fix="use the op that returns a new tensor (without the underscore)",
            )
        for name in node.operands():
            self.refresh(name, node)
        before = self.current(target)
        self.names[target] = self.new_value(renamed(node, self.names), before)
        version = self.versions[owner] = self.versions.get(owner, 0) + 1
        self.fresh[target] = version
        result = node.results[0].name
        self.names[result] = self.names[target]
        self.views[result], self.fresh[result] = target, version
        top, before = self.write_back(target, before, version, node)
        # Under no_grad: autograd keeps the gradient that flowed before the write.
        if not node.result.requires_grad:
            self.names[top] = self.without_gradient(node, before, self.current(top))
            self.versions[owner] = self.fresh[top] = version + 1
        if home.kind == "buffer":
            # Buffers may be written: the program returns their last value, which is copied back.
            self.mutations[home.target] = owner

    def write_back(
        self, child: str, before: Value, version: int, writer: Node
    ) -> tuple[str, Value]:
        """Make anew what `child` is a view of, up to the owner of the memory.

        Returns the last that was made, and what stood for it before the write.
        """
        while child in self.views:
            parent = self.views[child]
            if child in self.made_by:
                view, index = self.made_by[child]
                if not is_view(view.target):
                    self.refuse_later_reads(writer, child)
                    break
                # The other elements of the parent are those from before this write.
                self.refresh_before(parent, version, writer)
                before = self.current(parent)
                # A slice of everything: the child replaces the parent.
                if self.current(parent).shape == self.current(child).shape and (
                    packet_of(view.target) == "slice"
                ):
                    self.names[parent] = self.current(child).name
                    self.fresh[parent] = version
                    child = parent
                    continue
                rewritten_parent = written_back(
                    renamed(view, self.names),
                    index,
                    self.current(parent),
                    self.current(child),
                    self.free(parent),
                )
                if rewritten_parent is None:
                    raise _unclear(writer, child, parent, view.target)
                self.append(rewritten_parent)
                self.names[parent] = rewritten_parent.result.name
            else:
                self.names[parent] = self.names[child]
            self.fresh[parent] = version
            child = parent
        return child, before

    def refresh_before(self, name: str, version: int, writer: Node) -> None:
        """As refresh, for what a view was a view of just before the write of `version`."""
        owner = self.owner(name)
        self.versions[owner] = version - 1
        self.refresh(name, writer)
        self.versions[owner] = version

    def refuse_later_reads(self, writer: Node, child: str) -> None:
        """Raise CaptureError if others read the memory of `child`, which may be a copy,
        after the write.
        """
        owner, after = self.owner(child), False
        sharing = {name for name in self.views if self.owner(name) == owner} | {owner}
        sharing -= self.offspring(child)
        for node in self.graph.nodes:
            if after and sharing & set(node.operands()):
                name = next(name for name in node.operands() if name in sharing)
                raise _unclear(writer, child, name, self.made_by[child][0].target)
            after = after or node is writer
        if sharing & {*self.graph.outputs, *self.mutations.values()}:
            raise _unclear(writer, child, owner, self.made_by[child][0].target)

    def offspring(self, name: str) -> set[str]:
        """Return the names of the value and of all that are surely views of it."""
        views_of_it = {name}
        for view, parent in self.views.items():
            node = self.made_by.get(view)
            if parent in views_of_it and (node is None or is_view(node[0].target)):
                views_of_it.add(view)
        return views_of_it

    def new_value(self, node: Node, before: Value) -> str:
        """Append the functional form of an in-place op. Returns the name of its result."""
        packet = packet_of(node.target)
        result = node.result
        if packet == "copy_" or (packet == "fill_" and isinstance(node.args[1], Ref)):
            source = self.values[node.args[1].name]
            if source.dtype != before.dtype:
                cast = replace(source, name=self.free(result.name), dtype=before.dtype)
                self.make(node, "aten.to.dtype", cast, Ref(source.name), before.dtype)
                source = cast
            if source.shape != before.shape:
                self.make(node, "aten.expand.default", result, Ref(source.name), before.shape)
                source = result
            return source.name
        if packet in ("zero_", "fill_"):
            number = 0 if packet == "zero_" else node.args[1]
            if not isinstance(number, Ref):
                # A constant overwrites the value, so that no gradient comes from before.
                filled = replace(result, requires_grad=False)
                return self.make(node, "aten.full_like.default", filled, Ref(before.name), number)
        # add_ is add; __iadd__ and its like have a table.
        plain = node.target.replace(packet, _FUNCTIONAL.get(packet, packet[:-1]), 1)
        plain = _OTHER_OVERLOADS.get(plain, plain)
        node = replace(node, target=plain)
        computed_dtype = self.dtype(node, before)
        if computed_dtype == before.dtype:
            self.append(node)
            return result.name
        wide = replace(result, name=self.free(result.name), dtype=computed_dtype)
        self.append(replace(node, name=wide.name, results=(wide,)))
        return self.make(node, "aten.to.dtype", result, Ref(wide.name), before.dtype)

    def without_gradient(self, writer: Node, before: Value, after: Value) -> str:
        """Return the name of the value after a write where no gradient is recorded: autograd does
        not see the change.

        A gradient that flowed through the memory flows on as if nothing had been written, which is
        that of after + (before - before) with all but the first `before` detached. Numbers that are
        not finite count as 0 there, as their difference is no number.
        """
        if after.requires_grad:
            plain = replace(after, name=self.free(after.name), requires_grad=False)
            self.make(writer, "aten.detach.default", plain, Ref(after.name))
            after = plain
        if not before.requires_grad:
            return after.name
        finite = replace(before, name=self.free(before.name))
        self.make(writer, "aten.nan_to_num.default", finite, Ref(before.name), 0.0, 0.0, 0.0)
        fixed = replace(before, name=self.free(before.name), requires_grad=False)
        self.make(writer, "aten.detach.default", fixed, Ref(finite.name))
        nothing = replace(before, name=self.free(before.name))
        self.make(writer, "aten.sub.Tensor", nothing, Ref(finite.name), Ref(fixed.name))
        joined = replace(before, name=self.free(after.name))
        return self.make(writer, "aten.add.Tensor", joined, Ref(after.name), Ref(nothing.name))

    def make(self, like: Node, target: str, result: Value, *args: Any) -> str:
        """Append a call like another one, and return the name of its result."""
        self.append(
            replace(like, name=result.name, target=target, results=(result,), args=args, kwargs=())
        )
        return result.name

    def dtype(self, node: Node, before: Value) -> torch.dtype:
        """Return the type that the functional op gives,
        which an in-place op casts to that of its memory.

        Torch itself is asked, on meta tensors, where types differ: promotion has many rules.
        """
        operands = [self.values[name] for name in node.operands()]
        # An integer tensor and a float scalar promote to floating point.
        number = any(isinstance(leaf, float) for leaf in leaves(node.args))
        if all(value.dtype == before.dtype for value in operands) and not (
            number and not before.dtype.is_floating_point
        ):
            return before.dtype

        def leaf(item: Any) -> Any:
            """Return an argument as the op takes it: a meta tensor for a value,
            a number for a size.
            """
            if isinstance(item, Ref):
                value = self.values[item.name]
                return torch.empty(tuple(map(hint, value.shape)), dtype=value.dtype, device="meta")
            return hint(item) if hasattr(item, "hint") else item

        kwargs = {key: map_leaves(leaf, item) for key, item in node.kwargs}
        result = operator_of(node.target)(*map_leaves(leaf, node.args), **kwargs)
        return result.dtype


_OTHER_OVERLOADS = {
    "aten.transpose.default": "aten.transpose.int",
}
_FUNCTIONAL = {f"__i{name}__": f"__{name}__" for name in ("and", "or", "xor", "lshift", "rshift")}


def _is_in_place(node: Node) -> bool:
    """Return whether the call writes to its first operand, by torch's naming:
    a trailing underscore, or __iand__.
    """
    packet = packet_of(node.target)
    return node.kind == "call" and (
        packet in _FUNCTIONAL or (packet.endswith("_") and not packet.endswith("__"))
    )


def _require_pure(node: Node) -> None:
    """Raise CaptureError for an op that writes to an operand otherwise than in-place ops do."""
    if node.kind != "call":
        return
    schema = schema_of(operator_of(node.target))
    named = dict(node.kwargs)
    for at, argument in enumerate(schema.arguments):
        operand = node.args[at] if at < len(node.args) else named.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write and operand:
            raise CaptureError(
                f"{node.target} writes to its argument {argument.name}",
                where=_place(node),
                why="whoever shares that memory would have to read what it makes",
                fix="use what the op returns (without out=)",
            )


def _place(node: Node) -> str:
    """Return the module's path and the source line, for an error."""
    return ", ".join(text for text in (node.where, node.line) if text)


def _unclear(node: Node, name: str, other: str, view: str) -> CaptureError:
    """Return the error for a read of memory that may or may not have been written."""
    return CaptureError(
        f"{node.target} needs to know whether %{name} shares memory with %{other}",
        where=_place(node),
        why=f"{view} lies between them: it may be a view or a copy, or sees one element twice, "
        "and one of them was written in place",
        fix="use the op that returns a new tensor (without the underscore)",
    )
