"""The values of a graph that are weights: parameters, and what is computed from one alone."""

from __future__ import annotations

from autoparallel.graph.graph import Graph

__all__ = ["weight_values"]


def weight_values(graph: Graph) -> set[str]:
    """Return the parameters, and the values computed from one of them alone: casts, transposes.

    Values computed from several together (a norm of position embeddings, say) are treated as
    activations.

    >>> import torch, autoparallel
    >>> layer, inputs = torch.nn.Linear(8, 6, bias=False), torch.zeros(4, 8)
    >>> plan = autoparallel.make_plan(layer, 2, example_inputs=inputs)
    >>> sorted(weight_values(plan.captured.graph))
    ['p_weight']
    """
    weights: set[str] = set()
    for node in graph.nodes:
        operands = set(node.operands())
        alone = len(operands) == 1 and operands <= weights
        if node.kind == "parameter" or (node.kind == "call" and alone):
            weights.update(value.name for value in node.results)
    return weights
