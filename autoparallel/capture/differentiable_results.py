"""Results of an op to which torch gives no gradient, although operands of it have one.

Batch norm gives none to the statistics that it returns, and a histogram has none at all. No schema
says so; autograd knows, so that it is asked, once for each op and each choice of its operands that
may have one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx.node import map_arg

from autoparallel.support.torch_private import OpOverload, hint_of, is_composite, schema_of

__all__ = ["differentiable_results"]

_known: dict[tuple[Any, ...], tuple[bool, ...]] = {}


def differentiable_results(node: torch.fx.Node) -> tuple[bool, ...]:
    """Return for each result of a call whether a gradient may flow back from it.

    node: the call of an op in an exported program. Ops that write, that run nowhere but on data, or
    that have one result and are defined by other ops are taken for differentiable, and so is what
    is no number or made of whole numbers alone.

    >>> norm = torch.ops.aten.native_layer_norm.default
    >>> class Norm(torch.nn.Module):
    ...     def forward(self, x):
    ...         return norm(x, [4], None, None, 1e-5)
    >>> from torch.export import export
    >>> program = export(Norm(), (torch.ones(2, 4),))
    >>> differentiable_results(program.graph.find_nodes(op="call_function", target=norm)[0])
    (True, False, False)
    """
    examples = node.meta["val"]
    results = (examples,) if isinstance(examples, torch.Tensor) else tuple(examples)
    operation: Any = node.target
    everything = (True,) * len(results)
    if not isinstance(operation, OpOverload) or schema_of(operation).is_mutable:
        return everything
    carrying: list[bool] = []
    map_arg(
        (node.args, node.kwargs),
        lambda operand: carrying.append(_carries(operand.meta.get("val"))),
    )
    if not any(carrying) or not any(map(_carries, results)):
        return everything
    # Lists have as many results as the call asks for, alike in this. The square root of a whole
    # number has no gradient, and that of another number has one.
    key: tuple[Any, ...] = operation, tuple(carrying), tuple(map(_carries, results))
    if is_composite(operation):
        if len(results) == 1:
            return everything
        # Which ops it consists of may depend on the other arguments.
        key += (str(map_arg((node.args, node.kwargs), lambda operand: None)),)
    if key not in _known:
        _known[key] = _asked(node, results) or everything
    return _known[key]


def _carries(tensor: Any) -> bool:
    """Return whether numbers of a tensor's type may have a gradient."""
    return isinstance(tensor, torch.Tensor) and (tensor.is_floating_point() or tensor.is_complex())


def _asked(node: torch.fx.Node, results: Sequence[Any]) -> tuple[bool, ...] | None:
    """Return what autograd says of each result, None where the op does not run without data."""
    stand_in = functools.partial(map_arg, fn=lambda operand: _stand_in(operand.meta["val"]))
    try:
        with torch.enable_grad():
            made = node.target(*stand_in(node.args), **stand_in(node.kwargs))  # type: ignore[operator]
    except Exception:  # an op may be anyone's code
        return None
    found = (made,) if isinstance(made, torch.Tensor) else tuple(made)
    if len(found) != len(results):
        return None
    return tuple(not _carries(tensor) or tensor.requires_grad for tensor in found)


def _stand_in(value: Any) -> Any:
    """Return a trained tensor without data of the sizes of the example, or the example's number."""
    if isinstance(value, torch.Tensor):
        sizes = [int(_plain(size)) for size in value.shape]
        empty = torch.empty(sizes, dtype=value.dtype, device="meta")
        return empty.requires_grad_() if _carries(empty) else empty
    if isinstance(value, (list, tuple)):
        return [_stand_in(item) for item in value]
    return _plain(value)


def _plain(value: Any) -> Any:
    """Return a number, that of the example where it is symbolic."""
    return hint_of(value) if isinstance(value, (torch.SymInt, torch.SymFloat)) else value
