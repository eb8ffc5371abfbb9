"""Published steps with stages, predicted as the product plans and times them.

    python benchmarks/published_pipelines.py [--only llama] [--row 9] [--own]

Each row is planned on its own mesh of stages, data and tensor parallelism, with parameters split as
published, and cut into stages by the planner; its passes are walked in the order of torch's
schedule, interleaved where the row is. Nothing is fitted to a row. As in published.py, what kernels
of the time fused is taken off the seconds of Megatron's ops. What the planner chooses for each row
is told by published_choices.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from autoparallel.analysis.pipeline_step import link_of_stages, passes_of, step_of
from autoparallel.analysis.timeline import passes_of_stage
from autoparallel.cost.hardware import Hardware, find_hardware
from autoparallel.graph.captured import Captured
from autoparallel.graph.part_sizes import layout_fraction
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.placement import Invariant, Layout
from autoparallel.plan import Plan
from autoparallel.planning.pipelines import pipeline_plan
from autoparallel.rewrite.stages import cut_plan, stages_of_calls
from megatron_rules.papers import GRADIENT_PASSES, Transformer, build, not_written

__all__ = ["Row", "captured_transformer", "interleaved", "llama", "pipelined", "planned"]

# A script finds the files beside it, and not the package that they are.
sys.path.append(str(Path(__file__).parents[1]))

ROWS: dict[str, Any] = json.loads(Path(__file__).with_name("published.json").read_text())


@dataclass(frozen=True)
class Row:
    """One printed figure beside ours: what, in FLOP/s per device or seconds of a step."""

    what: str
    ours: float
    printed: float
    unit: str
    plan: Plan

    @property
    def error(self) -> float:
        """The relative error."""
        return self.ours / self.printed - 1

    def __str__(self) -> str:
        scale = 1e-12 if self.unit == "TFLOP/s" else 1.0
        ours, printed = self.ours * scale, self.printed * scale
        return f"{self.what:44}{ours:9.1f}{printed:9.1f} {self.unit:8}{self.error:+7.1%}"


@lru_cache(maxsize=1)
def captured_transformer(model: Transformer, batch: int) -> tuple[Captured, dict[str, Any]]:
    """Return the traced model for a step's whole batch, and Megatron's partition of it."""
    from autoparallel.capture.graph_breaks import trace
    from autoparallel.rules.lookup import find_rule

    module, pins = build(model)
    traced = trace(module, (), module.model.example_inputs(batch=batch), known=find_rule)
    assert isinstance(traced, Captured)
    return traced, pins


def planned(
    model: Transformer,
    row: Mapping[str, Any],
    hardware: Hardware,
    recompute: str,
    sequence: bool,
    overlap: bool,
    own: bool = False,
    memory_limit: int | None = None,
) -> Plan:
    """Return the plan of one row: on its mesh, with its micro-batches, and its split of weights.

    own: the planner chooses the micro-batches and the splits. memory_limit: bytes of a device; only
    where it is too little for them, copies that are gathered for products are not kept.
    """
    captured, pins = captured_transformer(model, row["batch"])
    replicas = row["devices"] // row["tensor"] // row["stages"]
    axes = {"pp": row["stages"], "dp": replicas, "tp": row["tensor"]}
    mesh = Mesh(**{name: size for name, size in axes.items() if size > 1 or name == "pp"})
    several = replicas > 1
    options = Options(
        sequence_parallel=sequence,
        data_parallel=several,
        hardware=hardware.name,
        tokens=1,
        optimizer="mixed_adam",
        recompute=recompute,
        overlap=overlap,
        microbatches=row["batch"] // replicas // row["micro_batch"],
        stages_per_rank=row["chunks"],
        memory_limit=memory_limit,
    )
    # The axes of a stage: that of tensors may be left out, or stand for none at all.
    tensors = row["tensor"] > 1 or not several
    layouts: dict[str, Layout] | None = {
        path: (
            *((Invariant(),) * several),
            *(place if row["tensor"] > 1 else (Invariant(),))[:tensors],
        )
        for path, place in pins.items()
    }
    if own:
        options, layouts = replace(options, microbatches=None), None
    return pipeline_plan(captured, "GPT", mesh, options, pins=layouts)


def seconds_of(plan: Plan, hardware: Hardware, fused: bool = True) -> float:
    """Return the seconds of a step of a plan with stages.

    fused: whether the kernels that Megatron-LM fused are counted, and its passes over gradients.
    """
    pipeline = plan.pipeline
    assert pipeline is not None
    link = link_of_stages(plan, pipeline.ranks, hardware)
    if fused:
        assert plan.captured is not None
        # That of the stage which all others wait for, if it is a heavy one.
        pace = hardware.slowest(plan.world_size // pipeline.ranks)
        inside = {name for group in plan.recomputed for name in group}
        stage_of = stages_of_calls(plan.captured.graph, pipeline.starts)
        ahead, both = list(pipeline.forward_seconds), list(pipeline.seconds)
        for name, (forward, backward) in not_written(plan, hardware).items():
            stage = stage_of[name]
            ahead[stage] -= forward * pace
            both[stage] -= (forward * (2 if name in inside else 1) + backward) * pace
        sizes = tuple(size for _, size in plan.mesh.axes)
        elements = [0.0] * pipeline.stages
        stored = {row.name: row for row in plan.parameters}
        first: dict[str, int] = {}
        for op in plan.ops:
            for name in op.reads:
                if name in stored and op.name in stage_of:
                    first.setdefault(name, stage_of[op.name])
        for name, stage in first.items():
            row = stored[name]
            elements[stage] += row.nbytes / 2 * layout_fraction(row.shape, row.storage, sizes)
        once = [
            seconds + 2 * GRADIENT_PASSES * count / hardware.sustained_bytes_per_second
            for seconds, count in zip(pipeline.once_seconds, elements, strict=True)
        ]
        pipeline = replace(
            pipeline,
            forward_seconds=tuple(ahead),
            seconds=tuple(both),
            once_seconds=tuple(once),
        )
    return step_of(pipeline, passes_of(pipeline, link))[0]


def with_waiting_forward(plan: Plan) -> Plan:
    """Return a plan whose forward passes wait for each collective, as Megatron-LM's did in 2022.

    Its backward passes compute gradients of weights meanwhile. published.py times layers so, too.
    """
    pipeline, captured = plan.pipeline, plan.captured
    assert pipeline is not None
    assert captured is not None
    waiting = replace(plan, options=replace(plan.options, overlap=False))
    hardware = find_hardware(plan.options.hardware)

    def ahead(each: Plan) -> list[float]:
        """Return the seconds of every stage's forward pass."""
        stages = cut_plan(captured.graph, each)
        return [passes_of_stage(stage.plan, hardware).forward for stage in stages]

    longer = [late - soon for late, soon in zip(ahead(waiting), ahead(plan), strict=True)]
    forward, both = (
        tuple(seconds + more for seconds, more in zip(each, longer, strict=True))
        for each in (pipeline.forward_seconds, pipeline.seconds)
    )
    return replace(plan, pipeline=replace(pipeline, forward_seconds=forward, seconds=both))


