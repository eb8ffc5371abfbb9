"""Random ops that do not depend on the plan.

Every element draws from a counter-based generator keyed by (seed, step, op, its place in the
whole tensor), so that a mask is the same bit for bit however the tensor is split. The other mode,
"fast", draws from torch's own generators, one stream per shard: its numbers depend on the plan.
Both are functions of (seed, step), which is all that a checkpoint must hold.
"""

from __future__ import annotations

import contextlib
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from autoparallel.errors import AutoParallelError
from autoparallel.placement import Layout, Shard, local_layout_size, local_size, part_bounds
from autoparallel.runtime.ranks import Ranks
from autoparallel.support.torch_private import in_backward

__all__ = ["Generator", "drawing_from", "dropout", "generator", "op_key", "uniform", "using"]

_WORD = 0xFFFFFFFF
_LONG = 0xFFFFFFFFFFFFFFFF
# Elements that one thread works on at a time: two buffers of this many words stay in its cache.
_CHUNK = 1 << 16
# Forward passes whose recomputation can still be told from a new pass.
_REMEMBERED = 4096


@dataclass
class Generator:
    """Where a module's random numbers come from.

    seed: of the run, the same on every rank. step: passes so far that drew numbers. mode:
    "counter" (the same numbers under every plan) or "fast" (torch's generators, a stream per
    shard). streams, drawing: of the pass under way, those generators and its step. tickets: by
    which a repeated pass is recognized, and the steps of those passes.
    """

    seed: int = 0
    step: int = 0
    mode: str = "counter"
    streams: dict[tuple[int, torch.device], torch.Generator] = field(default_factory=dict)
    tickets: dict[int, int] = field(default_factory=dict, repr=False)
    drawing: int | None = None

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint must hold."""
        return {"seed": self.seed, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where the checkpoint was."""
        self.seed, self.step = int(state["seed"]), int(state["step"])

    def between_passes(self) -> None:
        """No pass is under way: the next one counts as a step when it first draws."""
        self.streams.clear()
        self.drawing = None

    def current_step(self) -> int:
        """The step of this pass, which from now on counts as one that draws.

        A pass that repeats an earlier one (torch.utils.checkpoint recomputes activations in the
        backward pass) draws what that one drew. It is recognized by torch's own generator, which
        checkpointing sets back: every pass takes one number from it, its ticket.
        Raises AutoParallelError for a pass inside a backward pass that repeats none.
        """
        if self.drawing is not None:
            return self.drawing
        if torch.compiler.is_compiling():
            self.drawing = self.step
            self.step += 1
            return self.drawing
        ticket = int(torch.empty((), dtype=torch.int64).random_())
        if not in_backward():
            self.tickets.pop(ticket, None)
            self.tickets[ticket] = self.drawing = self.step
            self.step += 1
            while len(self.tickets) > _REMEMBERED:
                del self.tickets[next(iter(self.tickets))]
            return self.drawing
        if ticket not in self.tickets:
            raise AutoParallelError(
                "a recomputed forward pass cannot draw the random numbers that it drew before",
                why="it runs inside a backward pass, and torch's generator is not where it was at "
                "the start of any earlier pass",
                fix="checkpoint with preserve_rng_state=True, torch's default",
            )
        self.drawing = self.tickets[ticket]
        return self.drawing

    def stream_states(self) -> dict[tuple[int, torch.device], torch.Tensor]:
        """Where torch's generators of the pass under way are."""
        return {key: stream.get_state() for key, stream in self.streams.items()}

    def repeated(
        self, step: int | None, states: Mapping[tuple[int, torch.device], torch.Tensor]
    ) -> Generator:
        """A generator that draws what this one drew in the pass `step`, from `states` on."""
        made = Generator(self.seed, self.step, self.mode, drawing=step)
        for (owner, device), state in states.items():
            made.streams[owner, device] = torch.Generator(device).set_state(state)
        return made

    def words(self, key: int) -> tuple[int, int]:
        """Two words of 32 bits that an op's numbers of this pass are keyed by."""
        mixed = _mixed_long(self.seed, self.current_step(), key)
        return mixed >> 32, mixed & _WORD

    def stream(self, layout: Layout, ranks: Ranks, device: torch.device) -> torch.Generator:
        """torch's generator for a tensor that lies so. Ranks that hold the same values share it."""
        owner = 0
        for placement, size, rank in zip(layout, ranks.sizes, ranks.coordinates, strict=True):
            owner = owner * (size + 1) + (rank + 1 if isinstance(placement, Shard) else 0)
        if (owner, device) not in self.streams:
            seed = _mixed_long(self.seed, self.current_step(), owner) >> 1
            made = torch.Generator(device)
            self.streams[owner, device] = made.manual_seed(seed)
        return self.streams[owner, device]


_current = threading.local()


class using:  # noqa: N801
    """Context of one pass, in which random ops draw from `source`."""

    def __init__(self, source: Generator) -> None:
        self.source = source

    def __enter__(self) -> None:
        self.before = getattr(_current, "generator", None)
        _current.generator = self.source
        self.source.between_passes()

    def __exit__(self, *_: object) -> None:
        _current.generator = self.before
        self.source.between_passes()


