"""Hardware fitted to timings: measurements in, the figures of the cost model out."""

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

# The figures of `Matmul` that are tried: they enter the time in no way that could be solved for.
FILLS = (0.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
RELOADS = (0.0, 30.0, 60.0, 120.0, 240.0)
_ALIKE = 0.02  # Relative errors below this count as none: timings are no better.
_ROUNDS = 30  # How often the weights of least absolute errors are computed anew.
_WORTH = 0.8  # A second regime must bring the error down to this share.


@dataclass(frozen=True, slots=True)
class Product:
    """A timed product: `batch` times (rows, depth) x (depth, columns).

    itemsize: bytes of an element. seconds: of all `batch` products in one call.
    """

    batch: int
    rows: int
    columns: int
    depth: int
    itemsize: int
    seconds: float

    @property
    def nbytes(self) -> int:
        """The bytes of the operands and the result."""
        parts = self.rows * self.depth + self.depth * self.columns + self.rows * self.columns
        return self.batch * parts * self.itemsize


@dataclass(frozen=True, slots=True)
class Move:
    """A timed element-wise kernel that reads and writes `nbytes` in all."""

    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Call:
    """A timed collective of a tensor of `nbytes` in full over `world_size` ranks.

    across: each rank is on a node of its own; otherwise all are on one node.
    """

    kind: Collective
    nbytes: int
    world_size: int
    across: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Samples:
    """All timings of one machine.

    launch_seconds: of the smallest kernel. function_seconds: of one exponential besides moving it,
    0 if moving takes as long. spread: standard deviation of the time of equal work, relative.
    """

    products: tuple[Product, ...]
    moves: tuple[Move, ...]
    calls: tuple[Call, ...]
    launch_seconds: float
    function_seconds: float
    spread: float = 0.0


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement against the time that the fitted hardware predicts, in seconds.

    >>> Row("move 1 MB", measured=2.0, fitted=3.0).error
    0.5
    """

    what: str
    measured: float
    fitted: float

    @property
    def error(self) -> float:
        """The error of the prediction, relative to the measurement."""
        return self.fitted / self.measured - 1


@dataclass(frozen=True)
class Fit:
    """The fitted hardware, and how well it explains every measurement."""

    hardware: Hardware
    rows: tuple[Row, ...]


def fit(samples: Samples, base: Hardware, matmul: Matmul) -> Fit:
    """Return the hardware that explains the samples best.

    samples: all timings. base: name, source and sizes of the hardware, and figures that were not
    measured. matmul: the device's processors and tiles; a processor that works alone may have any
    size of tiles.
    Errors are relative, and far outliers count no more than linearly: a machine that others use too
    is at times much slower than it is, never faster.
    """
    hardware = replace(
        base,
        launch_seconds=samples.launch_seconds,
        spread=samples.spread,
        functions_per_second=1 / samples.function_seconds if samples.function_seconds else 0.0,
    )
    # In this order: products are compared with memory, collectives with neither.
    hardware = _with_memory(hardware, samples.moves)
    hardware = _with_products(hardware, samples.products, matmul)
    hardware = _with_links(hardware, samples.calls)
    return Fit(hardware, tuple(_rows(hardware, samples)))


def _with_memory(hardware: Hardware, moves: Sequence[Move]) -> Hardware:
    """Return the hardware with the rate at each size; in all it is that of the largest."""
    launch = hardware.launch_seconds
    rates = {
        move.nbytes: move.nbytes / (move.seconds - launch)
        for move in sorted(moves, key=lambda move: move.nbytes)
        # Shorter kernels measure the launch, not the memory.
        if move.seconds > 2 * launch
    }
    if not rates:
        return hardware
    rate_of_largest = rates[max(rates)]
    highest = max(rate_of_largest, hardware.memory_bytes_per_second)
    return replace(
        hardware,
        memory_bytes_per_second=highest,
        memory_efficiency=rate_of_largest / highest,
        memory_by_size=tuple(rates.items()),
    )


def _with_products(hardware: Hardware, products: Sequence[Product], matmul: Matmul) -> Hardware:
    """Return the hardware with efficiency, fill, reload and tiles, and a rate per itemsize.

    A grid search over fill, reload and tiles; the rates follow from each.
    """
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
    """Return the hardware with the rates that fit, given how shape matters.

    A peak that is known stays, and the efficiency says how much of it is reached; where it is not
    known, it is the best rate that was measured.
    """
    reached: dict[int, float] = {}
    for itemsize in sorted({product.itemsize for product in products}):
        of_size = [product for product in products if product.itemsize == itemsize]
        one = replace(hardware, flops_per_second=((itemsize, 1.0),))
        work = _arithmetic(one, of_size)
        seconds = _seconds(of_size) - hardware.launch_seconds
        bound = moved_seconds(np.array([float(each.nbytes) for each in of_size]), hardware)
        # Only products that are bound by arithmetic tell its rate.
        good = (bound < 0.7 * seconds) & (seconds > hardware.launch_seconds)
        if not good.any():
            good = seconds > 0
        reached[itemsize] = float(np.median(work[good] / seconds[good]))
    data_sheet = dict(hardware.flops_per_second)
    # The type that efficiency is stated for: two bytes where the data sheet has it, else float32.
    main = (
        min(reached, key=lambda itemsize: abs(itemsize - 4))
        if 2 not in data_sheet
        else min(reached)
    )
    efficiency = min(reached[main] / data_sheet[main], 1.0) if main in data_sheet else 1.0
    rates = {**data_sheet, **{size: rate / efficiency for size, rate in reached.items()}}
    return replace(
        hardware,
        flops_per_second=tuple(sorted(rates.items())),
        matmul=replace(hardware.matmul, efficiency=efficiency),
    )


def _with_links(hardware: Hardware, calls: Sequence[Call]) -> Hardware:
    """Return the hardware with a link for calls inside of nodes, and one for calls across."""
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
    """Return one or two regimes for each collective that was measured."""
    regimes: list[Regime] = []
    for kind in Collective:
        of_kind = sorted(
            (call for call in calls if call.kind is kind), key=lambda call: call.nbytes
        )
        if of_kind:
            regimes += _of_kind(kind, of_kind)
    return tuple(regimes)


def _of_kind(kind: Collective, calls: Sequence[Call]) -> list[Regime]:
    """Return the one or two regimes that fit the calls of one collective.

    Libraries switch protocols at some size: every size is tried as the border between two regimes,
    and the second one is taken if it brings the error down enough.
    """
    is_ring = Algorithm.RING.steps(kind, 2) is not None
    algorithm = Algorithm.RING if is_ring else Algorithm.EXCHANGE
    one = [_regime(algorithm, kind, calls, "measured")]
    best, wrong = one, _wrong(_call_seconds(Link(tuple(one)), calls), _seconds(calls))
    for cut in sorted({call.nbytes for call in calls})[2:-2]:
        two = [
            _regime(algorithm, kind, [c for c in calls if c.nbytes < cut], "measured-small"),
            _regime(algorithm, kind, [c for c in calls if c.nbytes >= cut], "measured"),
        ]
        error = _wrong(_call_seconds(Link(tuple(two)), calls), _seconds(calls))
        if error < wrong * _WORTH:
            best, wrong = two, error / _WORTH
    return best


def _regime(algorithm: Algorithm, kind: Collective, calls: Sequence[Call], protocol: str) -> Regime:
    """Return the regime floor + hops * latency + bytes sent / rate that fits best.

    The floor can be told from the latency only with groups of several sizes.
    """
    steps = [algorithm.steps(kind, call.world_size) for call in calls]
    possible_steps = [step for step in steps if step is not None]
    hops = np.array([float(step[0]) for step in possible_steps])
    sent = np.array(
        [step[1] * call.nbytes for step, call in zip(possible_steps, calls, strict=True)]
    )
    columns = [hops, sent]
    if len({call.world_size for call in calls}) > 1:
        columns.append(np.ones(len(calls)))
    coefficients = _non_negative(np.stack(columns, axis=1), _seconds(calls))
    floor = float(coefficients[2]) if len(coefficients) > 2 else 0.0
    # A rate that cannot be told from infinite is capped, so that it stays a finite number.
    rate = 1 / max(float(coefficients[1]), 1e-15)
    return Regime(algorithm, rate, float(coefficients[0]), floor, protocol, (kind.value,))


def _non_negative(matrix: Array, seconds: Array) -> Array:
    """Return coefficients >= 0 of least absolute relative errors.

    matrix: a row per measurement. Every choice of coefficients that are 0 is tried, each solved by
    iteratively reweighted least squares.
    """
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
            # Least squares weighted by 1/|error| are least absolute errors.
            weights = 1 / np.maximum(np.abs(used @ part - 1), _ALIKE)
        if (part < 0).any():
            continue
        error = float(np.abs(used @ part - 1).sum())
        if error < wrong - 1e-9:
            wrong, best = error, np.zeros(count)
            best[list(chosen)] = part
    return best


def _wrong(fitted: Array, measured: Array) -> float:
    """Return the mean of the relative errors, too much and too little alike."""
    # The logarithm makes twice as long and half as long the same error.
    return float(np.abs(np.log(fitted / measured)).mean())


def _seconds(samples: Iterable[Product | Move | Call]) -> Array:
    """Return the measured seconds of samples."""
    return np.array([sample.seconds for sample in samples])


def _arithmetic(hardware: Hardware, products: Sequence[Product]) -> Array:
    """Return the predicted arithmetic seconds of products."""
    sizes = [(p.batch, p.rows, p.columns, p.depth) for p in products]
    batch, rows, columns, depth = np.array(sizes, dtype=float).T
    seconds = np.empty(len(products))
    for itemsize in {product.itemsize for product in products}:
        of_size = np.array([product.itemsize == itemsize for product in products])
        seconds[of_size] = product_seconds(
            batch[of_size], rows[of_size], columns[of_size], depth[of_size], itemsize, hardware
        )
    return seconds


def _product_seconds(hardware: Hardware, products: Sequence[Product]) -> Array:
    """Return the predicted seconds of products, with memory traffic and launch."""
    moved = moved_seconds(np.array([float(each.nbytes) for each in products]), hardware)
    seconds: Array = np.maximum(_arithmetic(hardware, products), moved) + hardware.launch_seconds
    return seconds


def _call_seconds(link: Link, calls: Sequence[Call]) -> Array:
    """Return the predicted seconds of collectives over a link."""
    return np.array(
        [collective_seconds(call.kind, call.nbytes, link, call.world_size) for call in calls]
    )


def _rows(hardware: Hardware, samples: Samples) -> Iterable[Row]:
    """Yield every measurement with its prediction."""
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
