"""Models as papers print them: built, planned to the published partition, and priced."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from autoparallel.cost.hardware import Hardware, write_hardware

__all__ = ["Step", "Transformer", "planned", "step"]

FUSED_2020 = (  # ops that are one kernel forward, and whether they are one backward too
    (("mul.Tensor", "masked_fill.Scalar", "softmax.int", "masked_fill.Scalar"), True),
    (("add.Tensor", "gelu.default"), True),
    (("add.Tensor", "dropout.default", "add.Tensor"), False),
)
# Passes over the gradients before the update: cast to float32 and scaled (2 + 4 bytes), read for
# their norm (4), and read as 4 bytes instead of 2 by the update.
GRADIENT_PASSES = 6


@dataclass(frozen=True)
class Transformer:
    """A GPT as the papers print it."""

    hidden: int
    heads: int
    layers: int
    sequence: int
    vocabulary: int

    @staticmethod
    def of(row: Mapping[str, Any], table: Mapping[str, Any]) -> Transformer:
        """The one of a row."""
        sizes = (row["hidden"], row["heads"], row["layers"])
        return Transformer(*sizes, table["sequence"], table["vocabulary"])

    def flops(self, batch: int, again: bool) -> float:
        """Of a step, as arXiv:2104.04473 counts (equation 3); again: with full recomputation."""
        h, s, layers = self.hidden, self.sequence, self.layers
        rest = s / (6 * h) + self.vocabulary / ((16 if again else 12) * layers * h)
        return (96 if again else 72) * batch * s * layers * h * h * (1 + rest)


@dataclass(frozen=True)
class Step:
    """Seconds of a step on one replica's ranks: their own work, what they communicate, the update.

    gradient_bytes: of one rank.
    """

    work: float
    communication: float
    update: float
    gradient_bytes: float

    def seconds(self, hardware: Hardware, devices: int) -> float:
        """All of it, at the pace of the slowest device."""
        return (self.work + self.update) * hardware.slowest(devices) + self.communication


def build(model: Transformer) -> tuple[Any, dict[str, Any]]:
    """The model in 16 bits with its loss in 32, on the meta device, and how Megatron splits it."""
    import torch
    from torch import Tensor, nn

    from autoparallel.train.models import GPT, GPTConfig
    from megatron_rules.recipe import partition

    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = GPT(
                GPTConfig(model.layers, model.hidden, model.heads, model.vocabulary, model.sequence)
            ).half()

        def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
            logits = self.model(input_ids).logits
            return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    with torch.device("meta"):
        trained = Trained()
    pins = {f"model.{path}": (place,) for path, place in partition(trained.model).items()}
    return trained, pins


@lru_cache(maxsize=64)
def step(
    model: Transformer,
    tensor: int,
    batch: int,
    hardware: Hardware,
    fused: bool = True,
    recompute: str = "full",
    sequence_parallel: bool = False,
) -> Step:
    """One replica's step on `tensor` ranks, for `batch` sequences, as published."""
    plan = planned(model, tensor, batch, hardware, recompute, sequence_parallel)
    saved = not_written(plan, hardware) if fused else {}
    inside = {name for group in plan.recomputed for name in group}
    work = 0.0
    for op in plan.ops:
        forward, backward = saved.get(op.name, (0.0, 0.0))
        work += op.seconds - forward * (2 if op.name in inside else 1) - backward
    communication = sum(each.seconds for each in plan.conversions)
    elements = sum(
        parameter.nbytes / 2 / (tensor if "S" in str(parameter.storage[0]) else 1)
        for parameter in plan.parameters
    )
    update = plan.seconds - sum(op.seconds for op in plan.ops) - communication
    update += 2 * GRADIENT_PASSES * elements / hardware.sustained_bytes_per_second
    return Step(work, communication, update, 2 * elements)


def planned(
    model: Transformer,
    tensor: int,
    batch: int,
    hardware: Hardware,
    recompute: str,
    sequence_parallel: bool,
    memory_limit: int | None = None,
) -> Any:
    """The published partition as a plan; the fastest, or the fastest within a limit.

    At the pace of the mean device: how many there are besides these ranks, the caller knows.
    """
    from autoparallel.capture.export import capture
    from autoparallel.graph.passes.run_passes import run_passes
    from autoparallel.mesh import Mesh
    from autoparallel.options import Options
    from autoparallel.planning.search import search

    module, pins = build(model)
    inputs = module.model.example_inputs(batch=batch)
    captured = capture(module, (), inputs)
    captured = replace(captured, graph=run_passes(captured.graph))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hardware.json"
        write_hardware(replace(hardware, spread=0.0), path)
        options = Options(
            sequence_parallel=sequence_parallel,
            hardware=str(path),
            tokens=1,
            optimizer="mixed_adam",
            recompute=recompute,
            memory_limit=memory_limit,
        )
        return search(
            captured,
            "GPT",
            Mesh(tp=tensor),
            options,
            pins=pins if tensor > 1 else None,
            product_weight=1.0,
        )


def not_written(plan: Any, hardware: Hardware) -> dict[str, tuple[float, float]]:
    """Seconds that fused kernels save, forward and backward, by the op whose result stays inside.

    Such a result is neither written nor read, nor is its gradient, and one kernel less is started.
    """
    from autoparallel.cost.op_costs import nbytes
    from autoparallel.graph.part_sizes import layout_fraction

    graph = plan.captured.graph
    sizes = tuple(size for _, size in plan.mesh.axes)
    ops = {op.name: op for op in plan.ops}
    found: dict[str, tuple[float, float]] = {}
    for first in plan.ops:
        for targets, both_ways in FUSED_2020:
            chain = [first]
            while len(chain) < len(targets):
                readers = graph.readers[chain[-1].makes[0]]
                if len(readers) != 1 or readers[0].name not in ops:
                    break
                chain.append(ops[readers[0].name])
            names = tuple(op.target.removeprefix("aten.") for op in chain)
            if names != targets or any(op.name in found for op in chain):
                continue
            for op in chain[:-1]:
                value = graph.values[op.makes[0]]
                local = nbytes(value) * layout_fraction(value.shape, op.results[0], sizes)
                once = 2 * local / hardware.sustained_bytes_per_second + hardware.launch_seconds
                found[op.name] = (once, once if both_ways else 0.0)
    return found
