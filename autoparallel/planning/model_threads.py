"""The threads of a model that nobody has planned yet."""

from __future__ import annotations

from typing import Any

from torch import nn

from autoparallel.capture.example_inputs import example_call
from autoparallel.capture.global_reads import undisturbed
from autoparallel.capture.refused_models import refuse_wrapped
from autoparallel.errors import CaptureError
from autoparallel.graph.captured import Captured
from autoparallel.graph.inert_calls import inert_calls
from autoparallel.options import Options
from autoparallel.planning.plan_model import trace_model
from autoparallel.rules.lookup import known_rule
from autoparallel.strategy.rule_matching import match_rules
from autoparallel.support.pytree import leaf_paths
from autoparallel.threads import Threads, find_threads

__all__ = ["trace_threads"]


def trace_threads(
    model: nn.Module, *, example_inputs: Any = None, unknown_ops: str = "discover"
) -> Threads:
    """Return the threads of a model: every dim, followed through the dataflow. Nothing is planned.

    model: any module; it is left as it is. example_inputs: as in make_plan. unknown_ops: of ops
    that nobody wrote a rule for, "discover" tries how their dims hang together; with "replicate"
    such an op ends what it reads and begins what it makes.
    Raises InputsNeededError without example inputs, and CaptureError for a model that cannot be
    traced whole, whose parts `make_plan` plans one by one: see `Plan.threads` for these.

        >>> import torch
        >>> layers = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        >>> threads = trace_threads(layers, example_inputs=torch.ones(8, 64))
        >>> [thread.name for thread in threads.threads]
        ['feed-forward', 'features', 'features', 'batch']
    """
    refuse_wrapped(model)
    options = Options(unknown_ops=unknown_ops)
    with undisturbed(model):
        args, kwargs = example_call(model, example_inputs)
        traced = trace_model(model, args, kwargs, options)
    if not isinstance(traced, Captured):
        raise CaptureError(
            f"{type(model).__name__} cannot be traced whole",
            why="\n".join(map(str, traced.breaks)),
            fix="plan it: make_plan(model, ...).parts have threads each, part.plan.threads()",
        )
    graph = traced.graph
    matched = match_rules(graph, inert_calls(graph), options, 2)
    paths = leaf_paths(traced.inputs, "tensor")
    inputs = [node.name for node in graph.nodes if node.kind == "input"]
    return find_threads(
        graph,
        dict(zip(inputs, paths, strict=True)),
        lambda call: matched[call.node.name].rule or known_rule(call),
    )
