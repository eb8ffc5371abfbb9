"""Calls of the ops of autograd Functions, as a program is translated into a graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autoparallel.capture.custom_functions import FunctionOp
from autoparallel.capture.graph_builder import GraphBuilder
from autoparallel.errors import CaptureError
from autoparallel.graph.graph import Node, Ref

__all__ = ["FunctionCalls"]


class FunctionCalls:
    """The calls of Functions in a graph that `builder` writes.

    shared: calls whose results share an operand's memory, and the number of nodes up to each.
    """

    def __init__(self, builder: GraphBuilder) -> None:
        self.builder = builder
        self.shared: list[tuple[Node, FunctionOp, int]] = []

    def detached(self, node: Any, function: FunctionOp, args: Any, grad: bool) -> Any:
        """Return the arguments of a Function's op with those detached that it gives no gradient.

        node: the call, of the exported program. grad: whether gradients are recorded where it is.
        Then a graph says of each parameter whether a gradient reaches it.
        """
        rows = list(args)
        for index, gradient in enumerate(function.examined.gradients):
            value = self.builder.values[rows[index].name]
            if gradient or not (grad and self.builder.carries((value.name,))):
                continue
            name = self.builder.fresh("detach")
            result = replace(value, name=name, requires_grad=False)
            origins = self.builder.origins
            call = ("aten.detach.default", (result,), (rows[index],), ())
            self.builder.add(
                Node(name, "call", *call, origins.scope(node), origins.line(node)),
                grad,
                origins.frames(node),
            )
            self.builder.follow(self.builder.nodes[-1], False)
            rows[index] = Ref(name)
        return tuple(rows)

    def require_unwritten(self) -> None:
        """Raise CaptureError where memory that a Function's result shares is written to later.

        Torch returns a view of an operand as such, and the op a tensor in memory of its own.
        """
        builder = self.builder
        for node, function, after in self.shared:
            names = [node.operands()[at] for row in function.examined.sources for at in row]
            names += [value.name for value in node.results]
            later = builder.first_write(names, after)
            if later is not None:
                raise CaptureError(
                    f"the autograd.Function {function.name} returns a view of its operand, "
                    "which is written to",
                    where=later.line,
                    why="its op returns new memory, which would not follow",
                    fix="return x.clone() in its forward, or write to another tensor",
                )
