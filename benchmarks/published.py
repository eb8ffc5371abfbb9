"""Compares the cost model with published figures: step times, efficiencies, bytes.

    python benchmarks/published.py [--only iteration_times,weak_scaling] [--json out/published.json]

Every model is captured from plain modules on the meta device, planned to the published partition
and priced, as any user's model is; no weights and no GPU needed. The printed figures and their
sources are in published.json. Of the cost model's constants, the efficiency of V100 and A100 and
the `fill` of products are fitted to `iteration_times`; what is kept aside was fitted to nothing.

This file also says how the software of the time differed from plain modules:
- Kernels: in 2020 scale, mask and softmax were one kernel, so were bias and GELU, and bias,
  dropout and residual (Megatron-LM 1.0); what is between them is neither written nor read. In 2019
  every operation was a kernel, and PyTorch's took 2-byte elements one by one: they reached about
  half of the memory's rate (`KERNELS_2019`, the one figure fitted to the 39 TFLOP/s of one V100).
- The loss was in float32, over a split vocabulary.
- The optimizer was mixed-precision Adam; the gradients are cast, and read for their norm.
- Replicas added their gradients while the backward pass ran: 8.3 billion parameters lost 0.1 s to
  it, where the gradients take 0.33 s through the node's adapters.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autoparallel.cost.collective_times import collective_seconds, together_seconds
from autoparallel.cost.hardware import find_hardware
from autoparallel.placement import Collective, Movement
from megatron_rules.papers import Transformer, planned, step

# A script finds the files beside it, and not the package that they are.
sys.path.append(str(Path(__file__).parents[1]))

ROWS: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text())

# The share of the memory's rate that kernels of 2019 reached; fitted, see above.
KERNELS_2019 = 0.54


@dataclass(frozen=True)
class Line:
    """One printed figure beside ours.

    table: one of TABLES. what: names the row. ours, printed: in `unit`; "%" where both are shares.
    """

    table: str
    what: str
    ours: float
    printed: float
    unit: str

    @property
    def error(self) -> float:
        """The relative error; of shares, the difference."""
        return self.ours - self.printed if self.unit == "%" else self.ours / self.printed - 1

    def __str__(self) -> str:
        scale, digits = (100, 1) if self.unit == "%" else (1, 1 if self.printed > 10 else 3)
        points = " points" if self.unit == "%" else " %"
        numbers = [f"{number * scale:11.{digits}f}" for number in (self.ours, self.printed)]
        return f"{self.what:44}{''.join(numbers)} {self.unit:7}{self.error * 100:+7.1f}{points}"


def all_reduces() -> Iterator[Line]:
    """Yield the bus bandwidth of all-reduces by size, in GB/s."""
    for name, table in ROWS["all_reduces"].items():
        (link,) = find_hardware(table["hardware"]).links((table["devices"],))
        n = table["devices"]
        for size, rate in zip(table["bytes"], table["bus_bytes_per_second"], strict=True):
            seconds = collective_seconds(Collective.ALL_REDUCE, size, link, n)
            # NCCL's tests call this the bus bandwidth: what a ring sends per rank and second.
            ours = 2 * (n - 1) / n * size / seconds
            label = f"{name}, {n} devices, {size / 2**20:g} MiB"
            yield Line("all_reduces", label, ours / 1e9, rate / 1e9, "GB/s")


def iteration_times() -> Iterator[Line]:
    """Yield the milliseconds of a step, tensor parallel inside a node."""
    table = ROWS["iteration_times"]
    for name, (preset, batch) in table["hardware"].items():
        hardware = find_hardware(preset)
        for row in table["rows"]:
            cost = step(Transformer.of(row, table), row["tensor"], batch, hardware)
            ours = cost.seconds(hardware, row["tensor"]) * 1e3
            label = f"{name}, {row['parameters'] / 1e9:g} B on {row['tensor']}"
            yield Line("iteration_times", label, ours, row["milliseconds"][name], "ms")


def weak_scaling() -> Iterator[Line]:
    """Yield the efficiencies: FLOP/s per device, relative to those of one device."""
    table = ROWS["weak_scaling"]
    hardware = replace(find_hardware(table["hardware"]), memory_efficiency=KERNELS_2019)
    alone, lines = 0.0, []
    for row in table["rows"]:
        model, tensor, replicas = Transformer.of(row, table), row["tensor"], row["replicas"]
        flops = model.flops(table["batch"], again=True) / tensor
        cost = step(model, tensor, table["batch"], hardware, fused=False)
        rate = flops / cost.seconds(hardware, tensor)
        if not alone:
            alone, printed = rate, table["flops_per_second_one_device"]
            yield Line("weak_scaling", "one V100", rate / 1e12, printed / 1e12, "TFLOP/s")
        label = f"{row['parameters'] / 1e9:g} B on {tensor}"
        yield Line("weak_scaling", label, rate / alone, row["efficiency"], "%")
        (link, _) = hardware.links((replicas, tensor))
        reduction = together_seconds(Collective.ALL_REDUCE, cost.gradient_bytes, link, replicas)
        # The reduction runs beside the backward pass, which is taken as half of the computing.
        exposed = max(reduction - cost.work / 2, 0.0)
        seconds = cost.seconds(hardware, replicas * tensor) + exposed
        printed = row["efficiency_of_replicas"]
        label += f", {replicas} replicas"
        lines.append(Line("weak_scaling", label, flops / seconds / alone, printed, "%"))
    yield from lines


def pipelined_seconds(
    row: Mapping[str, Any], table: Mapping[str, Any], recompute: str, sequence_parallel: bool
) -> float:
    """Return the seconds of a step with stages of equal layers: 1F1B, interleaved in chunks.

    row, table: of published.json. recompute: "none", "selective" or "full". The bubble is (stages -
    1) / chunks micro-batches (arXiv:2104.04473, section 2.2).
    """
    hardware = find_hardware(table["hardware"])
    model, stages = Transformer.of(row, table), row["stages"]
    replicas = row["devices"] // row["tensor"] // stages
    cost = step(
        model,
        row["tensor"],
        row["micro_batch"],
        hardware,
        recompute=recompute,
        sequence_parallel=sequence_parallel,
    )
    micro_batches = row["batch"] // replicas // row["micro_batch"]
    micro_batch_seconds = cost.work * hardware.slowest(row["devices"]) + cost.communication
    return (
        micro_batch_seconds / stages * (micro_batches + (stages - 1) / row["chunks"])
        + cost.update / stages
    )


def pipelined() -> Iterator[Line]:
    """Yield the FLOP/s per device of models of up to a trillion parameters; kept aside, fitted to
    nothing.
    """
    table = ROWS["pipelined"]
    for row in table["rows"]:
        flops = Transformer.of(row, table).flops(row["batch"], again=True) / row["devices"]
        ours = flops / pipelined_seconds(row, table, "full", False)
        label = f"{row['parameters'] / 1e9:g} B on {row['devices']} A100"
        yield Line("pipelined", label, ours / 1e12, row["flops_per_second"] / 1e12, "TFLOP/s")


def selective() -> Iterator[Line]:
    """Yield the seconds of a step with full recomputation, and with selective and a split sequence;
    kept aside.
    """
    table = ROWS["selective"]
    for row in table["rows"]:
        label = f"{row['parameters'] / 1e9:g} B on {row['devices']} A100"
        for recompute, split in (("full", False), ("selective", True)):
            ours = pipelined_seconds(row, table, recompute, split)
            yield Line("selective", f"{label}, {recompute}", ours, row[f"seconds_{recompute}"], "s")


def pass_milliseconds(row: Mapping[str, Any], layers: int) -> tuple[float, float]:
    """Return the milliseconds of the forward and the backward pass of so many layers.

    row: of `layers` in published.json. The backward pass computes gradients of weights while those
    of activations are summed over the ranks; the forward pass waits for each collective.
    """
    from autoparallel.planning.predicted_step import timeline
    from megatron_rules.papers import not_written

    table = ROWS["layers"]
    hardware = find_hardware(table["hardware"])
    sizes = {**table, "layers": layers}
    plan = planned(
        Transformer.of(sizes, table),
        table["tensor"],
        table["batch"],
        hardware,
        row["recompute"],
        row["sequence_parallel"],
    )
    # What a device does by itself is done at the pace of the slowest.
    pace = hardware.slowest(table["tensor"])
    saved, inside = not_written(plan, hardware), {n for names in plan.recomputed for n in names}
    ops = []
    for op in plan.ops:
        forward, backward = saved.get(op.name, (0.0, 0.0))
        fewer = forward * (2 if op.name in inside else 1) + backward
        seconds, ahead = (op.seconds - fewer) * pace, (op.forward_seconds - forward) * pace
        ops.append(replace(op, seconds=seconds, forward_seconds=ahead))
    plan = replace(plan, ops=tuple(ops))
    waiting, beside = (timeline(plan, overlap=overlap) for overlap in (False, True))
    return waiting.forward_seconds * 1e3, beside.backward_seconds * 1e3


def layers() -> Iterator[Line]:
    """Yield the milliseconds of one layer's passes; kept aside."""
    for row in ROWS["layers"]["rows"]:
        # The difference leaves out embeddings and the loss. One layer alone is no repeated block.
        two, four = pass_milliseconds(row, 2), pass_milliseconds(row, 4)
        label = row["recompute"] + ", sequence parallel" * row["sequence_parallel"]
        for at, name in enumerate(("forward", "backward")):
            yield Line("layers", f"{name}, {label}", (four[at] - two[at]) / 2, row[name], "ms")


