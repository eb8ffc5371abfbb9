"""A plan as settings of trainers that have partitions of their own: Megatron-LM, torchtitan,
DeepSpeed.

These split a transformer in one way, which they have written down; what one can set is by how much.
So the settings say how many ranks each axis has and which kinds of parallelism the plan uses, and
every parameter that the plan lays otherwise than all others of its kind is listed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from torch import nn

from autoparallel.exports.export_text import Export
from autoparallel.exports.module_split import folded_pattern
from autoparallel.exports.module_splits import module_splits
from autoparallel.exports.parallelize_module import patterns
from autoparallel.mesh import MICROBATCH
from autoparallel.options import SCHEDULES
from autoparallel.placement import Shard
from autoparallel.plan import Pipeline, Plan

__all__ = ["TORCHTITAN_COMMAND", "deepspeed_config", "megatron_arguments", "torchtitan_toml"]

# Before the words of the command line, in what is written for torchtitan.
TORCHTITAN_COMMAND = "# from torchtitan 0.3 on: "


@dataclass(frozen=True, slots=True)
class _Kinds:
    """The kinds of parallelism that a plan uses.

    tensor, data: numbers of ranks. stage: of ZeRO, 0 to 3. sequence: whether activations between
    products are split along a dim that comes from the inputs, on the tensor-parallel axis.
    recompute: "none", "selective" or "full". ranks: that share out the stages. missing: what other
    programs cannot be told.
    """

    tensor: int
    data: int
    stage: int
    sequence: bool
    recompute: str
    ranks: int
    missing: tuple[str, ...]


def _kinds(plan: Plan) -> _Kinds:
    """Return the kinds of parallelism of a plan.

    An axis is data-parallel where no product has a weight that is used in parts on it.
    """
    names = {parameter.name for parameter in plan.parameters}
    missing: list[str] = []
    tensor = data = 1
    stage, sequence = 0, False
    for axis, (name, size) in enumerate(plan.mesh.axes):
        used_in_parts = [
            (op, value)
            for op in plan.ops
            if op.whole_flops
            for value, layout in zip(op.reads, op.operands, strict=True)
            if value in names and isinstance(layout[axis], Shard)
        ]
        if size == 1 or name == MICROBATCH:
            continue
        if not used_in_parts:
            data *= size
            stage = max(stage, _stage(plan, axis))
            continue
        if tensor > 1:
            missing.append(f"a second tensor-parallel axis, {name}")
        tensor *= size
        products = [op for op in plan.ops if op.whole_flops]
        whole = [op for op in products if not any(isinstance(r[axis], Shard) for r in op.operands)]
        if whole:
            rows = ", ".join(dict.fromkeys(folded_pattern(op.where or op.name) for op in whole))
            missing.append(f"products that stay whole on {name}: {rows}")
        sent = [c for c in plan.conversions if c.value not in names]
        ends = [(c.shape, end[axis]) for c in sent for end in (c.source, c.target)]
        sequence |= any(
            isinstance(end, Shard) and "s" in _size(shape, end.dim) for shape, end in ends
        )
        odd = [p for p in plan.parameters if _is_odd(p.storage[axis])]
        if odd:
            rows = ", ".join(dict.fromkeys(folded_pattern(p.path) for p in odd))
            missing.append(f"parameters in blocks or runs on {name}, as the plan has them: {rows}")
    modes = [mode for _, mode in plan.recompute]
    kinds = set(modes)
    recompute = "none" if kinds <= {"none"} else ("full" if "full" in kinds else "selective")
    if len(kinds) > 1:
        counts = ", ".join(f"{modes.count(kind)} blocks {kind}" for kind in sorted(kinds))
        missing.append(f"different modes of recomputation: {counts}")
    ranks = 1
    if plan.pipeline is not None:
        ranks = plan.pipeline.ranks
        missing.append("ops at which stages start: each program cuts between its own layers")
    return _Kinds(tensor, data, stage, sequence, recompute, ranks, tuple(missing))


def _stage(plan: Plan, axis: int) -> int:
    """Return the highest stage of ZeRO that most bytes of parameters have on an axis."""
    nbytes = [0] * 4
    for parameter in plan.parameters:
        split = [
            isinstance(layout[axis], Shard)
            for layout in (parameter.state, parameter.gradient, parameter.storage)
        ]
        nbytes[split.index(False) if False in split else 3] += parameter.nbytes
    return max(range(4), key=lambda stage: nbytes[stage])


def _size(shape: str, dim: int) -> str:
    """Return the size of a dim as the plan writes it."""
    parts = shape.split(", ")
    return parts[dim] if dim < len(parts) else ""


def _is_odd(placement: object) -> bool:
    """Return whether a split is in blocks or runs."""
    return isinstance(placement, Shard) and (
        placement.blocks != 1 or placement.unit != 1 or placement.repeat != 1
    )


def _batch_shares(pipeline: Pipeline, kinds: _Kinds, name: str) -> str:
    """Return a comment on the size of micro-batches. name: of its setting."""
    parts = pipeline.microbatches * kinds.data
    return f"# {name}: the batch of all ranks / {parts}, for {pipeline.microbatches} micro-batches"


def megatron_arguments(plan: Plan) -> Export:
    """Return the arguments of Megatron-LM that ask for the parallelism of a plan.

    They are for the transformer that Megatron has itself, whose partition is its own.

    Example: `print(megatron_arguments(plan))`
    """
    kinds = _kinds(plan)
    missing = list(kinds.missing)
    lines = [
        f"--tensor-model-parallel-size {kinds.tensor}",
        f"--pipeline-model-parallel-size {kinds.ranks}",
    ]
    comments = [f"# data-parallel ranks follow from the number of processes: {kinds.data}"]
    if plan.pipeline is not None:
        each = plan.pipeline.stages // plan.pipeline.ranks
        if each > 1:
            lines.append(f"--num-virtual-stages-per-pipeline-rank {each}")
        if plan.pipeline.schedule != "1f1b":
            missing.append(f"the schedule {plan.pipeline.schedule}: Megatron's is 1F1B")
        comments.append(_batch_shares(plan.pipeline, kinds, "--micro-batch-size"))
    if kinds.sequence and kinds.tensor > 1:
        lines.append("--sequence-parallel")
    if kinds.data > 1 and kinds.stage:
        lines.append("--use-distributed-optimizer")
    if kinds.stage > 1:
        missing.append(f"ZeRO-{kinds.stage}: Megatron's distributed optimizer is the first stage")
    if kinds.recompute == "full":
        full = sum(mode == "full" for _, mode in plan.recompute)
        lines.append(
            f"--recompute-granularity full --recompute-method block --recompute-num-layers {full}"
        )
    elif kinds.recompute == "selective" and plan.remade:
        missing.append(
            "norms and activations that are made again one by one: Megatron's selective mode is of "
            "the core of attention, and --recompute-modules names further modules"
        )
    elif kinds.recompute == "selective":
        lines.append("--recompute-granularity selective")
    text = "\n".join([*lines, *comments, *(f"# missing: {line}" for line in missing)]) + "\n"
    return Export("megatron", text, ".sh", tuple(missing))


def torchtitan_toml(plan: Plan) -> Export:
    """Return the sections of a torchtitan configuration that ask for the parallelism of a plan.

    From 0.3 on torchtitan reads no TOML: a comment has the same as words of its command line.

    Example: `tomllib.loads(torchtitan_toml(plan).text)["parallelism"]`
    """
    kinds = _kinds(plan)
    missing = list(kinds.missing)
    shard = kinds.data if kinds.stage else 1
    replicate = 1 if kinds.stage else kinds.data
    if kinds.stage in (1, 2):
        missing.append(f"ZeRO-{kinds.stage}: fully_shard is the third stage")
    if kinds.tensor > 1 and not kinds.sequence:
        missing.append(
            "whole activations between the products: before 0.3, torchtitan splits the sequence"
        )
    degrees = {
        "data_parallel_replicate_degree": replicate,
        "data_parallel_shard_degree": shard,
        "tensor_parallel_degree": kinds.tensor,
        "pipeline_parallel_degree": kinds.ranks,
        "context_parallel_degree": 1,
    }
    settings: dict[str, str] = {}
    comments: list[str] = []
    if plan.pipeline is not None:
        pipeline, schedule = plan.pipeline, SCHEDULES[plan.pipeline.schedule]
        several = pipeline.stages > pipeline.ranks
        name = schedule.several if several else schedule.alone
        settings["pipeline_parallel_schedule"] = name.removeprefix("Schedule")
        comments.append(_batch_shares(pipeline, kinds, "pipeline_parallel_microbatch_size"))
    words = [f"--parallelism.{name} {degree}" for name, degree in degrees.items()]
    if kinds.tensor > 1 and not kinds.sequence:
        words.append("--parallelism.no-enable-sequence-parallel")
    words += [f"--parallelism.{name} {value}" for name, value in settings.items()]
    words.append(f"activation-checkpoint:{kinds.recompute}")
    text = "\n".join(
        [
            *(f"# missing: {line}" for line in missing),
            *comments,
            f"{TORCHTITAN_COMMAND}{' '.join(words)}",
            "[parallelism]",
            *(f"{name} = {degree}" for name, degree in degrees.items()),
            *(f'{name} = "{value}"' for name, value in settings.items()),
            "",
            "[activation_checkpoint]",
            f'mode = "{kinds.recompute}"',
            *(
                ['selective_ac_option = "op"']
                if plan.remade and kinds.recompute == "selective"
                else []
            ),
        ]
    )
    return Export("torchtitan", text + "\n", ".toml", tuple(missing))


def deepspeed_config(plan: Plan, model: nn.Module, example_inputs: Any = None) -> Export:
    """Return a DeepSpeed configuration with the parallelism of a plan: AutoTP, and ZeRO's stage.

    The partition that DeepSpeed is given names each module that the plan splits.

    Example: `json.loads(deepspeed_config(plan, model).text)["tensor_parallel"]`
    """
    kinds = _kinds(plan)
    missing = list(kinds.missing)
    config: dict[str, Any] = {"zero_optimization": {"stage": kinds.stage}}
    if kinds.tensor > 1:
        axis = next(
            name
            for index, (name, size) in enumerate(plan.mesh.axes)
            if size == kinds.tensor or index == len(plan.mesh.axes) - 1
        )
        splits = module_splits(plan, model, axis=axis, example_inputs=example_inputs)
        missing += splits.missing
        specs = []
        for pattern, split in patterns(splits, model).items():
            cut = split.kind == "row" and split.gathered
            if split.kind not in ("column", "row") or cut or split.is_transposed:
                missing.append(f"{pattern}: DeepSpeed has no such split, and it stays whole")
                continue
            regex = "^" + pattern.replace(".", r"\.").replace("*", r"\d+") + r"\.weight$"
            spec: dict[str, Any] = {"patterns": [regex], "partition_type": split.kind}
            specs.append({**spec, "gather_output": True} if split.gathered else spec)
        config["tensor_parallel"] = {
            "autotp_size": kinds.tensor,
            "partition_config": {"use_default_specs": False, "layer_specs": specs},
        }
    return Export("deepspeed", json.dumps(config, indent=2) + "\n", ".json", tuple(missing))