@contextlib.contextmanager
def drawing_from(source: Generator) -> Iterator[None]:
    """Context of a part of a pass, in which random ops draw from `source` as it is."""
    before = getattr(_current, "generator", None)
    _current.generator = source
    try:
        yield
    finally:
        _current.generator = before


def generator() -> Generator:
    """The generator in use; one with seed 0 outside any module."""
    found = getattr(_current, "generator", None)
    return found if found is not None else Generator()


def op_key(name: str) -> int:
    """A 32-bit key of an op, the same in every process."""
    return zlib.crc32(name.encode())


def _mixed_long(*values: int) -> int:
    """64 well-mixed bits of all values, in order (Steele et al. 2014, splitmix64)."""
    bits = 0
    for value in values:
        bits = ((bits ^ (value & _LONG)) + 0x9E3779B97F4A7C15) & _LONG
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _LONG
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _LONG
        bits ^= bits >> 31
    return bits


def _signed(word: int) -> int:
    """The 32-bit integer with the same bits, as torch's int32 has it."""
    return ((word + 0x80000000) & _WORD) - 0x80000000


# Of each of three turns: how far to shift, which bits that leaves, and what to multiply by.
_TURNS = tuple(
    (shift, (1 << (32 - shift)) - 1, _signed(factor))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1))
)
# The same as tensors without dims: with Python's numbers an op costs microseconds more to start.
_READY_TURNS = tuple(
    tuple(torch.tensor(number, dtype=torch.int32, device="cpu") for number in turn)
    for turn in _TURNS
)


