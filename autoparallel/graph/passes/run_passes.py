"""The passes in their order, each verified after it ran."""

from __future__ import annotations

from collections.abc import Callable

from autoparallel.graph.graph import (
    Graph,
)
from autoparallel.graph.passes.attention_dropout import explicit_attention_dropout
from autoparallel.graph.passes.bias_and_mean import split_bias, split_mean
from autoparallel.graph.passes.causal_masks import explicit_causal_masks
from autoparallel.graph.passes.complex_writes import real_scatters
from autoparallel.graph.passes.counted_rows import check_counts
from autoparallel.graph.passes.experts_in_turn import join_experts_in_turn
from autoparallel.graph.passes.flattened_batches import explicit_bias_of_batches, unmerge_batches
from autoparallel.graph.passes.flattened_products import unflatten_products, unmerge_losses
from autoparallel.graph.passes.functionalize import functional
from autoparallel.graph.passes.join_norms import join_norms
from autoparallel.graph.passes.join_slices import join_slices, join_writes
from autoparallel.graph.passes.label_rows import apart_labels
from autoparallel.graph.passes.masked_rows import keep_masked_rows
from autoparallel.graph.passes.merged_dims import see_through_merges
from autoparallel.graph.passes.no_grad import explicit_stops
from autoparallel.graph.passes.normalize import (
    drop_empty_parts,
    drop_identities,
    drop_unused,
    explicit_sizes,
    merge_reshapes,
    types_alone,
)
from autoparallel.graph.passes.repeats import explicit_repeats
from autoparallel.graph.passes.sorted_experts import join_routed_experts
from autoparallel.graph.passes.split_rows import join_split_rows

__all__ = ["PASSES", "run_passes"]


PASSES: tuple[Callable[[Graph], Graph], ...] = (
    # First of all in-place ops go: every later pass may take a value to have one meaning.
    functional,
    real_scatters,
    # Then what no user wrote as such: types of other tensors, regions without gradient.
    types_alone,
    explicit_stops,
    explicit_attention_dropout,
    # One form for each thing, before anything looks for patterns.
    drop_empty_parts,
    drop_identities,
    explicit_sizes,
    explicit_causal_masks,
    join_norms,
    # Structure that a split must see: blocks of a dim, and dims that were flattened.
    join_slices,
    join_writes,
    explicit_repeats,
    join_split_rows,
    join_routed_experts,
    join_experts_in_turn,
    apart_labels,
    # What is left of sizes that depend on values: rows that a mask drops.
    keep_masked_rows,
    check_counts,
    see_through_merges,
    explicit_bias_of_batches,
    unmerge_batches,
    unflatten_products,
    unmerge_losses,
    merge_reshapes,
    drop_identities,
    # Last, because passes above look for products with a bias and for losses with a mean.
    split_bias,
    split_mean,
    drop_unused,
)


def run_passes(graph: Graph) -> Graph:
    """Return the graph after all passes, in order, each verified. Raises CaptureError where the
    program writes to memory that it must not.
    """
    for run in PASSES:
        graph = run(graph).verify()
    return graph
