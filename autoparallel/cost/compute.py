"""Predicted time of operators by roofline: arithmetic or memory traffic, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass

from autoparallel.cost.collectives import collective_seconds
from autoparallel.cost.hardware import Hardware
from autoparallel.graph.graph import Value, numel_hint
from autoparallel.placement import Placement, Shard
from autoparallel.rules.rule import OpCall, ShardingRule, Strategy

__all__ = ["OpCost", "nbytes", "op_cost", "update_seconds"]


@dataclass(frozen=True, slots=True)
class OpCost:
    """Seconds of one op on the busiest rank, forward and backward.

    product: arithmetic of matrix products. traffic: reading and writing memory; whole_traffic: the
    same if nothing were split. communication: of the kernel. flops: of the products, forward.
    """

    product: float = 0.0
    traffic: float = 0.0
    whole_traffic: float = 0.0
    communication: float = 0.0
    flops: float = 0.0

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.product + self.traffic + self.communication


def nbytes(value: Value) -> int:
    """Size of the full tensor for the example inputs."""
    return numel_hint(value.shape) * value.dtype.itemsize


def _local_bytes(value: Value, placement: Placement, fraction: float) -> float:
    return nbytes(value) * (fraction if isinstance(placement, Shard) else 1.0)


def op_cost(
    call: OpCall, rule: ShardingRule | None, strategy: Strategy, hardware: Hardware, world_size: int
) -> OpCost:
    """Backward: a product runs once more per operand that needs a gradient; the rest moves the
    same bytes twice (read the gradient and the saved operand, write the gradient)."""
    if rule is not None and rule.free:
        return OpCost()
    grads = sum(operand.requires_grad for operand in call.operands)
    traffic = whole_traffic = communication = 0.0
    passes = (3.0 if grads else 1.0) / hardware.memory_bytes_per_second
    for value, placement in zip(
        (*call.operands, *call.results), (*strategy.operands, *strategy.results), strict=True
    ):
        traffic += passes * _local_bytes(value, placement, strategy.fraction)
        whole_traffic += passes * nbytes(value)
    if strategy.kernel is not None:
        for kind, size in strategy.kernel.collectives:
            communication += collective_seconds(kind, size, hardware.link, world_size)
    flops = 0.0
    if rule is not None and rule.flops:
        flops = rule.flops * rule.points * strategy.fraction
    itemsize = call.results[0].dtype.itemsize
    product = flops * (1 + grads) / hardware.peak(itemsize)
    return OpCost(product, traffic, whole_traffic, communication, flops)


def update_seconds(
    parameter: Value, storage: Placement, fraction: float, hardware: Hardware
) -> float:
    """Predicted time of the optimizer's update of one parameter, in seconds.

    Adam reads parameter, gradient and two moments, and writes all but the gradient.
    """
    local = _local_bytes(parameter, storage, fraction)
    return 7 * local / hardware.memory_bytes_per_second
