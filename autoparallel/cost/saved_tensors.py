"""The tensors that autograd saves, op by op, and the loops that each of them is split with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

from autoparallel.cost.fake_run import (
    FakeTensorSpec,
    Observed,
    contiguous,
    observe,
    runner,
    skeleton,
)
from autoparallel.cost.stand_in_group import StandInGroup, random_arguments
from autoparallel.graph.graph import Graph, Node, Value, hint
from autoparallel.placement import local_size
from autoparallel.rules.loop_splits import LoopSplit, place
from autoparallel.rules.rule import OpCall, ShardingRule
from autoparallel.runtime import kernels

# By so many times loops are made longer to see what grows with them.
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)

__all__ = ["Internal", "Saved", "SavedTensors", "fitted", "stand_in"]


@dataclass(frozen=True, slots=True)
class Internal:
    """Saved memory that is neither operand nor result: masks, statistics, copies.

    nbytes: of the unsplit tensor. loops: those whose splitting splits it too.
    """

    nbytes: int
    loops: frozenset[str]


@dataclass(frozen=True, slots=True)
class Saved:
    """The memory that one call saves for its backward pass.

    operands, results: whether the memory of each is saved. internal: other memory. aliases: per
    result, the operand whose memory it shares (views, casts to its own type, dropout that drops
    nothing), None for memory of its own. assumed: the op could not be run, and is taken to save all
    that it reads and returns.
    """

    operands: tuple[bool, ...]
    results: tuple[bool, ...]
    internal: tuple[Internal, ...]
    aliases: tuple[int | None, ...]
    assumed: bool = False

    def internal_nbytes(self, shares: Mapping[str, float]) -> float:
        """Return the bytes of internal memory where loops are split into such shares.

        shares: by loop, the part that a rank has; loops that are left out are whole.

        >>> saved = Saved((), (), (Internal(64, frozenset("b")),), ())
        >>> saved.internal_nbytes({"b": 0.5, "h": 0.5})
        32.0
        """
        total = 0.0
        for item in self.internal:
            nbytes = float(item.nbytes)
            for loop, share in shares.items():
                nbytes *= share if loop in item.loops else 1.0
            total += nbytes
        return total


@dataclass(frozen=True, slots=True)
class _Case:
    """One of several calls that run alike: the call, its rule, specs of its tensors, the device."""

    call: OpCall
    rule: ShardingRule | None
    operands: tuple[FakeTensorSpec, ...]
    results: tuple[FakeTensorSpec, ...]
    device: str


class SavedTensors:
    """The memory that every call of a graph saves, unsplit and as run by a kernel on a part.

    rules: per call node. input_gradients: whether the caller wants gradients of the inputs. device:
    as of Hardware, by which torch chooses kernels. Every distinct call is run once, and once more
    for each loop that may split its internal memory.
    """

    def __init__(
        self,
        graph: Graph,
        rules: Mapping[str, ShardingRule | None],
        input_gradients: bool = False,
        device: str = "cpu",
    ) -> None:
        self.graph, self.rules, self.device = graph, rules, device
        self._stands: dict[str, FakeTensorSpec] = {}
        self._roots: dict[str, str] = {}
        self._keys: dict[str, Any] = {}
        self._cases: dict[Any, _Case] = {}
        self._seen: dict[Any, Observed] = {}
        self._made: dict[Any, tuple[FakeTensorSpec, ...]] = {}
        self._saved: dict[Any, Saved] = {}
        # By node: to look up what calls are by takes longer.
        self._of: dict[str, Saved] = {}
        self._workspaces: dict[Any, int] = {}
        for node in graph.nodes:
            if node.kind == "call":
                self._walk(node)
            else:
                stand = stand_in(node.result)
                if node.kind == "input" and not input_gradients:
                    stand = replace(stand, requires_grad=False)
                self._stands[node.result.name] = stand
                self._roots[node.result.name] = node.result.name

    def of(self, name: str) -> Saved:
        """Return what the unsplit call of a node saves."""
        if name not in self._of:
            key = self._keys[name]
            if key not in self._saved:
                self._saved[key] = _with_loops(self._cases[key], self._seen[key])
            self._of[name] = self._saved[key]
        return self._of[name]

    def of_kernel(self, name: str, loop: str, world_size: int, second: str = "") -> Saved:
        """Return what a call saves if `loop` is split by its kernel over `world_size` ranks.

        second: the loop that is split together with it, by an exchange; "" for none. The bytes are
        those of a part of these loops, and of the whole of the others.
        """
        case = self._cases[self._keys[name]]
        loops = (loop, second) if second else (loop,)
        key = (self._keys[name], loops, world_size)
        if key not in self._saved:
            seen = _observe(case, {}, loops, world_size)
            self._saved[key] = _with_loops(case, seen, loops, world_size)
        return self._saved[key]

    def workspace_nbytes(
        self, name: str, loop: str = "", world_size: int = 1, second: str = ""
    ) -> int:
        """Return the bytes that a call's backward needs for a moment, besides its gradients.

        loop, world_size, second: as of `of_kernel`; "" for the unsplit call.
        """
        case = self._cases[self._keys[name]]
        loops = ((loop, second) if second else (loop,)) if loop else ()
        key = (self._keys[name], loops, world_size)
        if key not in self._workspaces:
            self._workspaces[key] = _observe(case, {}, loops, world_size, backward=True).backward
        return self._workspaces[key]

    def storage_of(self, value: str) -> str:
        """Return the value in whose memory this one lies: itself, or what it is a view of."""
        return self._roots[value]

    def _walk(self, node: Node) -> None:
        """Find the strides and the sharing of a call's results from those of its operands."""
        names = node.operands()
        stands = [self._stands[name] for name in names]
        results = tuple([stand_in(value) for value in node.results])
        rule = self.rules.get(node.name)
        key = self._keys[node.name] = (
            node.target,
            skeleton(node.args),
            skeleton(node.kwargs),
            tuple(stands),
            results,
            # Which operands are the same tensor matters: its memory is saved once.
            tuple([names.index(name) for name in names]),
            rule is None,
        )
        if key not in self._seen:
            call = OpCall.of(self.graph, node)
            case = self._cases[key] = _Case(call, rule, tuple(stands), results, self.device)
            seen = self._seen[key] = _observe(case, {})
            self._made[key] = tuple(map(fitted, seen.results, results))
        storages = self._seen[key].storages
        for value, fitted_spec, storage in zip(
            node.results, self._made[key], storages, strict=True
        ):
            self._stands[value.name] = fitted_spec
            has_own_memory = storage >= len(names)
            self._roots[value.name] = value.name if has_own_memory else self._roots[names[storage]]


