"""The trace of a whole model for inputs that it takes; others are refused in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from autoparallel.capture.branch_ways import Ways
from autoparallel.capture.graph_breaks import trace
from autoparallel.capture.refused_inputs import refuse_arrays, refuse_inputs, refuse_types
from autoparallel.errors import AliasError, CaptureError
from autoparallel.graph.captured import Captured
from autoparallel.graph.graph import Node
from autoparallel.rules.lookup import find_rule, known_rule
from autoparallel.rules.rule import OpCall

__all__ = ["trace_whole"]


def trace_whole(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], ways: Ways | None = None
) -> Captured:
    """Return the graph of the whole model for a call of it.

    args, kwargs: of the call. ways: as of `trace`. Raises InputMismatchError for inputs that the
    model itself does not take, AliasError where it keeps a view of a parameter, and CaptureError
    where it has no such graph.

    >>> import torch
    >>> inputs = torch.ones(4, 2, dtype=torch.float64)
    >>> trace_whole(nn.Linear(2, 3), (inputs,), {})
    Traceback (most recent call last):
    autoparallel.errors.InputMismatchError: Linear.forward does not take inputs like these
    ...
    """
    refuse_arrays(model, args, kwargs)
    try:
        captured = trace(model, args, kwargs, known=find_rule, ways=ways)
    except AliasError:
        raise
    except CaptureError:
        # Tracing also fails for inputs that the model does not take, which is told in its words.
        refuse_inputs(model, args, kwargs)
        raise
    graph = captured.graph

    def is_product(node: Node) -> bool:
        """Return whether a call multiplies matrices: its rule counts the FLOPs of a product."""
        rule = known_rule(OpCall.of(graph, node))
        return rule is not None and rule.flops > 0

    refuse_types(model, args, kwargs, graph, is_product)
    return captured
