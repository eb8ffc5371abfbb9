"""Hardware fitted to timings: numbers in, numbers out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from autoparallel.cost.collective_times import collective_seconds
from autoparallel.cost.hardware import Algorithm, Hardware, Link, Matmul, Regime
from autoparallel.cost.matmul import product_seconds
from autoparallel.cost.memory_moves import moved_seconds
from autoparallel.placement import Collective
from autoparallel.support.units import bytes_text

__all__ = ["Call", "Fit", "Move", "Product", "Row", "Samples", "fit"]

Array = npt.NDArray[np.float64]

FILLS = (0.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
RELOADS = (0.0, 30.0, 60.0, 120.0, 240.0)
_ALIKE = 0.02  # relative errors below this count as none: timings are no better
_ROUNDS = 30  # of reweighting
_WORTH = 0.8  # a second regime must bring the error down to this share


@dataclass(frozen=True, slots=True)
class Product:
    """`batch` products (rows, depth) x (depth, columns) of elements of `itemsize` bytes."""

    batch: int
    rows: int
    columns: int
    depth: int
    itemsize: int
    seconds: float

    @property
    def nbytes(self) -> int:
        """Of the operands and the result."""
        parts = self.rows * self.depth + self.depth * self.columns + self.rows * self.columns
        return self.batch * parts * self.itemsize


@dataclass(frozen=True, slots=True)
class Move:
    """An element-wise kernel that reads and writes `nbytes` in all."""

    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Call:
    """A collective of a tensor of `nbytes` in full over world_size ranks, of one node or several:
    across, of ranks that are each on a node of their own."""

    kind: Collective
    nbytes: int
    world_size: int
    across: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Samples:
    """What was measured. launch_seconds: of the smallest kernel. function_seconds: of one
    exponential besides moving it, 0 if moving takes as long. spread: of what equal work takes,
    relative."""

    products: tuple[Product, ...]
    moves: tuple[Move, ...]
    calls: tuple[Call, ...]
    launch_seconds: float
    function_seconds: float
    spread: float = 0.0


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement against what the fitted hardware predicts."""

    what: str
    measured: float
    fitted: float

    @property
    def error(self) -> float:
        """Relative."""
        return self.fitted / self.measured - 1


@dataclass(frozen=True)
class Fit:
    """The hardware, and how well it explains every measurement."""

    hardware: Hardware
    rows: tuple[Row, ...]


def fit(samples: Samples, base: Hardware, matmul: Matmul) -> Fit:
    """The hardware that explains the samples best.

    base: name, source and sizes of the hardware, and what was not measured. matmul: the device's
    processors and tiles; a processor that works alone may have any size of tiles.
    Errors are relative, and far outliers count no more than linearly: a machine that others use too
    is at times much slower than it is, never faster.
    """
    hardware = replace(
        base,
        launch_seconds=samples.launch_seconds,
        spread=samples.spread,
        functions_per_second=1 / samples.function_seconds if samples.function_seconds else 0.0,
    )
    hardware = _with_memory(hardware, samples.moves)
    hardware = _with_products(hardware, samples.products, matmul)
    hardware = _with_links(hardware, samples.calls)
    return Fit(hardware, tuple(_rows(hardware, samples)))


def _with_memory(hardware: Hardware, moves: Sequence[Move]) -> Hardware:
    """The rate at each size; in all it is that of the largest."""
    launch = hardware.launch_seconds
    rates = {
        move.nbytes: move.nbytes / (move.seconds - launch)
        for move in sorted(moves, key=lambda move: move.nbytes)
        if move.seconds > 2 * launch
    }
    if not rates:
        return hardware
    last = rates[max(rates)]
    highest = max(last, hardware.memory_bytes_per_second)
    return replace(
        hardware,
        memory_bytes_per_second=highest,
        memory_efficiency=last / highest,
        memory_by_size=tuple(rates.items()),
    )