def stand_in(value: Value) -> FakeTensorSpec:
    """Return the spec of a value with its elements in order, at the hints of its sizes."""
    grad = value.requires_grad and (value.dtype.is_floating_point or value.dtype.is_complex)
    return contiguous(tuple([hint(size) for size in value.shape]), value.dtype, grad)


def fitted(seen: FakeTensorSpec, expected: FakeTensorSpec) -> FakeTensorSpec:
    """Return a result's spec as it was seen, if it has the graph's shape; else the graph's.

    Shapes that depend on data are not what they will be. A gradient flows where both say so.
    """
    grad = seen.requires_grad and expected.requires_grad
    # Strides of another shape mean nothing.
    strides = seen.strides if seen.shape == expected.shape else expected.strides
    return FakeTensorSpec(expected.shape, strides, expected.dtype, grad)


def _resized(spec: FakeTensorSpec, shape: Sequence[int]) -> FakeTensorSpec:
    """Return a spec of other sizes with the same order of dims in memory, and the same gaps."""
    strides = []
    for stride in spec.strides:
        for size, new, inner in zip(spec.shape, shape, spec.strides, strict=True):
            # A stride is the product of the sizes inside it, and grows with each of them.
            if 0 < inner < stride and size:
                stride = stride * new // size
        strides.append(stride)
    return FakeTensorSpec(tuple(shape), tuple(strides), spec.dtype, spec.requires_grad)


