"""The published partition, stated as a plan: how Megatron-LM splits each parameter.

This is a person's table for one kind of model, by parameter names. The planner never reads it; it
is what the planner's own plan is compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from autoparallel.api import make_plan
from autoparallel.errors import PlanError
from autoparallel.mesh import Mesh
from autoparallel.placement import Invariant, Placement, Shard
from autoparallel.plan import Plan

__all__ = ["PARTITIONS", "partition", "recipe"]

COLUMN, ROW = Shard(0), Shard(1)
FUSED = Shard(0, blocks=3)

# Per kind of model (the class's name), patterns of parameter paths. Parameters that no pattern
# names are whole: norms, biases of row-parallel products, position embeddings, BERT's dense head.
# Sources: arXiv:1909.08053 section 3 (column then row, heads, vocabulary).
PARTITIONS: Mapping[str, tuple[tuple[str, Placement], ...]] = {
    "GPT": (
        ("token_embedding.weight", COLUMN),
        ("*.query_key_value.*", FUSED),
        ("*.projection.weight", ROW),
        ("*.feed_forward.expand.*", COLUMN),
        ("*.feed_forward.contract.weight", ROW),
    ),
    "Bert": (
        ("token_embedding.weight", COLUMN),
        ("head_bias", COLUMN),
        ("*.query_key_value.*", FUSED),
        ("*.projection.weight", ROW),
        ("*.feed_forward.expand.*", COLUMN),
        ("*.feed_forward.contract.weight", ROW),
    ),
    # Hugging Face's GPT-2 keeps its weights transposed: (in, out).
    "GPT2LMHeadModel": (
        ("lm_head.weight", COLUMN),
        ("transformer.wte.weight", COLUMN),
        ("*.c_attn.weight", Shard(1, blocks=3)),
        ("*.c_attn.bias", FUSED),
        ("*.attn.c_proj.weight", Shard(0)),
        ("*.c_fc.weight", Shard(1)),
        ("*.c_fc.bias", COLUMN),
        ("*.mlp.c_proj.weight", Shard(0)),
    ),
    "BertForMaskedLM": (
        ("cls.predictions.decoder.*", COLUMN),
        ("cls.predictions.bias", COLUMN),
        ("bert.embeddings.word_embeddings.weight", COLUMN),
        ("*.self.query.*", COLUMN),
        ("*.self.key.*", COLUMN),
        ("*.self.value.*", COLUMN),
        ("*.attention.output.dense.weight", ROW),
        ("*.intermediate.dense.*", COLUMN),
        ("*.layer.*.output.dense.weight", ROW),
    ),
    "LlamaForCausalLM": (
        ("model.embed_tokens.weight", COLUMN),
        ("lm_head.weight", COLUMN),
        ("*.q_proj.weight", COLUMN),
        ("*.k_proj.weight", COLUMN),
        ("*.v_proj.weight", COLUMN),
        ("*.o_proj.weight", ROW),
        ("*.gate_proj.weight", COLUMN),
        ("*.up_proj.weight", COLUMN),
        ("*.down_proj.weight", ROW),
    ),
}


def partition(model: nn.Module) -> dict[str, Placement]:
    """Return the placement in which Megatron-LM stores each parameter, by path.

    model: of one of the classes in PARTITIONS. Raises PlanError for any other: nobody has written a
    table for it.

    >>> class GPT(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.token_embedding, self.norm = nn.Embedding(4, 2), nn.LayerNorm(2, bias=False)
    >>> {path: str(placement) for path, placement in partition(GPT()).items()}
    {'token_embedding.weight': 'S(0)', 'norm.weight': 'I'}
    """
    kind = type(model).__name__
    if kind not in PARTITIONS:
        raise PlanError(
            f"no published partition for {kind}",
            why=f"the classes that have one are {', '.join(PARTITIONS)}",
            fix="let the planner find one (autoparallel.make_plan), or add a table to PARTITIONS",
        )
    placements: dict[str, Placement] = {}
    for path, _ in model.named_parameters(remove_duplicate=False):
        matches = (place for pattern, place in PARTITIONS[kind] if fnmatchcase(path, pattern))
        placements[path] = next(matches, Invariant())
    return placements


def recipe(
    model: nn.Module,
    world_size: int | None = None,
    *,
    mesh: Mesh | None = None,
    example_inputs: Any = None,
    **options: Any,
) -> Plan:
    """Return Megatron-LM's partition of `model` as a plan.

    Parameters are stored as published, and the planner chooses the rest.

    world_size, example_inputs, options: as of make_plan. mesh: its last axis is the tensor-parallel
    one; parameters are whole on the others. Raises PlanError as `partition` does.

    Example: `recipe(GPT(GPTConfig()), world_size=4).text()`
    """
    outer = (Invariant(),) * (len(mesh.axes) - 1 if mesh is not None else 0)
    pins = {path: (*outer, placement) for path, placement in partition(model).items()}
    return make_plan(
        model, world_size, mesh=mesh, example_inputs=example_inputs, pins=pins, **options
    )