def sharded() -> Iterator[Line]:
    """Yield the tokens per second and device of Llama 3, fully sharded, also beside tensor
    parallelism; kept aside.
    """
    from benchmarks.published_llama import tokens_per_second

    table = ROWS["sharded"]
    for row in table["rows"]:
        ours = tokens_per_second(table["models"][row["model"]], row)
        where = f"{row['data']} × {row['tensor']} {row['hardware']}, {row['recompute']}"
        printed = row["tokens_per_second"]
        yield Line("sharded", f"{row['model']} on {where}", ours, printed, "tok/s")


def attention() -> Iterator[Line]:
    """Yield the TFLOP/s of fused attention by itself, forward or backward; kept aside."""
    from benchmarks.published_attention import attention_seconds

    table = ROWS["attention"]
    cudnn = find_hardware(table["hardware"])
    # Torch of 2024 took the other kernel; all else is of the same device.
    fused = find_hardware("h100-500w").matmul.fused
    older = replace(cudnn, matmul=replace(cudnn.matmul, fused=fused))
    for row in table["rows"]:
        hardware = cudnn if row["kernel"] == "cuDNN" else older
        for sequence, printed in zip(table["sequences"], row["tflops"], strict=True):
            sizes = table["tokens"] // sequence, table["hidden"] // row["width"], sequence
            forward, both = attention_seconds((*sizes, row["width"]), row["causal"], hardware)
            # Two products forward, five backward.
            flops = 4.0 * table["tokens"] * sequence * table["hidden"] / (1 + row["causal"])
            rate = flops / forward if row["pass"] == "forward" else 2.5 * flops / (both - forward)
            label = f"{row['kernel']}, {row['pass']}, heads of {row['width']}"
            label += ", causal" * row["causal"] + f", {sequence}"
            yield Line("attention", label, rate / 1e12, printed, "TFLOP/s")


