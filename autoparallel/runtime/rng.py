"""Random numbers that do not depend on the plan, and dropout.

Every element draws from a counter-based generator keyed by (seed, step, op, its place in the whole
tensor), so that a mask is the same bit for bit however the tensor is split (the idea is that of
Salmon et al. 2011, Philox). The other mode, "fast", draws from torch's own generators, one stream
per shard: its numbers depend on the plan. Both are functions of (seed, step), which is all that a
checkpoint must hold.
"""

from __future__ import annotations

import contextlib
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from autoparallel.errors import AutoParallelError
from autoparallel.placement import Layout, Shard, local_layout_size
from autoparallel.runtime.counter_draws import (
    compiled_mask,
    compiled_uniform,
    mask_of,
    uniform_of,
)
from autoparallel.runtime.counter_words import WORD, cuts_of, sides, signed_word
from autoparallel.runtime.ranks import Ranks
from autoparallel.support.torch_private import in_backward

__all__ = ["Generator", "drawing_from", "dropout", "generator", "op_key", "uniform", "using"]

_LONG = 0xFFFFFFFFFFFFFFFF
# Keys of an op's second, third, ... draw differ from its first one's by multiples of this.
NEXT_DRAW = 0x632BE5AB
# So many forward passes are remembered: recomputing one of them is told from a new pass.
_REMEMBERED = 4096


