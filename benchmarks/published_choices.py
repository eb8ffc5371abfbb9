"""Published steps beside the planner's own choice for each, on the same devices.

    python benchmarks/published_choices.py [--row 9]

A line for each published row: its printed step; the step that is predicted for the published layout
(mesh, micro-batches, what is recomputed), run and overlapped as the product does, with the memory
that it needs: where a device has less than for all that was gathered for products, that is not
kept, as those who printed it did not (arXiv:2205.05198, section 4.2.2); and what the planner
chooses freely within 80 GB, mesh, schedule, splits and what is recomputed, with its predicted step.
The planner is to be at least as quick. Axes have the names of their places, outer and inner; those
that split the batch are told.
Rows 0 and 1 are Llama 3 405B (arXiv:2407.21783), the next ten those of arXiv:2104.04473 and the
last four those of arXiv:2205.05198.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from autoparallel.cost.hardware import find_hardware
from autoparallel.graph.captured import Captured
from autoparallel.mesh import MICROBATCH, Mesh, arrangements
from autoparallel.options import Options
from autoparallel.placement import Invariant, Shard
from autoparallel.plan import Plan
from autoparallel.planning.pipelines import pipeline_plan
from autoparallel.planning.plan_model import fastest_plan
from autoparallel.planning.stage_cuts import with_memory
from megatron_rules.papers import Transformer

# A script finds the files beside it, and not the package that they are.
sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.published_llama import captured_llama, partition
from benchmarks.published_pipelines import (
    ROWS,
    captured_transformer,
    flops_of_llama,
    planned,
)

__all__ = ["Choice", "choices"]

LIMIT = 80 * 10**9


@dataclass(frozen=True)
class Choice:
    """One published row. printed: its step in seconds. layout: the plan of its layout, with the
    memory of each rank. own: the planner's choice, which took `cpu_seconds` to find.
    """

    what: str
    printed: float
    layout: Plan
    own: Plan
    cpu_seconds: float

    @property
    def ratio(self) -> float:
        """The planner's predicted step as a share of that of the published layout."""
        return self.own.step / self.layout.step

    def __str__(self) -> str:
        needs = _needs(self.layout) / 1e9
        each = self.own.pipeline
        order = "" if each is None else f" x{each.stages // each.ranks}, {each.microbatches} parts"
        counts = Counter(mode for _, mode in self.own.recompute)
        again = sum(row.again for row in self.own.conversions)
        kept = [f"{counts[mode]} {mode}" for mode in sorted(counts)]
        kept += [f"{again} copies again"] if again else []
        return (
            f"{self.what:24}{self.printed:8.2f}{self.layout.step:8.2f} s ({needs:3.0f} GB)"
            f"{self.own.step:8.2f} s {self.ratio - 1:+7.1%}  {self.own.whole_mesh}{order}; "
            f"batch on {' and '.join(_axes_of_batch(self.own)) or 'none'}; "
            f"{', '.join(kept) or 'all kept'}; {self.cpu_seconds:.0f} s of CPU"
        )


def _needs(plan: Plan) -> int:
    """Return the bytes of the rank that needs most, of a plan with stages."""
    pipeline = with_memory(plan).pipeline
    assert pipeline is not None
    return max(pipeline.memory)


def _axes_of_batch(plan: Plan) -> list[str]:
    """Return the mesh axes, but that of micro-batches, which split the batch of most products."""
    every = sum(op.whole_flops for op in plan.ops)
    return [
        name
        for axis, (name, _) in enumerate(plan.mesh.axes)
        if name != MICROBATCH
        and sum(op.whole_flops for op in plan.ops if op.results and op.results[0][axis] == Shard(0))
        > every / 2
    ]


def choices(only: int | None = None) -> Iterator[Choice]:
    """Yield the published rows, or the one of that number."""
    tables = ("llama_405b", "pipelined", "selective")
    rows = [(name, row) for name in tables for row in ROWS[name]["rows"]]
    for number, (name, row) in enumerate(rows):
        if only is None or number == only:
            yield _choice(name, row)


def _choice(name: str, row: Mapping[str, Any]) -> Choice:
    """Return one row of a table."""
    table = ROWS[name]
    hardware = find_hardware(table["hardware"])
    options = Options(
        data_parallel=True,
        hardware=hardware.name,
        tokens=1,
        optimizer="mixed_adam",
        recompute="auto",
        memory_limit=LIMIT,
    )
    if name == "llama_405b":
        sizes = table["model"]
        captured = captured_llama(tuple(sizes.items()), row["batch"])
        flops, parameters = flops_of_llama(sizes) * row["batch"] * sizes["sequence"], 405.0
        layout = _llama_layout(captured, row, options)
    else:
        model = Transformer.of(row, table)
        captured = captured_transformer(model, row["batch"])[0]
        flops, parameters = model.flops(row["batch"], again=True), row["parameters"] / 1e9
        recompute = "full" if name == "pipelined" else "selective"
        layout = planned(model, row, hardware, recompute, True, True)
        if _needs(layout) > LIMIT:
            layout = planned(model, row, hardware, recompute, True, True, memory_limit=LIMIT)
    printed = row.get("seconds_selective") or flops / row["devices"] / row["flops_per_second"]
    meshes = arrangements(row["devices"], hardware.devices_per_node)
    began = time.process_time()
    own = fastest_plan(nn.Module(), captured, meshes, options)
    took = time.process_time() - began
    what = f"{parameters:g} B on {row['devices']} {hardware.name.removeprefix('dgx-').upper()}"
    return Choice(what, printed, with_memory(layout), own, took)


def _llama_layout(captured: Captured, row: Mapping[str, Any], options: Options) -> Plan:
    """Return the plan of Meta's layout; which blocks are recomputed in it is not printed."""
    replicas = row["devices"] // row["tensor"] // row["stages"]
    asked = replace(
        options,
        microbatches=row["batch"] // replicas // row["micro_batch"],
        stages_per_rank=row["chunks"],
    )
    mesh = Mesh(pp=row["stages"], dp=replicas, tp=row["tensor"])
    pins = {path: (Invariant(), place) for path, place in partition(captured).items()}
    return pipeline_plan(captured, "Llama", mesh, asked, pins=pins)


def main() -> None:
    """Print the rows, or the one asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--row", type=int, help="one row, by its number")
    options = parser.parse_args()
    # A plan that was kept says nothing of how long it takes to find.
    os.environ["AUTOPARALLEL_KEEP_PLANS"] = "0"
    print(f"{'':24}{'printed':>8}{'its layout':>19}{'own choice':>10}")
    for choice in choices(options.row):
        print(choice, flush=True)


if __name__ == "__main__":
    main()