def _mix(bits: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """Mixes int32 words in place, one to one (Wellons' lowbias32). spare: of the same shape.

    int32 wraps as the unsigned words would; only the shift needs its sign bits cleared.
    """
    turns: Any = _READY_TURNS if type(bits) is torch.Tensor else _TURNS
    for turn, (shift, left, factor) in enumerate(turns):
        torch.bitwise_right_shift(bits, shift, out=spare)
        bits.bitwise_xor_(spare.bitwise_and_(left))
        if turn < 2:
            bits.mul_(factor)
    return bits


# How one axis cuts a dim: the cut, the number of ranks, and this rank.
_Cut = tuple[Shard, int, int]


@dataclass(frozen=True)
class _Side:
    """Some neighbouring dims of a tensor taken as one: its rows, or its columns.

    sizes: of the whole. cuts: of each dim, the outermost first. factor, key: what sets the words
    of this side apart from those of other sides, ops, steps and seeds.
    """

    sizes: tuple[int, ...]
    cuts: tuple[tuple[_Cut, ...], ...]
    factor: int
    key: int

    @property
    def local_sizes(self) -> tuple[int, ...]:
        """Sizes of this rank's part."""
        found = []
        for size, cuts in zip(self.sizes, self.cuts, strict=True):
            for shard, world_size, rank in cuts:
                size = local_size(size, shard, world_size, rank)
            found.append(size)
        return tuple(found)

    def words(self, length: int, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
        """int32 words of this rank's places, `length` at a time, each with where it starts.

        Different places of the whole have different words, if there are at most 2^32 of them.
        """
        count = prod(self.local_sizes)
        for start in range(0, count, length):
            place = self._places(start, min(start + length, count), device)
            bits = place if place.dtype == torch.int32 else (place & _WORD).to(torch.int32)
            bits = bits.mul_(_signed(self.factor)).add_(_signed(self.key))
            spare = torch.empty_like(bits)
            _mix(bits, spare)
            if prod(self.sizes) > _WORD + 1:
                _mix(bits.add_((place >> 32).to(torch.int32)), spare)
            yield start, bits

    def _places(self, start: int, stop: int, device: torch.device) -> torch.Tensor:
        """Where this rank's elements [start, stop) of the side are in the whole of it.

        int32 where that is enough.
        """
        if not any(self.cuts[1:]) and all(
            shard.blocks == 1 for cut in self.cuts for shard, *_ in cut
        ):
            offset = self._first() * prod(self.sizes[1:])
            kind = torch.int32 if prod(self.sizes) <= _WORD >> 1 else torch.int64
            return torch.arange(offset + start, offset + stop, dtype=kind, device=device)
        index = torch.arange(start, stop, device=device)
        places, stride = torch.zeros_like(index), 1
        for dim in reversed(range(len(self.sizes))):
            own = self.local_sizes[dim]
            at = index.remainder(own) if dim else index
            places += _place_in_whole(at, self.sizes[dim], self.cuts[dim]) * stride
            index = index // own
            stride *= self.sizes[dim]
        return places

    def _first(self) -> int:
        """Where this rank's part of the first dim begins, in the whole."""
        first = 0
        size = self.sizes[0] if self.sizes else 1
        for shard, world_size, rank in self.cuts[0] if self.cuts else ():
            start, stop = part_bounds(size // shard.unit, world_size, rank)
            first, size = first + start * shard.unit, (stop - start) * shard.unit
        return first


def _place_in_whole(index: torch.Tensor, size: int, cuts: tuple[_Cut, ...]) -> torch.Tensor:
    """Where the elements at `index` of a rank's part are in a whole dim of `size`."""
    if not cuts:
        return index
    (shard, world_size, rank), *inner = cuts
    index = _place_in_whole(index, local_size(size, shard, world_size, rank), tuple(inner))
    block = size // shard.blocks
    first, last = (edge * shard.unit for edge in part_bounds(block // shard.unit, world_size, rank))
    length = last - first
    return index // length * block + index.remainder(length).add_(first)


def _sides(
    shape: tuple[int, ...], layout: Layout, ranks: Ranks, words: tuple[int, int]
) -> tuple[_Side, _Side]:
    """Rows and columns of a tensor of `shape`: its dims, cut where fewest of both come out."""
    costs = [prod(shape[:at]) + prod(shape[at:]) for at in range(len(shape) + 1)]
    at = costs.index(min(costs))
    cuts: list[tuple[_Cut, ...]] = [()] * len(shape)
    for placement, size, rank in zip(layout, ranks.sizes, ranks.coordinates, strict=True):
        if isinstance(placement, Shard):
            cuts[placement.dim] += ((placement, size, rank),)
    rows = _Side(shape[:at], tuple(cuts[:at]), 1, words[0])
    return rows, _Side(shape[at:], tuple(cuts[at:]), 0x9E3779B1, words[1])


def _drawn(
    rows: _Side, columns: _Side, device: torch.device
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Random int32 words of this rank's elements, piece by piece: (rows, columns, words).

    The words of a piece are gone when the next one is asked for. An element's word is
    mix(row's word ^ column's word), where those are mixed from its place and the key.
    """
    height, width = prod(rows.local_sizes), prod(columns.local_sizes)
    most = max(1, height * width)
    if device.type == "cpu" and not torch.compiler.is_compiling():
        most = min(most, _CHUNK * torch.get_num_threads())
    high = max(1, most // max(1, width))
    buffer, spare = torch.empty((2, most), dtype=torch.int32, device=device).unbind(0)
    for left, across in columns.words(most, device):
        for top, block in rows.words(most, device):
            for down in block.split(high):
                shape = (len(down), len(across))
                count = shape[0] * shape[1]
                bits = buffer[:count].view(shape)
                torch.bitwise_xor(down[:, None], across, out=bits)
                _mix(bits, spare[:count].view(shape))
                yield slice(top, top + shape[0]), slice(left, left + shape[1]), bits
                top += shape[0]


def uniform(
    shape: tuple[int, ...],
    key: int,
    placements: Layout,
    ranks: Ranks,
    device: torch.device,
    source: Generator,
) -> torch.Tensor:
    """Uniform numbers in [0, 1) for the local part of a tensor of `shape`, float32, 24 bits."""
    if source.mode == "fast":
        local = [
            local_layout_size(size, dim, placements, ranks.sizes, ranks.coordinates)
            for dim, size in enumerate(shape)
        ]
        stream = source.stream(placements, ranks, device)
        return torch.rand(local, generator=stream, device=device)
    rows, columns = _sides(shape, placements, ranks, source.words(key))
    made = torch.empty((prod(rows.local_sizes), prod(columns.local_sizes)), device=device)
    for down, across, bits in _drawn(rows, columns, device):
        made[down, across] = bits.bitwise_right_shift_(8).add_(1 << 23)
    return made.mul_(1.0 / (1 << 24)).view(rows.local_sizes + columns.local_sizes)


def _kept(
    x: torch.Tensor,
    probability: float,
    key: int,
    shape: tuple[int, ...],
    placements: Layout,
    ranks: Ranks,
    source: Generator,
) -> torch.Tensor:
    """1 for every element of x that dropout keeps, 0 with `probability`: uint8.

    One byte for each is all that waits for the backward pass. (Of bool, a CPU's products are slow.)
    """
    if source.mode == "fast":
        stream = source.stream(placements, ranks, x.device)
        made = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        return made.bernoulli_(1 - probability, generator=stream)
    rows, columns = _sides(shape, placements, ranks, source.words(key))
    size = (prod(rows.local_sizes), prod(columns.local_sizes))
    made = torch.empty(size, dtype=torch.bool, device=x.device)
    least = _signed(0x80000000 + round(probability * (1 << 32)))
    for down, across, bits in _drawn(rows, columns, x.device):
        made[down, across] = bits.ge(least)
    return made.view(torch.uint8).view(x.shape)


def dropout(
    x: torch.Tensor,
    probability: float,
    train: bool,
    *,
    key: int,
    shape: tuple[int, ...],
    placements: Layout,
    ranks: Ranks,
) -> torch.Tensor:
    """x with each element zeroed with `probability`, the others scaled by 1 / (1 - probability).

    shape: of the whole. placements: of x; every rank of a whole or pending sum draws alike.
    """
    if not train or probability == 0:
        return x
    if probability == 1:
        return x * 0
    with torch.no_grad():
        kept = _kept(x, probability, key, shape, placements, ranks, generator())
    return (x * kept).mul_(1 / (1 - probability))