@dataclass
class Generator:
    """The source of a module's random numbers.

    seed: of the run, the same on every rank. step: the number of passes so far that drew numbers.
    mode: "counter" (the same numbers under every plan) or "fast" (torch's generators, a stream per
    shard). streams, drawing: of the pass under way, those generators by (owner, device), and its
    step. tickets: numbers by which a repeated pass is recognized, and the steps of those passes.
    ready, rows: the words of a compiled program's draws, and the row of each key; pass_words: both,
    for all draws of the pass (`make_ready`, `draw_as`).

    >>> source = Generator(seed=1)
    >>> with using(source):
    ...     _ = source.words(op_key("dropout"))  # a pass that draws
    >>> source.state_dict()
    {'seed': 1, 'step': 1}
    """

    seed: int = 0
    step: int = 0
    mode: str = "counter"
    streams: dict[tuple[int, torch.device], torch.Generator] = field(default_factory=dict)
    tickets: dict[int, int] = field(default_factory=dict, repr=False)
    drawing: int | None = None
    ready: torch.Tensor | None = field(default=None, repr=False, compare=False)
    rows: dict[int, int] = field(default_factory=dict, repr=False, compare=False)
    pass_words: tuple[torch.Tensor, dict[int, int]] | None = field(
        default=None, repr=False, compare=False
    )

    def state_dict(self) -> dict[str, int]:
        """Return all that a checkpoint must hold: seed and step."""
        return {"seed": self.seed, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a checkpoint's seed and step."""
        self.seed, self.step = int(state["seed"]), int(state["step"])

    def between_passes(self) -> None:
        """Forget the pass that was under way: the next one counts as a step when it first draws."""
        self.streams.clear()
        self.drawing = None
        self.ready, self.rows, self.pass_words = None, {}, None

    def current_step(self) -> int:
        """Return the step of this pass, which from now on counts as one that draws.

        A pass that repeats an earlier one (torch.utils.checkpoint recomputes activations in the
        backward pass) draws the numbers of that one. It is recognized by torch's own generator,
        which checkpointing sets back: every pass takes one number from it, its ticket.
        Raises AutoParallelError for a pass inside a backward pass that repeats none.
        """
        if self.drawing is not None:
            return self.drawing
        # A compiled program that no `make_ready` came before, such as one of torch.fx: to read a
        # ticket's value would break its graph.
        if torch.compiler.is_compiling():
            self.drawing = self.step
            self.step += 1
            return self.drawing
        ticket = int(torch.empty((), dtype=torch.int64).random_())
        if not in_backward():
            # A ticket that is drawn anew moves to the end, so that the oldest passes are forgotten
            # first.
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
        """Return the states of torch's generators of the pass under way, by (owner, device)."""
        return {key: stream.get_state() for key, stream in self.streams.items()}

    def repeated(
        self, step: int | None, states: Mapping[tuple[int, torch.device], torch.Tensor]
    ) -> Generator:
        """Return a generator that draws the numbers that this one drew in the pass `step`, from
        `states` on.
        """
        again = Generator(self.seed, self.step, self.mode, drawing=step)
        for (owner, device), state in states.items():
            again.streams[owner, device] = torch.Generator(device).set_state(state)
        return again

    def make_ready(self, keys: tuple[int, ...], device: torch.device) -> None:
        """Compute the words of a pass before it runs, as a tensor that a compiled program reads.

        A compiler takes numbers of Python for constant, and the step is another one in each pass.
        keys: of the program's random ops.
        """
        if not keys:
            return
        every = _several(keys)
        self.rows = {key: row for row, key in enumerate(every)}
        self.ready = _mixed_words(_mixed_long(self.seed, self.current_step()), every, device)
        self.pass_words = self.ready, self.rows

    def draw_as(self, keys: tuple[int, ...], others: tuple[int, ...]) -> None:
        """Have the ops that draw by `others` draw by `keys` from now on, in their order.

        One compiled function so draws the numbers of another block in each of its calls.
        """
        assert self.pass_words is not None
        words, rows = self.pass_words
        self.ready = words[[rows[key] for key in _several(keys)]]
        self.rows = {key: row for row, key in enumerate(_several(others))}

    def traced_words(self, key: int, device: torch.device) -> torch.Tensor:
        """Return the two words of `words` as int32, while torch.compile traces a program."""
        if self.ready is not None:
            return self.ready[self.rows[key]]
        words = [signed_word(word) for word in self.words(key)]
        return torch.tensor(words, dtype=torch.int32, device=device)

    def words(self, key: int) -> tuple[int, int]:
        """Return two words of 32 bits that an op's numbers of this pass are keyed by. key: of the
        op.
        """
        mixed = _mixed_long(self.seed, self.current_step(), key)
        return mixed >> 32, mixed & WORD

    def stream(self, layout: Layout, ranks: Ranks, device: torch.device) -> torch.Generator:
        """Return torch's generator for a tensor that lies so. Ranks that hold the same values share
        it.
        """
        owner = 0
        for placement, size, rank in zip(layout, ranks.sizes, ranks.coordinates, strict=True):
            # The owner is a number with one digit per mesh axis: the rank's place where the axis
            # splits the tensor, 0 where all its ranks hold the same.
            owner = owner * (size + 1) + (rank + 1 if isinstance(placement, Shard) else 0)
        if (owner, device) not in self.streams:
            seed = _mixed_long(self.seed, self.current_step(), owner) >> 1
            stream = torch.Generator(device)
            self.streams[owner, device] = stream.manual_seed(seed)
        return self.streams[owner, device]


_current = threading.local()


class using:  # noqa: N801
    """A context of one pass, in which random ops draw from `source`.

    It notes the start and the end of the pass, so that the pass counts as one step if it draws.
    """

    def __init__(self, source: Generator) -> None:
        self.source = source

    def __enter__(self) -> None:
        """Begin the pass."""
        self.before = getattr(_current, "generator", None)
        _current.generator = self.source
        self.source.between_passes()

    def __exit__(self, *_: object) -> None:
        """End the pass."""
        _current.generator = self.before
        self.source.between_passes()


@contextlib.contextmanager
def drawing_from(source: Generator) -> Iterator[None]:
    """Let a part of a pass draw from `source`, a context in which the step of `source` stays as it
    is.

    >>> with drawing_from(Generator(seed=3)):
    ...     generator().seed
    3
    """
    before = getattr(_current, "generator", None)
    _current.generator = source
    try:
        yield
    finally:
        _current.generator = before


def generator() -> Generator:
    """Return the generator in use; outside any module it is one with seed 0.

    >>> generator().seed
    0
    """
    current = getattr(_current, "generator", None)
    return current if current is not None else Generator()


def op_key(name: str) -> int:
    """Return a 32-bit key of an op, the same in every process. name: of the op's node.

    >>> op_key("dropout")
    2458513353
    """
    return zlib.crc32(name.encode())


def _several(keys: Iterable[int]) -> list[int]:
    """Return the keys of all draws of random ops, of which some draw up to four times."""
    several = (0, NEXT_DRAW, NEXT_DRAW << 1, NEXT_DRAW ^ (NEXT_DRAW << 1))
    return [key ^ other for key in keys for other in several]


def _mixed_long(*values: int) -> int:
    """Return 64 well-mixed bits of all values, in order (Steele et al. 2014, splitmix64)."""
    bits = 0
    for value in values:
        bits = ((bits ^ (value & _LONG)) + 0x9E3779B97F4A7C15) & _LONG
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _LONG
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _LONG
        bits ^= bits >> 31
    return bits


def _mixed_words(bits: int, keys: list[int], device: torch.device) -> torch.Tensor:
    """Return, for each key, the two words of `_mixed_long(.., key)`, signed: (keys, 2) int32.

    bits: what `_mixed_long` gives for all that comes before the key. int64 wraps as the unsigned
    numbers would; only the shifts need their sign bits cleared.
    """

    def signed(number: int) -> int:
        return ((number + (1 << 63)) & _LONG) - (1 << 63)

    mixed = torch.tensor(keys, device=device).bitwise_xor_(signed(bits))
    mixed.add_(signed(0x9E3779B97F4A7C15))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        mixed ^= (mixed >> shift) & ((1 << (64 - shift)) - 1)
        mixed *= signed(factor)
    return torch.stack([mixed >> 32, mixed], dim=1).to(torch.int32)


def uniform(
    shape: tuple[int, ...],
    key: int,
    placements: Layout,
    ranks: Ranks,
    device: torch.device,
    source: Generator,
) -> torch.Tensor:
    """Return uniform numbers in [0, 1) for this rank's part of a tensor, float32, of 24 bits.

    shape: of the whole. key: of the op, from `op_key`. placements: of the whole on each mesh axis;
    every rank of a whole value or a pending sum draws alike. ranks: this rank's place. source: the
    module's generator, whose pass is under way.

    >>> from autoparallel.placement import Invariant
    >>> from autoparallel.runtime.groups import SingleGroup, thread_groups
    >>> from autoparallel.runtime.ranks import one_axis
    >>> alone, cpu = one_axis(SingleGroup()), torch.device("cpu")
    >>> whole = uniform((4,), 7, (Invariant(),), alone, cpu, Generator(seed=1))
    >>> second = one_axis(thread_groups(2)[1])
    >>> part = uniform((4,), 7, (Shard(0),), second, cpu, Generator(seed=1))
    >>> torch.equal(whole[2:], part)
    True
    """
    # A compiled program has no use for torch's generators, which it cannot be given.
    if torch.compiler.is_compiling():
        return compiled_uniform(source.traced_words(key, device), shape, cuts_of(placements, ranks))
    if source.mode == "fast":
        local = [
            local_layout_size(size, dim, placements, ranks.sizes, ranks.coordinates)
            for dim, size in enumerate(shape)
        ]
        stream = source.stream(placements, ranks, device)
        return torch.rand(local, generator=stream, device=device)
    return uniform_of(*sides(shape, placements, ranks, source.words(key)), device)


def _dropout_mask(
    x: torch.Tensor,
    probability: float,
    key: int,
    shape: tuple[int, ...],
    placements: Layout,
    ranks: Ranks,
    source: Generator,
) -> torch.Tensor:
    """Return 1 for every element of x that dropout keeps, and 0 with `probability`: uint8."""
    if torch.compiler.is_compiling():
        cuts = cuts_of(placements, ranks)
        return compiled_mask(source.traced_words(key, x.device), probability, shape, cuts)
    if source.mode == "fast":
        stream = source.stream(placements, ranks, x.device)
        mask = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        return mask.bernoulli_(1 - probability, generator=stream)
    rows, columns = sides(shape, placements, ranks, source.words(key))
    return mask_of(rows, columns, probability, x.device)


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
    """Zero each element of x with `probability`, and scale the others by 1 / (1 - probability).

    x: this rank's part. train: false returns x. key: of the op, from `op_key`. shape: of the whole.
    placements: of x on each mesh axis; every rank of a whole value or a pending sum draws alike.
    ranks: this rank's place. The numbers come from the generator in use.

    >>> from autoparallel.placement import Invariant
    >>> from autoparallel.runtime.groups import SingleGroup
    >>> from autoparallel.runtime.ranks import one_axis
    >>> options = {"shape": (1000,), "placements": (Invariant(),), "ranks": one_axis(SingleGroup())}
    >>> y = dropout(torch.ones(1000), 0.5, True, key=7, **options)
    >>> sorted(set(y.tolist())), bool(400 < (y > 0).sum() < 600)
    ([0.0, 2.0], True)
    """
    if not train or probability == 0:
        return x
    if probability == 1:
        return x * 0
    with torch.no_grad():
        mask = _dropout_mask(x, probability, key, shape, placements, ranks, generator())
    return (x * mask).mul_(1 / (1 - probability))