def kept_per_layer(
    model: Transformer, tensor: int, batch: int, recompute: str, split: bool
) -> float:
    """Return the bytes that one layer saves for the backward pass, on one of `tensor` ranks.

    Where the sequence is split, a memory limit is set that is met only if activations that layers
    gather are not saved but gathered again in the backward pass, as the paper does
    (arXiv:2205.05198).
    """
    from autoparallel.analysis.memory import memory_of

    hardware = find_hardware("dgx-a100")
    saved = []
    # The difference of two models leaves out embeddings and the loss.
    for layers in (model.layers, model.layers + 1):
        sizes = (replace(model, layers=layers), tensor, batch, hardware, recompute, split)
        plan = planned(*sizes)
        account = memory_of(plan)
        if split:
            blocks = {op.name for op in plan.ops if ".blocks." in op.where}
            gathered = sum(
                each.nbytes * (1 - 1 / tensor)
                for each in plan.conversions
                if blocks.issuperset(each.readers)
                for _, forward, _ in each.moves
                if forward is Movement.ALL_GATHER
            )
            account = memory_of(planned(*sizes, memory_limit=int(account.total - 0.95 * gathered)))
        saved.append(account.activations)
    return float(saved[1] - saved[0])


def activation_bytes() -> Iterator[Line]:
    """Yield the bytes that a layer saves, over those of one tensor between layers: five
    variants.
    """
    import sympy
    from sympy.parsing.sympy_parser import (
        implicit_multiplication,
        parse_expr,
        standard_transformations,
    )

    table = ROWS["activation_bytes"]
    model, tensor, batch = Transformer(1024, 8, 4, 512, 512), 8, 16
    sizes = {"a": model.heads, "b": batch, "h": model.hidden, "s": model.sequence, "t": tensor}
    known = {name: sympy.Symbol(name) for name in sizes}
    rules = (*standard_transformations, implicit_multiplication)
    unit = model.sequence * batch * model.hidden
    for name, text in table["formulas"].items():
        printed = parse_expr(text, local_dict=known, transformations=rules).subs(sizes)
        recompute = name.rpartition(" ")[2]
        ours = kept_per_layer(
            model,
            1 if name == "none" else tensor,
            batch,
            recompute if recompute in ("selective", "full") else "none",
            "sequence" in name,
        )
        yield Line("activation_bytes", f"{name}: {text}", ours / unit, float(printed) / unit, "sbh")


