"""Random numbers: the same under every plan, well mixed, and the same when a pass is repeated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from broad_cases import broad
from families import relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

import autoparallel
from autoparallel.errors import AutoParallelError
from autoparallel.mesh import Mesh
from autoparallel.parallel.simulate import Simulation
from autoparallel.placement import Invariant, Layout, Partial, Replicate, Shard, local_size
from autoparallel.runtime import counter_words, rng
from autoparallel.runtime.groups import LocalGroup
from autoparallel.runtime.ranks import Ranks, one_axis, single_rank, thread_ranks
from autoparallel.runtime.tensor_parts import join_layout
from autoparallel.train.models import GPT, Bert, BertConfig, GPTConfig

WORLD_SIZES = (2, 3, 4, 8)
CPU = torch.device("cpu")
WHOLE: Layout = (Invariant(),)
ALONE = single_rank(Mesh(tp=1))
WORD = 0xFFFFFFFF


def words(
    shape: tuple[int, ...],
    layout: Layout = WHOLE,
    ranks: Ranks = ALONE,
    key: int = 5,
    **source: int,
) -> torch.Tensor:
    """Uniform numbers of a part, as the integers below 2^24 that they are made of."""
    drawn = rng.uniform(shape, key, layout, ranks, CPU, rng.Generator(**source))
    return (drawn * (1 << 24)).long()


def mixed(bits: int) -> int:
    """Wellons' lowbias32, as published."""
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) & WORD
    bits = ((bits ^ (bits >> 15)) * 0x846CA68B) & WORD
    return bits ^ (bits >> 16)


def expected_word(size: tuple[int, int], place: tuple[int, int], key: int) -> int:
    """24 bits of one element of rows x columns, by numbers of unlimited size."""
    sides = []
    pairs = zip(size, place, (1, 0x9E3779B1), rng.Generator().words(key), strict=True)
    for extent, index, factor, word in pairs:
        bits = mixed(((index & WORD) * factor + word) & WORD)
        sides.append(mixed((bits + (index >> 32)) & WORD) if extent > 1 << 32 else bits)
    return (mixed(sides[0] ^ sides[1]) ^ 0x80000000) >> 8  # as signed words are ordered


def test_words_follow_the_definition() -> None:
    """Element by element, also where the whole has more than 2^32 elements on a side."""
    drawn = words((40, 30))
    for place in ((0, 0), (0, 1), (1, 0), (39, 29), (17, 5)):
        assert int(drawn[place]) == expected_word((40, 30), place, 5)
    parts, size = 1 << 30, (1 << 33) + 3
    for rank in (0, (1 << 29) + 7, parts * 8 // 9):
        group = LocalGroup(None, rank, parts)  # type: ignore[arg-type]
        drawn = words((size,), (Shard(0),), one_axis(group))
        assert len(drawn) == 9
        for index in range(len(drawn)):
            place = rank * 9 + index
            assert int(drawn[index]) == expected_word((1, size), (0, place), 5)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 16])