def _with_products(hardware: Hardware, products: Sequence[Product], matmul: Matmul) -> Hardware:
    """Efficiency, fill, reload and tiles, and a rate for each size of element."""
    if not products:
        return hardware
    measured = _seconds(products)
    tilings = [matmul.tiles]
    if matmul.processors == 1:
        tilings = [((1, 1),), ((4, 16),), ((8, 16),), ((16, 32),), ((64, 64),)]
    best: tuple[float, Hardware] | None = None
    for tiles, fill in itertools.product(tilings, FILLS):
        for reload in RELOADS if len(tiles) > 1 else (0.0,):
            shape = replace(matmul, tiles=tiles, fill=fill, reload=reload, efficiency=1.0)
            trial = _with_rates(replace(hardware, matmul=shape), products)
            wrong = _wrong(_product_seconds(trial, products), measured)
            if best is None or wrong < best[0] * (1 - 1e-6):
                best = wrong, trial
    assert best is not None
    return best[1]


def _with_rates(hardware: Hardware, products: Sequence[Product]) -> Hardware:
    """The rates that fit, given how products depend on their shape.

    A peak that is known stays, and the efficiency says how much of it is reached; where it is not
    known, it is the best that was seen.
    """
    reached: dict[int, float] = {}
    for itemsize in sorted({product.itemsize for product in products}):
        own = [product for product in products if product.itemsize == itemsize]
        one = replace(hardware, flops_per_second=((itemsize, 1.0),))
        work = _arithmetic(one, own)
        seconds = _seconds(own) - hardware.launch_seconds
        bound = moved_seconds(np.array([float(each.nbytes) for each in own]), hardware)
        good = (bound < 0.7 * seconds) & (seconds > hardware.launch_seconds)
        if not good.any():
            good = seconds > 0
        reached[itemsize] = float(np.median(work[good] / seconds[good]))
    known = dict(hardware.flops_per_second)
    main = min(reached, key=lambda itemsize: abs(itemsize - 4)) if 2 not in known else min(reached)
    efficiency = min(reached[main] / known[main], 1.0) if main in known else 1.0
    rates = {**known, **{size: rate / efficiency for size, rate in reached.items()}}
    return replace(
        hardware,
        flops_per_second=tuple(sorted(rates.items())),
        matmul=replace(hardware.matmul, efficiency=efficiency),
    )


def _with_links(hardware: Hardware, calls: Sequence[Call]) -> Hardware:
    """A link for what was measured inside of nodes, and one for what was measured across."""
    inside = _regimes([call for call in calls if not call.across])
    network = _regimes([call for call in calls if call.across])
    if inside:
        hardware = replace(hardware, inside=Link(inside))
        if not network:
            # Not measured: what is known of the network, in the node's regimes.
            far = {each.algorithm: each for each in reversed(hardware.network.regimes)}
            network = tuple(
                replace(
                    each,
                    bytes_per_second=min(
                        each.bytes_per_second, far[each.algorithm].bytes_per_second
                    ),
                    hop_seconds=max(each.hop_seconds, far[each.algorithm].hop_seconds),
                )
                for each in inside
            )
    return replace(hardware, network=Link(network)) if network else hardware


def _regimes(calls: Sequence[Call]) -> tuple[Regime, ...]:
    """One or two ways to make each collective."""
    found: list[Regime] = []
    for kind in Collective:
        own = sorted((call for call in calls if call.kind is kind), key=lambda call: call.nbytes)
        if own:
            found += _of_kind(kind, own)
    return tuple(found)


def _of_kind(kind: Collective, calls: Sequence[Call]) -> list[Regime]:
    algorithm = Algorithm.EXCHANGE if kind is Collective.ALL_TO_ALL else Algorithm.RING
    one = [_regime(algorithm, kind, calls, "measured")]
    best, wrong = one, _wrong(_call_seconds(Link(tuple(one)), calls), _seconds(calls))
    for cut in sorted({call.nbytes for call in calls})[2:-2]:
        two = [
            _regime(algorithm, kind, [c for c in calls if c.nbytes < cut], "measured-small"),
            _regime(algorithm, kind, [c for c in calls if c.nbytes >= cut], "measured"),
        ]
        found = _wrong(_call_seconds(Link(tuple(two)), calls), _seconds(calls))
        if found < wrong * _WORTH:
            best, wrong = two, found / _WORTH
    return best


