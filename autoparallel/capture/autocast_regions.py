"""Autocast regions of an exported program, whose casts become calls of the graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch

from autoparallel.capture.autocast import casts_of
from autoparallel.capture.graph_builder import GraphBuilder
from autoparallel.errors import CaptureError
from autoparallel.graph.graph import Node, Ref, map_leaves
from autoparallel.support.torch_private import tree_leaves

__all__ = ["AutocastRegions"]


class AutocastRegions:
    """The autocast regions of a program whose nodes are written by `builder`.

    region: device and type of the one that is being translated, None outside of all.
    """

    def __init__(self, builder: GraphBuilder) -> None:
        self.builder = builder
        self.region: tuple[str, torch.dtype] | None = None

    @contextmanager
    def entered(self, device: str, dtype: torch.dtype, enabled: bool) -> Iterator[None]:
        """Be in a region within. enabled: false of a region in which autocast is off."""
        # Regions may lie inside of others: behind the inner one the outer one goes on.
        outer, self.region = self.region, (device, dtype) if enabled else None
        try:
            yield
        finally:
            self.region = outer

    def cast(self, node: Any, args: Any, kwargs: Any, grad: bool) -> tuple[Any, Any]:
        """Add the casts that autocast makes before a call, and return its arguments with them.

        node: the call, of the exported program. args, kwargs: as translated; outside of a region
        they are returned as they are. grad: whether gradients are recorded there. Raises
        CaptureError where casts do not explain the call's types.
        """
        if self.region is None:
            return args, kwargs
        device, dtype = self.region
        examples = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda item: item.meta["val"])
        casts: dict[int, torch.dtype] | None = None
        devices = {
            leaf.device.type for leaf in tree_leaves(examples) if isinstance(leaf, torch.Tensor)
        }
        if devices <= {device}:
            with suppress(RuntimeError):
                casts = casts_of(node.target, *examples, device, dtype)
        if casts is None:
            on = ", ".join(sorted(devices))
            raise CaptureError(
                f"what autocast does to {node.target} cannot be told",
                where=self.builder.origins.where(node),
                why=f"the region is for {device}, and the model is on {on}"
                if devices != {device}
                else "casts of its operands do not explain it, or it cannot be tried",
                fix="cast explicitly, or run the whole model in the lower precision",
            )
        position = -1
        origins, line = self.builder.origins, self.builder.origins.line(node)

        def leaf(item: Any) -> Any:
            """Return an argument of the call, cast where it is an operand that autocast casts."""
            nonlocal position
            if not isinstance(item, Ref):
                return item
            position += 1
            value = self.builder.values[item.name]
            if position not in casts or casts[position] == value.dtype:
                return item
            name, kind = self.builder.fresh(f"{item.name}_cast"), casts[position]
            flows = grad and value.requires_grad
            result = replace(value, name=name, dtype=kind, requires_grad=flows)
            operands, scope = (item, kind), origins.scope(node)
            cast = Node(name, "call", "aten.to.dtype", (result,), operands, (), scope, line)
            self.builder.add(cast, grad, origins.frames(node))
            # A cast to another type is no view, which `follow` could not know.
            self.builder.writes[name] = ()
            return Ref(name)

        return map_leaves(leaf, args), map_leaves(leaf, kwargs)
