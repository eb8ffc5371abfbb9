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

# Chains of ops that Megatron-LM ran as one kernel forward in 2020, and whether as one backward too.
FUSED_2020 = (
    (("mul.Tensor", "masked_fill.Scalar", "softmax.int", "masked_fill.Scalar"), True),
    (("add.Tensor", "gelu.default"), True),
    (("add.Tensor", "dropout.default", "add.Tensor"), False),
)
# Passes over the gradients before the update: cast to float32 and scaled (2 + 4 bytes), read for
# their norm (4), and read as 4 bytes instead of 2 by the update.
GRADIENT_PASSES = 6


@dataclass(frozen=True)
class Transformer:
    """The sizes of a GPT as the papers print them."""

    hidden: int
    heads: int
    layers: int
    sequence: int
    vocabulary: int

    @staticmethod
    def of(row: Mapping[str, Any], table: Mapping[str, Any]) -> Transformer:
        """Return the sizes of one row of a table."""
        sizes = (row["hidden"], row["heads"], row["layers"])
        return Transformer(*sizes, table["sequence"], table["vocabulary"])

    def flops(self, batch: int, again: bool) -> float:
        """Return the FLOPs of a step, as arXiv:2104.04473 counts them (equation 3).

        batch: sequences. again: with full recomputation, that is, with a second forward pass.

        >>> round(Transformer(12288, 96, 96, 2048, 51200).flops(1, again=False) / 1e15, 2)
        2.2
        """
        h, s, layers = self.hidden, self.sequence, self.layers
        rest = s / (6 * h) + self.vocabulary / ((16 if again else 12) * layers * h)
        return (96 if again else 72) * batch * s * layers * h * h * (1 + rest)


@dataclass(frozen=True)
class Step:
    """Seconds of a step on one replica's ranks.

    work: computing. communication: between the ranks. update: of the optimizer. gradient_bytes: of
    one rank.
    """

    work: float
    communication: float
    update: float
    gradient_bytes: float

    def seconds(self, hardware: Hardware, devices: int) -> float:
        """Return the seconds of the step at the pace of the slowest of so many devices."""
        return (self.work + self.update) * hardware.slowest(devices) + self.communication


def build(model: Transformer) -> tuple[Any, dict[str, Any]]:
    """Return the model on the meta device, and Megatron's partition of it.

    The model is in 16 bits, its loss in 32.
    """
    import torch
    from torch import Tensor, nn

    from autoparallel.train.models import GPT, GPTConfig
    from megatron_rules.recipe import partition

    class Trained(nn.Module):
        """The model with its loss in float32, as mixed-precision training computes it."""

        def __init__(self) -> None:
            super().__init__()
            self.model = GPT(
                GPTConfig(model.layers, model.hidden, model.heads, model.vocabulary, model.sequence)
            ).half()

        def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
            """Return the loss alone."""
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
    """Return one replica's step on `tensor` ranks, for `batch` sequences, as published.

    fused: count the kernels that Megatron-LM fused. recompute, sequence_parallel: as of Options.

    Example: `step(Transformer(1536, 16, 40, 1024, 51200), 1, 8, find_hardware("dgx-2h")).work`
    """
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


@lru_cache(maxsize=16)
def _captured(model: Transformer, batch: int) -> tuple[Any, dict[str, Any]]:
    """Return the traced model for `batch` sequences, and Megatron's partition of it."""
    from autoparallel.capture.export import capture
    from autoparallel.graph.passes.run_passes import run_passes

    module, pins = build(model)
    captured = capture(module, (), module.model.example_inputs(batch=batch))
    return replace(captured, graph=run_passes(captured.graph)), pins


def planned(
    model: Transformer,
    tensor: int,
    batch: int,
    hardware: Hardware,
    recompute: str,
    sequence_parallel: bool,
    memory_limit: int | None = None,
) -> Any:
    """Return the published partition as a plan; the fastest, or the fastest within a limit.

    memory_limit: bytes per rank, None for no limit. At the pace of the mean device: the number of
    devices besides these ranks is known to the caller alone.
    """
    from autoparallel.mesh import Mesh
    from autoparallel.options import Options
    from autoparallel.planning.search import search

    captured, pins = _captured(model, batch)
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
    """Return the seconds that fused kernels save, forward and backward, by op.

    The op is one whose result stays inside of a fused kernel: it is neither written nor read, nor
    is its gradient, and one kernel less is started.
    """
    from autoparallel.cost.op_costs import nbytes
    from autoparallel.graph.part_sizes import layout_fraction

    graph = plan.captured.graph
    sizes = tuple(size for _, size in plan.mesh.axes)
    ops = {op.name: op for op in plan.ops}
    saved: dict[str, tuple[float, float]] = {}
    for first in plan.ops:
        for targets, both_ways in FUSED_2020:
            chain = [first]
            while len(chain) < len(targets):
                readers = graph.readers[chain[-1].makes[0]]
                if len(readers) != 1 or readers[0].name not in ops:
                    break
                chain.append(ops[readers[0].name])
            names = tuple(op.target.removeprefix("aten.") for op in chain)
            if names != targets or any(op.name in saved for op in chain):
                continue
            for op in chain[:-1]:
                value = graph.values[op.makes[0]]
                local = nbytes(value) * layout_fraction(value.shape, op.results[0], sizes)
                # Written by one kernel and read by the next.
                once = 2 * local / hardware.sustained_bytes_per_second + hardware.launch_seconds
                saved[op.name] = (once, once if both_ways else 0.0)
    return saved