def _regime(algorithm: Algorithm, kind: Collective, calls: Sequence[Call], protocol: str) -> Regime:
    """floor + hops x latency + bytes sent / rate. The floor shows only in several group sizes."""
    steps = [algorithm.steps(kind, call.world_size) for call in calls]
    known = [step for step in steps if step is not None]
    hops = np.array([float(step[0]) for step in known])
    sent = np.array([step[1] * call.nbytes for step, call in zip(known, calls, strict=True)])
    columns = [hops, sent]
    if len({call.world_size for call in calls}) > 1:
        columns.append(np.ones(len(calls)))
    found = _non_negative(np.stack(columns, axis=1), _seconds(calls))
    floor = float(found[2]) if len(found) > 2 else 0.0
    rate = 1 / max(float(found[1]), 1e-15)
    return Regime(algorithm, rate, float(found[0]), floor, protocol, (kind.value,))


def _non_negative(matrix: Array, seconds: Array) -> Array:
    """Least absolute relative errors with coefficients >= 0: every choice of those that are 0 is
    tried, each solved by reweighted least squares."""
    count = matrix.shape[1]
    best = np.zeros(count)
    wrong = np.inf
    for chosen in itertools.product((False, True), repeat=count):
        if not any(chosen):
            continue
        used = matrix[:, chosen] / seconds[:, None]
        weights = np.ones(len(seconds))
        for _ in range(_ROUNDS):
            scaled = np.sqrt(weights)
            part = np.linalg.lstsq(used * scaled[:, None], scaled, rcond=None)[0]
            weights = 1 / np.maximum(np.abs(used @ part - 1), _ALIKE)
        if (part < 0).any():
            continue
        found = float(np.abs(used @ part - 1).sum())
        if found < wrong - 1e-9:
            wrong, best = found, np.zeros(count)
            best[list(chosen)] = part
    return best


def _wrong(fitted: Array, measured: Array) -> float:
    """Mean of the relative errors, too much and too little alike."""
    return float(np.abs(np.log(fitted / measured)).mean())


def _seconds(samples: Iterable[Product | Move | Call]) -> Array:
    return np.array([sample.seconds for sample in samples])


def _arithmetic(hardware: Hardware, products: Sequence[Product]) -> Array:
    sizes = [(p.batch, p.rows, p.columns, p.depth) for p in products]
    batch, rows, columns, depth = np.array(sizes, dtype=float).T
    made = np.empty(len(products))
    for itemsize in {product.itemsize for product in products}:
        own = np.array([product.itemsize == itemsize for product in products])
        made[own] = product_seconds(
            batch[own], rows[own], columns[own], depth[own], itemsize, hardware
        )
    return made


def _product_seconds(hardware: Hardware, products: Sequence[Product]) -> Array:
    moved = moved_seconds(np.array([float(each.nbytes) for each in products]), hardware)
    made: Array = np.maximum(_arithmetic(hardware, products), moved) + hardware.launch_seconds
    return made


def _call_seconds(link: Link, calls: Sequence[Call]) -> Array:
    return np.array(
        [collective_seconds(call.kind, call.nbytes, link, call.world_size) for call in calls]
    )


def _rows(hardware: Hardware, samples: Samples) -> Iterable[Row]:
    """Every measurement, and what is predicted for it."""
    if samples.products:
        fitted = _product_seconds(hardware, samples.products)
        for product, seconds in zip(samples.products, fitted, strict=True):
            shape = f"{product.rows} x {product.depth} x {product.columns}"
            many = f"{product.batch} x " if product.batch > 1 else ""
            what = f"product {many}({shape}) of {8 * product.itemsize} bits"
            yield Row(what, product.seconds, float(seconds))
    for move in samples.moves:
        seconds = moved_seconds(np.array([float(move.nbytes)]), hardware)[0]
        yield Row(
            f"move {bytes_text(move.nbytes)}",
            move.seconds,
            float(seconds + hardware.launch_seconds),
        )
    for call in samples.calls:
        link = hardware.network if call.across else hardware.inside
        seconds = collective_seconds(call.kind, call.nbytes, link, call.world_size)
        ranks = f"{call.world_size} {'nodes' if call.across else 'ranks of a node'}"
        name = call.kind.value.replace("_", "-")
        what = f"{name} {bytes_text(call.nbytes)} on {ranks}"
        yield Row(what, call.seconds, seconds)