def _observe(
    case: _Case,
    sizes: Mapping[str, int],
    loops: tuple[str, ...] = (),
    ranks: int = 1,
    backward: bool = False,
) -> Observed:
    """Run the call with other sizes of some loops, by a kernel if it splits any.

    sizes: by loop, in place of the rule's. loops: that the kernel splits; two, if it is an
    exchange. A kernel runs on the part that the first of `ranks` ranks has. backward: whether to
    run its backward too.
    """
    node, rule = case.call.node, case.rule
    run = partial(observe, backward=backward)
    operands, results = case.operands, case.results
    if rule is None:
        function = runner(node.target, None, case.device)
        return run(function, node.args, dict(node.kwargs), operands, results)

    def sized(stand: FakeTensorSpec, dims: tuple[tuple[str, ...], ...]) -> FakeTensorSpec:
        """Return the spec of a tensor at the sizes asked for, as the first rank holds it."""
        shape = list(stand.shape)
        for dim, names in enumerate(dims):
            for name in names:
                if name in sizes:
                    shape[dim] = shape[dim] * sizes[name] // max(hint(rule.sizes[name]), 1)
        for loop in loops:
            shard = place(rule, dims, LoopSplit(loop), ranks)
            if shard is not None:
                shape[shard.dim] = local_size(shape[shard.dim], shard, ranks)
        return _resized(stand, shape)

    if sizes or loops:
        operands = tuple(map(sized, operands, rule.operands))
        results = tuple(map(sized, results, rule.results))
    args, kwargs = node.args, dict(node.kwargs)
    if loops:
        loop = loops[0]
        kernel = rule.kernels[loop] if len(loops) == 1 else rule.exchanges[loop].kernel
        size = sizes.get(loop, hint(rule.sizes[loop]))
        kwargs |= {**dict(kernel.arguments), "group": StandInGroup(ranks), "size": size}
        if len(loops) > 1:
            kwargs["extent"] = sizes.get(loops[1], hint(rule.sizes[loops[1]]))
        function = getattr(kernels, kernel.name)
        return run(function, args, kwargs, operands, results, ("meta", "zeros"))
    # Constants such as the shape of a view must fit the other sizes.
    if sizes and rule.local_args is not None:
        args = rule.local_args(case.call, tuple([stand.shape for stand in results]))
    if rule.random:
        kwargs |= random_arguments(results[0].shape)
    return run(runner(node.target, rule, case.device), args, kwargs, operands, results)


def _with_loops(case: _Case, seen: Observed, split: tuple[str, ...] = (), ranks: int = 1) -> Saved:
    """Return what was seen, with the loops of internal memory: those that make it longer.

    seen: at the sizes of the graph. Each loop is lengthened by a prime of its own: memory that is
    longer by that prime has the loop. Where all of them at once tell nothing, each is by itself.
    """
    count = seen.operands
    inside = [i for i in seen.saved if i >= count and i not in seen.storages and seen.size(i)]
    loops_of_storage: dict[int, set[str]] = {storage: set() for storage in inside}
    rule = case.rule
    if inside and rule is not None and not seen.assumed:
        loops = [name for name in rule.loops if name not in rule.whole and (name,) != split[:1]]
        primes = dict(zip(loops, _PRIMES, strict=False))
        alone = [{name: 2} for name in loops]
        for times in [primes, *alone] if 1 < len(loops) == len(primes) else alone:
            sizes = {name: factor * hint(rule.sizes[name]) for name, factor in times.items()}
            more = _observe(case, sizes, split, ranks)
            # Another size may take another kernel, which saves other tensors: then nothing is
            # learnt.
            if more.saved != seen.saved or more.storages != seen.storages or more.assumed:
                continue
            rest = []
            for storage in inside:
                longer = more.size(storage) // seen.size(storage)
                has = {name for name, factor in times.items() if longer % factor == 0}
                if more.size(storage) == seen.size(storage) * prod(times[name] for name in has):
                    loops_of_storage[storage] |= has
                else:
                    rest.append(storage)
            if times is primes and not rest:
                break
    return Saved(
        tuple(i in seen.saved for i in range(count)),
        tuple(storage in seen.saved for storage in seen.storages),
        tuple(Internal(seen.size(i), frozenset(loops)) for i, loops in loops_of_storage.items()),
        tuple(storage if storage < count else None for storage in seen.storages),
        seen.assumed,
    )