def pipelined(only: int | None = None, own: bool = False) -> Iterator[Row]:
    """Yield the FLOP/s per device of the rows of arXiv:2104.04473, each on its own layout.

    own: with the planner's own splits and micro-batches on the same mesh.
    """
    table = ROWS["pipelined"]
    hardware = find_hardware(table["hardware"])
    for number, row in enumerate(table["rows"]):
        if (only is not None and number != only) or row["stages"] == 1:
            continue  # without stages, published.py tells it
        model = Transformer.of(row, table)
        # Megatron-LM of the time waited for each collective.
        plan = planned(model, row, hardware, "full", False, False, own)
        rate = model.flops(row["batch"], again=True) / row["devices"] / seconds_of(plan, hardware)
        what = f"{row['parameters'] / 1e9:g} B on {row['devices']} A100, {row['chunks']} chunks"
        yield Row(what, rate, row["flops_per_second"], "TFLOP/s", plan)


def interleaved(only: int | None = None) -> Iterator[Row]:
    """Yield the seconds of the rows of arXiv:2205.05198, with both ways to recompute."""
    table = ROWS["selective"]
    hardware = find_hardware(table["hardware"])
    for number, row in enumerate(table["rows"]):
        if (only is not None and number != only) or row["stages"] == 1:
            continue
        model = Transformer.of(row, table)
        for recompute, sequence in (("full", False), ("selective", True)):
            plan = planned(model, row, hardware, recompute, sequence, True)
            plan = with_waiting_forward(plan)
            what = f"{row['parameters'] / 1e9:g} B on {row['devices']} A100, {recompute}"
            printed = row[f"seconds_{recompute}"]
            yield Row(what, seconds_of(plan, hardware), printed, "s", plan)


