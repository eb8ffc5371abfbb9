"""Seconds of operators by roofline: arithmetic or memory traffic, forward and backward.

The roofline model: Williams, Waterman & Patterson 2009.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
import torch

from autoparallel.cost.collective_times import collective_seconds
from autoparallel.cost.hardware import Hardware, Link
from autoparallel.cost.matmul import chained_seconds, product_seconds
from autoparallel.cost.memory_moves import moved_seconds
from autoparallel.graph.graph import Value, hint, numel_hint
from autoparallel.placement import Collective, Shard
from autoparallel.rules.function_counts import functions
from autoparallel.rules.rule import Dims, OpCall, ShardingRule
from autoparallel.rules.strategies import Strategy

__all__ = ["OpCost", "nbytes", "op_costs", "update_seconds"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class OpCost:
    """Seconds of one op on the busiest rank, forward and backward.

    product: arithmetic of matrix products. traffic: reading and writing memory, as far as it takes
    longer than the arithmetic, and starting kernels; whole_traffic: the same if nothing were split.
    communication: of the op's kernel. flops: of the products, forward. forward: the forward's share
    of the seconds, which a recomputation repeats.

    >>> OpCost(product=2.0, traffic=0.5, communication=0.25).seconds
    2.75
    """

    product: float = 0.0
    traffic: float = 0.0
    whole_traffic: float = 0.0
    communication: float = 0.0
    flops: float = 0.0
    forward: float = 0.0

    @property
    def seconds(self) -> float:
        """The sum of arithmetic, memory traffic and communication."""
        return self.product + self.traffic + self.communication


def nbytes(value: Value) -> int:
    """Return the bytes of the whole tensor, at the sizes of the example inputs."""
    return numel_hint(value.shape) * value.dtype.itemsize


def op_costs(
    call: OpCall,
    rule: ShardingRule | None,
    joints: Sequence[tuple[Strategy, ...]],
    axes: Sequence[tuple[int, Link]],
    hardware: Hardware,
) -> tuple[OpCost, ...]:
    """Return the cost of every joint strategy of one call on the busiest rank.

    call, rule: of the op; no rule means that nothing is split. joints: one strategy per mesh axis
    each. axes: size and link of every mesh axis. hardware: at the pace of the slowest device.
    Forward, an op reads its operands and writes its results; a product takes the longer of this and
    its arithmetic. Backward, a product is done once more per operand that needs a gradient; any
    other op reads the gradients of its results, and its operands unless it is linear, and writes
    the gradients of its operands; gradients that are sums (of a norm's weight) are computed by a
    kernel of their own, which reads again. A kernel's communication counts as forward.
    """
    # Views move nothing and start no kernel.
    if rule is not None and rule.free:
        return (OpCost(),) * len(joints)
    if rule is None:
        rule = ShardingRule(((),) * len(call.operands), ((),) * len(call.results), {})
    shares = _loop_shares(rule, joints)
    parts = _bytes(call, joints)
    whole = np.array([[nbytes(value) for value in (*call.operands, *call.results)]], dtype=float)
    if rule.inner is not None:
        product, forward, traffic = _inner(call, rule, shares, hardware)
        _, _, whole_traffic = _inner(call, rule, np.ones((1, shares.shape[1])), hardware)
    elif rule.flops:
        product, forward, traffic = _product(call, rule, shares, parts, hardware)
        _, _, whole_traffic = _product(call, rule, np.ones((1, shares.shape[1])), whole, hardware)
    else:
        forward, traffic = _traffic(call, rule, shares, parts, hardware)
        ones = np.ones((1, shares.shape[1]))
        _, whole_traffic = _traffic(call, rule, ones, whole, hardware)
        product = np.zeros(len(joints))
    sent = [_communication(joint, axes, hardware) for joint in joints]
    waits = [
        _waits(joint, axes, (float(first), float(every - first)))
        for joint, first, every in zip(joints, forward, product + traffic, strict=True)
    ]
    flops = rule.flops * rule.points * shares.prod(axis=1)
    return tuple(
        OpCost(
            product=float(product[index]),
            traffic=float(traffic[index]),
            whole_traffic=float(whole_traffic[0]),
            communication=paid + sum(waited),
            flops=float(flops[index]),
            forward=float(forward[index]) + paid + waited[0],
        )
        for index, (paid, waited) in enumerate(zip(sent, waits, strict=True))
    )


def _loop_shares(rule: ShardingRule, joints: Sequence[tuple[Strategy, ...]]) -> Array:
    """Return [joint, loop]: the part of each loop that the busiest rank runs."""
    place = {name: index for index, name in enumerate(rule.loops)}
    shares = np.ones((len(joints), len(place)))
    for row, joint in enumerate(joints):
        for strategy in joint:
            if strategy.tile is not None:
                shares[row, place[strategy.tile.loop]] *= strategy.fraction
    return shares


def _bytes(call: OpCall, joints: Sequence[tuple[Strategy, ...]]) -> Array:
    """Return [joint, operand or result]: bytes that the busiest rank holds."""
    sizes = [float(nbytes(value)) for value in (*call.operands, *call.results)]
    rows = []
    for joint in joints:
        row = list(sizes)
        for strategy in joint:
            if strategy.tile is not None:
                for at, placement in enumerate((*strategy.operands, *strategy.results)):
                    if isinstance(placement, Shard):
                        row[at] *= strategy.fraction
        rows.append(row)
    return np.array(rows).reshape(len(joints), len(sizes))


def _communication(
    joint: tuple[Strategy, ...], axes: Sequence[tuple[int, Link]], hardware: Hardware
) -> float:
    """Return the seconds that kernels communicate, each on its own axis, about its own part.

    Other axes share the tensors that a kernel sends, unless what they split is no loop of these.
    """
    seconds = 0.0
    for at, (strategy, (size, link)) in enumerate(zip(joint, axes, strict=True)):
        if strategy.kernel is None:
            continue
        # Tokens go to parts of parts, where axes further out have sent them already.
        before = prod(
            ranks
            for other, (ranks, _) in zip(joint[:at], axes, strict=False)
            if other.kernel is not None and other.kernel.routed == strategy.kernel.routed
        )
        copies = strategy.kernel.copies(before * size)
        # Packed before it is sent, and added up when it has come, in both passes.
        packed = 2 * strategy.kernel.moved * copies * _share(joint, at, 0) / size
        packed += 2 * strategy.kernel.merged * (size - 1) * _share(joint, at) / size
        seconds += packed / hardware.sustained_bytes_per_second
        for kind, sent in _sent(joint, at):
            if kind is not Collective.RING_PASS:
                seconds += collective_seconds(kind, sent * copies, link, size)
    return seconds


def _share(joint: tuple[Strategy, ...], at: int, number: int | None = None) -> float:
    """Return the share that other axes leave of what the kernel of one axis works on.

    number: of a collective, for what that sends, which may have fewer loops than the op.
    """
    kernel = joint[at].kernel
    return prod(
        each.fraction
        for other, each in enumerate(joint)
        if other != at
        and each.tile is not None
        and (number is None or kernel is None or kernel.sends(number, each.tile.loop))
    )


def _sent(joint: tuple[Strategy, ...], at: int) -> Iterator[tuple[Collective, float]]:
    """Yield the collectives of the kernel of one axis, with the bytes of what the ranks of that
    axis have together.
    """
    kernel = joint[at].kernel
    for number, (kind, nbytes) in enumerate(kernel.collectives if kernel is not None else ()):
        yield kind, nbytes * _share(joint, at, number)


def _waits(
    joint: tuple[Strategy, ...], axes: Sequence[tuple[int, Link]], computing: tuple[float, float]
) -> tuple[float, float]:
    """Return the seconds, forward and backward, in which a kernel that passes parts round has
    nothing to compute.

    computing: seconds of the op's own work in either pass. A part is on its way to the next rank
    while the one before is worked on: of each the longer counts. The gradients of parts are sent
    once more at the end, to whom they belong, when nothing is left to compute.
    """
    waited = [0.0, 0.0]
    for at, (size, link) in enumerate(axes):
        seconds = [
            collective_seconds(Collective.EDGE_EXCHANGE, nbytes / size, link, size)
            for kind, nbytes in _sent(joint, at)
            if kind is Collective.RING_PASS
        ]
        for which, each in enumerate(seconds):
            waited[which] += (size - 1) * max(each - computing[which] / size, 0.0)
        if len(seconds) > 1:
            waited[1] += seconds[1] - seconds[0]
    return waited[0], waited[1]


def _traffic(
    call: OpCall, rule: ShardingRule, shares: Array, parts: Array, hardware: Hardware
) -> tuple[Array, Array]:
    """Return seconds forward, and in all, of an op that moves bytes and computes functions.

    The two add up: a CPU's core does not read the next element while it computes this one's.
    """
    count = len(call.operands)
    grads = [at for at, operand in enumerate(call.operands) if operand.requires_grad]
    back = [count + at for at, result in enumerate(call.results) if result.requires_grad]
    first, second = _function_seconds(call, rule, shares, hardware)
    once = moved_seconds(parts.sum(axis=1), hardware) + first + hardware.launch_seconds
    if not grads or not back:
        return once, once
    again = parts[:, back].sum(axis=1) + parts[:, grads].sum(axis=1)
    summed = np.zeros(len(parts))
    # A linear op needs no operand for its gradient; any other reads them again.
    if not any(group.issuperset(grads) for group in rule.linear):
        again = again + parts[:, :count].sum(axis=1)
        # An operand smaller than the result was broadcast: its gradient is a sum.
        if any(nbytes(call.operands[at]) < nbytes(call.results[0]) for at in grads):
            summed = parts[:, [0, *back]].sum(axis=1)
    seconds = moved_seconds(again, hardware) + second + moved_seconds(summed, hardware)
    return once, once + seconds + hardware.launch_seconds


def _function_seconds(
    call: OpCall, rule: ShardingRule, shares: Array, hardware: Hardware
) -> tuple[Array, Array]:
    """Return the seconds of exponentials and their like, forward and backward."""
    none = np.zeros(len(shares))
    # On GPUs moving the elements always takes longer.
    if not hardware.functions_per_second or not any(functions(call)):
        return none, none
    seconds = rule.points * shares.prod(axis=1) / hardware.functions_per_second
    forward, backward = functions(call)
    return forward * seconds, backward * seconds


def _product(
    call: OpCall, rule: ShardingRule, shares: Array, parts: Array, hardware: Hardware
) -> tuple[Array, Array, Array]:
    """Return arithmetic in all; seconds forward; seconds in all that memory and launches add.

    A fused chain of products (attention) counts as its first one, repeated; the backward recomputes
    the intermediate results that it did not save, once per further factor. Exponentials in between
    are computed by units of their own, at which the products wait (arXiv:2407.08608, section 3.1),
    in either pass.
    """
    factors, groups = _loop_groups(rule)
    batch, rows, columns, depth = (_extents(rule, names, shares) for names in groups)
    # What is multiplied counts: products of numbers of 8 bits have results of 16.
    itemsize = max(call.operands[factor].dtype.itemsize for factor in factors)
    points = rule.points * shares.prod(axis=1) * (1.0 - rule.skipped)
    times = rule.flops * points / (2 * batch * rows * columns * depth)
    moved = moved_seconds(parts.sum(axis=1), hardware)
    # The gradients of C = A B are dA = dC B^T and dB = A^T dC: the same three sizes in other roles.
    forms = ((rows, depth, columns), (depth, columns, rows), (rows, columns, depth))
    products = [(times, forms[2])]
    for at, factor in enumerate(factors):
        if call.operands[factor].requires_grad:
            products.append((times if at < 2 else times / (len(factors) - 1), forms[min(at, 2)]))
    between = np.zeros(len(shares))
    if rule.exponentials and hardware.exponentials_per_second:
        between = points * rule.exponentials / hardware.exponentials_per_second
    arithmetic, traffic = [], []
    for place, (repeats, (height, width, long)) in enumerate(products):
        if rule.exponentials:
            # Half of the first products backward are gradients of rows, which leave each tile.
            left = 0.5 * (place == 1)
            sizes = (batch, rows, columns, depth)
            seconds = repeats * chained_seconds(*sizes, itemsize, left, hardware)
        else:
            seconds = repeats * product_seconds(batch, height, width, long, itemsize, hardware)
        # The backward pass, which has several products, computes them once.
        seconds = seconds + (between if place < 2 else 0.0)
        arithmetic.append(seconds)
        # The roofline: only memory time beyond the arithmetic adds to it.
        traffic.append(np.maximum(moved - seconds, 0.0) + hardware.launch_seconds)
    if rule.exponentials and len(products) > 1:
        # Kernels of their own prepare gradients of rows, which are added up in single precision,
        # cast them, and multiply the result with its gradient.
        gradient, result = parts[:, 0], parts[:, len(call.operands)]
        wide = gradient * (torch.float32.itemsize / itemsize)
        around = moved_seconds(2 * wide + gradient + 2 * result, hardware)
        traffic.append(around + 2 * hardware.launch_seconds)
    forward = arithmetic[0] + traffic[0]
    return np.sum(arithmetic, axis=0), forward, np.sum(traffic, axis=0)


def _inner(
    call: OpCall, rule: ShardingRule, shares: Array, hardware: Hardware
) -> tuple[Array, Array, Array]:
    """Return what `_product` does, of an op that is several products and other ops in one.

    What is no product moves bytes, once forward and twice backward, and is no part of a product's
    time.
    """
    assert rule.inner is not None
    place = {name: index for index, name in enumerate(rule.loops)}

    def share(*names: str) -> Array:
        """Return [joint]: the product of the shares of some loops."""
        return np.prod([shares[:, place[name]] for name in names if name in place], axis=0)

    ones = np.ones(len(shares))
    first, again, traffic_first, traffic_again = (np.zeros(len(shares)) for _ in range(4))
    for item in rule.inner.products:
        groups = np.maximum(item.groups * share(item.group_loop), 1) * ones
        rows = item.rows * share(*item.row_loops) * ones
        columns = item.columns * share(item.column_loop) * ones
        depth = item.depth * share(item.depth_loop) * ones
        moved = moved_seconds(
            item.itemsize * groups * (rows * (columns + depth) + columns * depth), hardware
        )
        forms = ((rows, columns, depth), (rows, depth, columns), (depth, columns, rows))
        for at, (height, width, long) in enumerate(forms):
            seconds = product_seconds(groups, height, width, long, item.itemsize, hardware)
            beyond = np.maximum(moved - seconds, 0.0) + hardware.launch_seconds
            if at == 0:
                first, traffic_first = first + seconds, traffic_first + beyond
            elif call.results[0].requires_grad:
                again, traffic_again = again + seconds, traffic_again + beyond
    for forward, backward, names in rule.inner.moved:
        part = share(*names)
        traffic_first += moved_seconds(forward * part, hardware) + hardware.launch_seconds
        if call.results[0].requires_grad:
            traffic_again += moved_seconds(backward * part, hardware) + hardware.launch_seconds
    return first + again, first + traffic_first, traffic_first + traffic_again


def _loop_groups(rule: ShardingRule) -> tuple[tuple[int, ...], tuple[tuple[str, ...], ...]]:
    """Return the operands that are multiplied, and the loops of batch, rows, columns and sum.

    Multiplied are the operands that have a summed loop. Of the first two, a loop that both have is
    of the batch if it is needed afterwards, summed if not; rows are the first one's alone, columns
    the second's; windows (loops that show in one tensor only) are rows or summed.
    """
    result_loops = _names(rule.results)
    named = [_names([dims]) for dims in rule.operands]
    factors = [at for at, names in enumerate(named) if names - result_loops]
    if len(factors) < 2:
        factors = list(range(len(named)))
    first, second = (named[at] for at in (factors * 2)[:2])
    others = _names([rule.operands[at] for at in range(len(named)) if at not in factors[:2]])
    groups: tuple[list[str], ...] = ([], [], [], [])
    for name in rule.loops:
        if name in first and name in second:
            groups[0 if name in result_loops or name in others else 3].append(name)
        elif name not in result_loops and name not in others:
            groups[3].append(name)
        elif name in second:
            groups[2].append(name)
        elif name in first or name not in others:
            groups[1].append(name)
    return tuple(factors), tuple(map(tuple, groups))


def _names(tensors: Iterable[Dims]) -> frozenset[str]:
    """Return the loops of some tensors."""
    return frozenset(name for dims in tensors for loops in dims for name in loops)


def _extents(rule: ShardingRule, names: Iterable[str], shares: Array) -> Array:
    """Return [joint]: the product of the local sizes of the loops."""
    place = {name: index for index, name in enumerate(rule.loops)}
    extents = np.ones(len(shares))
    for name in names:
        # A rank with less than one index works on one: the busiest rank counts.
        extents *= np.maximum(np.round(hint(rule.sizes[name]) * shares[:, place[name]]), 1)
    return extents


def update_seconds(
    parameter_nbytes: float, gradient_nbytes: float, state_nbytes: float, hardware: Hardware
) -> float:
    """Return the predicted seconds of the optimizer's update of one parameter's part.

    It reads parameter, gradient and state (moments, master copy), and writes all but the gradient.
    parameter_nbytes, gradient_nbytes, state_nbytes: of the part that a rank updates.
    """
    # Parameter and state are read and written, the gradient is read.
    moved = 2 * parameter_nbytes + gradient_nbytes + 2 * state_nbytes
    return moved / hardware.sustained_bytes_per_second