def zero_bytes(parameters: float, devices: int) -> tuple[float, ...]:
    """Return the bytes per device of ZeRO's stages 1, 2 and 3 (arXiv:1910.02054): all but
    activations.
    """
    import torch

    from autoparallel.graph.graph import Value
    from autoparallel.placement import Shard
    from autoparallel.strategy.parameter_storage import storage_choices, stored_bytes

    value = Value("weight", (int(parameters),), torch.float16, True)
    choices = storage_choices(value, ((Shard(0),),), (devices,), True, True)
    stages = {
        tuple(
            isinstance(each[0], Shard) for each in (choice.storage, choice.gradient, choice.state)
        ): sum(stored_bytes(value, choice, (devices,), "mixed_adam"))
        for choice in choices
    }
    order = ((False, False, True), (False, True, True), (True, True, True))
    return tuple(stages[stage] for stage in order)


def zero() -> Iterator[Line]:
    """Yield the GB per device of ZeRO's three stages."""
    for parameters, rows in ROWS["zero"]["rows"].items():
        for devices, printed in rows.items():
            for stage, (ours, theirs) in enumerate(
                zip(zero_bytes(float(parameters), int(devices)), printed, strict=True), 1
            ):
                label = f"{float(parameters) / 1e9:g} B on {devices}, stage {stage}"
                yield Line("zero", label, ours / 1e9, theirs, "GB")


TABLES: Mapping[str, Callable[[], Iterator[Line]]] = {
    each.__name__: each
    for each in (
        all_reduces,
        iteration_times,
        weak_scaling,
        activation_bytes,
        zero,
        pipelined,
        selective,
        layers,
        sharded,
        attention,
    )
}


def main() -> None:
    """Print every table, or those asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(TABLES), help="tables, comma-separated")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    names = options.only.split(",")
    unknown = [name for name in names if name not in TABLES]
    if unknown:
        parser.error(f"unknown table {unknown[0]!r}: choose among {', '.join(TABLES)}")
    figures = []
    for name in names:
        aside = " (kept aside)" if ROWS.get(name, {}).get("kept aside") else ""
        print(f"\n{name}{aside}: {ROWS[name].get('source', '')}")
        print(f"{'':44}{'ours':>11}{'printed':>11}")
        for line in TABLES[name]():
            print(line, flush=True)
            figures.append({**vars(line), "error": line.error})
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