def test_pieces_do_not_show(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little is worked on at a time."""
    for shape in ((6, 5, 7), (97,), (33, 1), (1, 33), (0, 4), ()):
        expected = words(shape)
        assert expected.shape == shape
        with monkeypatch.context() as patch:
            patch.setattr(counter_words, "_CHUNK", chunk)
            assert torch.equal(words(shape), expected)


def placements_of(shape: tuple[int, ...]) -> Iterator[Shard]:
    for dim, size in enumerate(shape):
        for blocks, unit in itertools.product((1, 2, 3), (1, 2, 4)):
            if size % (blocks * unit) == 0:
                yield Shard(dim, blocks, unit)


@pytest.mark.parametrize("shape", [(24,), (7, 12), (12, 7), (4, 6, 10, 3), (2, 12, 5, 24)], ids=str)
def test_parts_are_those_of_the_whole(shape: tuple[int, ...]) -> None:
    """Every dim, in blocks and in runs, in equal parts, in unequal ones and in empty ones."""
    whole = words(shape)
    for world_size in WORLD_SIZES:
        every = thread_ranks(Mesh(tp=world_size))
        for shard in placements_of(shape):
            parts = [words(shape, (shard,), ranks) for ranks in every]
            assert torch.equal(join_layout(parts, (shard,), (world_size,)), whole), shard
        for placed in (Invariant(), Replicate(), Partial()):
            for ranks in every:
                assert torch.equal(words(shape, (placed,), ranks), whole)


@pytest.mark.parametrize("shape", [(24,), (7, 12), (4, 6, 10, 3)], ids=str)
def test_parts_on_several_axes_are_those_of_the_whole(shape: tuple[int, ...]) -> None:
    """Every pair of cuts: of different dims and of the same one, the outer cut first."""
    whole = words(shape)
    every = thread_ranks(Mesh(outer=2, inner=3))
    cuts = [*placements_of(shape), Invariant()]
    for layout in itertools.product(cuts, cuts):
        outer, inner = layout
        if isinstance(outer, Shard) and isinstance(inner, Shard) and outer.dim == inner.dim:
            local = (
                local_size(shape[outer.dim], outer, 2),
                local_size(shape[outer.dim], outer, 2, 1),
            )
            if any(size % (inner.blocks * inner.unit) for size in local):
                continue
        parts = [words(shape, layout, ranks) for ranks in every]
        assert torch.equal(join_layout(parts, layout, (2, 3)), whole), layout


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dropout_drops_and_scales(dtype: torch.dtype) -> None:
    """In every type the same elements, as many as asked for."""
    x = torch.full((64, 512), 3.0, dtype=dtype, requires_grad=True)
    options = {"key": 1, "shape": x.shape, "placements": (Invariant(),), "ranks": ALONE}
    for probability in (0.1, 0.5, 0.9):
        y = rng.dropout(x, probability, True, **options)
        kept = y != 0
        assert torch.equal(kept, words(x.shape, key=1) >= round(probability * (1 << 24)))
        scale = torch.tensor(1 / (1 - probability), dtype=dtype)
        assert torch.equal(y[kept], (x * scale)[kept])
        deviation = math.sqrt(probability * (1 - probability) / x.numel())
        assert abs(float(kept.double().mean()) - (1 - probability)) < 4 * deviation
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(grad, kept * scale)
    assert rng.dropout(x, 0.0, True, **options) is x
    assert rng.dropout(x, 0.5, False, **options) is x
    assert not rng.dropout(x, 1.0, True, **options).any()


def uniforms(size: int, **options: int) -> torch.Tensor:
    """(size, size) numbers of mean 0 and variance 1."""
    drawn = words((size, size), **options).double() / (1 << 24)
    return (drawn - 0.5) * math.sqrt(12)


def test_numbers_are_well_mixed() -> None:
    """Moments, each bit, and no correlation between neighbours, rows, steps, ops and seeds.

    Each figure is a mean of a million numbers of variance 1: 5 deviations are 0.005.
    """
    size = 1024
    base = uniforms(size)
    figures = {"mean": base.mean(), "variance": (base**2 - 1).mean() * math.sqrt(1.25)}
    for shift in (1, 2, 3, 16, 255, 512):
        figures[f"column + {shift}"] = (base * base.roll(shift, 1)).mean()
        figures[f"row + {shift}"] = (base * base.roll(shift, 0)).mean()
        figures[f"diagonal {shift}"] = (base * base.roll((shift, shift), (0, 1))).mean()
        turned = base.roll(shift, 0) * base.roll(shift, 1) * base.roll((shift, shift), (0, 1))
        figures[f"rectangle {shift}"] = (base * turned).mean()
    figures["transposed"] = (base * base.T).triu(1).mean() * math.sqrt(2)
    for name in ("seed", "step", "key"):
        for other in (1, 2, 6, 1 << 16, 1 << 31):
            figures[f"{name} {other}"] = (base * uniforms(size, **{name: other})).mean()
    bits = words((size, size))
    for bit in range(24):
        figures[f"bit {bit}"] = ((bits >> bit) & 1).double().mean() * 2 - 1
        changed = (bits ^ bits.roll(1, 1)) >> bit & 1
        figures[f"bit {bit} of neighbours"] = changed.double().mean() * 2 - 1
    for name, figure in figures.items():
        assert abs(float(figure)) < 0.005, (name, float(figure))
    counts = torch.bincount(bits.flatten() >> 14, minlength=1024).double()
    chi_squared = float(((counts - 1024) ** 2 / 1024).sum())
    assert abs(chi_squared - 1023) < 5 * math.sqrt(2 * 1023)


def test_rows_do_not_repeat() -> None:
    """Words of 2^17 rows are 2^17 words: random ones would have met."""
    drawn = words((1 << 17, 16))
    assert len(drawn.unique(dim=0)) == 1 << 17


def fast(layout: Layout, ranks: Ranks, step: int) -> list[torch.Tensor]:
    """Three draws of one pass, for a whole of 128 rows."""
    source = rng.Generator(3, step, "fast")
    found = []
    with rng.using(source):
        for key in (1, 2):
            x = torch.ones(64 if isinstance(layout[0], Shard) else 128, 64)
            options = {"key": key, "shape": (128, 64), "placements": layout, "ranks": ranks}
            found.append(rng.dropout(x, 0.25, True, **options))
        found.append(rng.uniform((128, 64), 3, layout, ranks, CPU, source).ge(0.25).float())
    return found


def test_fast_streams_belong_to_shards() -> None:
    """Whole values are drawn alike, shards by themselves; each draw and each step anew."""
    every = thread_ranks(Mesh(tp=2))
    whole = fast((Invariant(),), every[0], 0)
    for placement in (Invariant(), Replicate(), Partial()):
        for ranks in every:
            assert all(map(torch.equal, fast((placement,), ranks, 0), whole))
    drawn = [*whole, *fast((Invariant(),), every[0], 1)]
    split: Layout = (Shard(0),)
    for ranks, step in itertools.product(every, (0, 1)):
        assert all(map(torch.equal, fast(split, ranks, step), fast(split, ranks, step)))
        drawn += fast(split, ranks, step)
    masks = [tensor[:64] > 0 for tensor in drawn]
    for one, other in itertools.combinations(masks, 2):
        same = float((one == other).double().mean())
        assert abs(same - (0.75**2 + 0.25**2)) < 0.05


class Dropping(nn.Module):
    """A mask of its own in the result: y is zero where it was dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 64)
        self.second = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x, result: (b, 8)."""
        hidden = nn.functional.dropout(torch.tanh(self.first(x)), 0.5, self.training)
        return nn.functional.dropout(self.second(hidden), 0.5, self.training)


def dropping(mode: str = "counter") -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(2)
    x = torch.randn(16, 8)
    return autoparallel.autoparallelize(Dropping(), 1, example_inputs=x, rng=mode), x


@pytest.mark.parametrize("mode", ["counter", "fast"])
def test_seed_and_step_are_the_whole_state(mode: str) -> None:
    """Set, read and put back; calls in eval mode leave them alone."""
    module, x = dropping(mode)
    assert autoparallel.rng_state(module) == {"seed": 2, "step": 0}
    autoparallel.manual_seed(module, 11)
    first = [module(x) for _ in range(3)]
    assert not torch.equal(first[0], first[1])
    assert autoparallel.rng_state(module) == {"seed": 11, "step": 3}
    module.eval()(x)
    assert autoparallel.rng_state(module) == {"seed": 11, "step": 3}
    module.train()
    autoparallel.set_rng_state(module, {"seed": 11, "step": 1})
    assert torch.equal(module(x), first[1])
    other, _ = dropping(mode)
    autoparallel.set_rng_state(other, autoparallel.rng_state(module))
    assert torch.equal(other(x), first[2])
    autoparallel.manual_seed(module, 12)
    assert not torch.equal(module(x), first[0])
    assert list(module.state_dict()) == list(Dropping().state_dict())
    with pytest.raises(AutoParallelError, match="Linear has no random numbers of its own"):
        autoparallel.rng_state(module.first)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", ["counter", "fast"])
def test_a_recomputed_pass_draws_what_it_drew(mode: str, reentrant: bool) -> None:
    """Gradients with torch's activation checkpointing are those without, whatever the order."""
    module, x = dropping(mode)
    x.requires_grad_()

    found = []
    for repeat in (False, True):
        autoparallel.manual_seed(module, 4)
        made = [
            checkpoint(module, x, use_reentrant=reentrant) if repeat else module(x)
            for _ in range(3)
        ]
        for weight, y in enumerate(made):
            (y.sum() * (weight + 1)).backward()
        assert autoparallel.rng_state(module)["step"] == 3
        found.append([x.grad, *(parameter.grad for parameter in module.parameters())])
        x.grad = None
        module.zero_grad()
    assert all(map(torch.equal, *found))
    y = checkpoint(module, x, use_reentrant=reentrant, preserve_rng_state=False)
    with pytest.raises(AutoParallelError, match="preserve_rng_state=True"):
        y.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_compiled_passes_draw_what_eager_ones_draw() -> None:
    """Each step anew, and the steps are counted."""
    module, x = dropping()
    expected = [module(x) for _ in range(3)]
    autoparallel.manual_seed(module, 2)
    compiled = torch.compile(module, backend="eager")
    assert all(torch.equal(compiled(x), y) for y in expected)
    assert autoparallel.rng_state(module) == {"seed": 2, "step": 3}