def llama(only: int | None = None) -> Iterator[Row]:
    """Yield the FLOP/s per device of Llama 3 405B as its paper prints them (arXiv:2407.21783)."""
    from benchmarks.published_llama import captured_llama, partition

    table = ROWS["llama_405b"]
    hardware = find_hardware(table["hardware"])
    for number, row in enumerate(table["rows"]):
        if only is not None and number != only:
            continue
        captured = captured_llama(tuple(table["model"].items()), row["batch"])
        replicas = row["devices"] // row["tensor"] // row["stages"]
        options = Options(
            data_parallel=True,
            hardware=hardware.name,
            tokens=1,
            optimizer="mixed_adam",
            recompute="none",
            microbatches=row["batch"] // replicas // row["micro_batch"],
            stages_per_rank=row["chunks"],
        )
        mesh = Mesh(pp=row["stages"], dp=replicas, tp=row["tensor"])
        pins = {path: (Invariant(), place) for path, place in partition(captured).items()}
        plan = pipeline_plan(captured, "Llama", mesh, options, pins=pins)
        sizes = table["model"]
        tokens = row["batch"] * sizes["sequence"]
        flops = flops_of_llama(sizes) * tokens / row["devices"]
        what = f"405 B on {row['devices']} H100, {row['chunks']} chunks"
        rate = flops / seconds_of(plan, hardware, fused=False)
        yield Row(what, rate, row["flops_per_second"], "TFLOP/s", plan)


def flops_of_llama(sizes: Mapping[str, int]) -> float:
    """Return the FLOPs of a step per token: 6 for each weight of products, and causal attention's
    two products, of which half are counted.
    """
    hidden, inner, layers = sizes["hidden"], sizes["inner"], sizes["layers"]
    share = sizes["groups"] / sizes["heads"]
    weights = layers * (hidden * hidden * (2 + 2 * share) + 3 * hidden * inner)
    weights += sizes["vocabulary"] * hidden
    return 6 * weights + 6 * layers * hidden * sizes["sequence"]


TABLES = {each.__name__: each for each in (pipelined, interleaved, llama)}


def main() -> None:
    """Print the rows, or those asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(TABLES), help="tables, comma-separated")
    parser.add_argument("--row", type=int, help="one row of each, by its number")
    parser.add_argument("--own", action="store_true", help="pipelined, as the planner chooses")
    options = parser.parse_args()
    print(f"{'':44}{'ours':>9}{'printed':>9}")
    for name in options.only.split(","):
        rows = pipelined(options.row, True) if options.own else TABLES[name](options.row)
        for row in rows:
            print(row, row.plan.pipeline, row.plan.method, flush=True)


if __name__ == "__main__":
    main()