def drawn_by(
    model: nn.Module, world_size: int, patch: pytest.MonkeyPatch, **options: Any
) -> tuple[Simulation, dict[int, torch.Tensor], int]:
    """A simulated pass, what each dropout kept, put together, and how many were split."""
    # Planned before: to count the memory, a plan's program is run on tensors without data.
    plan = autoparallel.make_plan(model, world_size, **options)
    parts: dict[int, dict[int, tuple[Layout, torch.Tensor]]] = {}
    original = rng._dropout_mask

    def recorded(x: Any, p: Any, key: Any, shape: Any, layout: Any, *rest: Any) -> torch.Tensor:
        made: torch.Tensor = original(x, p, key, shape, layout, *rest)
        parts.setdefault(key, {})[rest[0].rank] = (layout, made)
        return made

    patch.setattr(rng, "_dropout_mask", recorded)
    inputs = options["example_inputs"]
    result = autoparallel.simulate(model, world_size, example_inputs=inputs, plan=plan)
    patch.undo()
    masks: dict[int, torch.Tensor] = {}
    split = 0
    for key, by_rank in parts.items():
        layout = by_rank[0][0]
        rows = [by_rank[rank][1] for rank in range(world_size)]
        # Every rank of a pending sum draws alike, so it does not count as one here.
        drawn = tuple(p if isinstance(p, Shard) else Invariant() for p in layout)
        masks[key] = join_layout(rows, drawn, (world_size,))
        split += drawn != WHOLE
        assert drawn != WHOLE or all(torch.equal(row, rows[0]) for row in rows)
    return result, masks, split


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("kind", [GPT, *broad(Bert)])
def test_dropout_does_not_depend_on_the_plan(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same masks bit for bit, in attention too, at every world size and under every plan.

    10 heads and a sequence of 13 do not divide by the ranks.
    """
    config = GPTConfig if kind is GPT else BertConfig
    torch.manual_seed(1)
    sizes = {"layers": 1, "hidden": 40, "heads": 10, "vocabulary": 31, "positions": 13}
    model = kind(config(**sizes, dropout=0.3)).double().train()
    inputs = model.example_inputs(batch=4)
    one, expected, _ = drawn_by(model, 1, monkeypatch, example_inputs=inputs)
    whole = autoparallel.simulate(model.eval(), 1, example_inputs=inputs)
    assert relative_error(whole.output.loss, one.output.loss) > 1e-4
    model.train()
    pins = {path: Invariant() for path, p in model.named_parameters() if "attention" in path}
    plans: list[dict[str, Any]] = [
        {"sequence_parallel": False},
        {"sequence_parallel": True},
        {"data_parallel": True},
        {"pins": pins},
    ]
    cases = [(2, plans[0]), (4, plans[1]), *((8, options) for options in plans)]
    shards = set()
    for world_size, options in cases:
        own, masks, split = drawn_by(
            model, world_size, monkeypatch, example_inputs=inputs, **options
        )
        assert list(masks) == list(expected)
        assert all(torch.equal(masks[key], expected[key]) for key in masks)
        shards.add(split)
        assert relative_error(own.output.loss, one.output.loss) < 1e-12
        for path, gradient in one.gradients.items():
            assert relative_error(own.gradients[path], gradient, 1e-9) < 1e-9, path
    assert len(shards) > 1
    assert max(shards) > 1
