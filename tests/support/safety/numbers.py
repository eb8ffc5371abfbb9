"""Rows of numbers: ends of ranges, low precision, and random ones."""

from __future__ import annotations

import math
import random
from collections import Counter
from functools import partial
from typing import Any

import torch
from edited_plans import Mixed
from torch import nn

import autoparallel
from autoparallel.mesh import Mesh
from autoparallel.parallel.simulate import Simulation
from autoparallel.placement import Invariant
from autoparallel.runtime import rng
from autoparallel.runtime.ranks import single_rank

from .registry import note, row

MESHES = (Mesh(tp=2), Mesh(tp=3), Mesh(dp=2, tp=2), Mesh(cp=2, dp=2, tp=2))
_CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def _tokens(draw: random.Random, *shape: int) -> torch.Tensor:
    return torch.randint(10, shape, generator=torch.Generator().manual_seed(draw.getrandbits(32)))


def _run(model: nn.Module, inputs: Any, mesh: Mesh) -> Simulation:
    return autoparallel.simulate(model, mesh=mesh, example_inputs=inputs, product_weight=1e6)


def _tried(model: nn.Module, inputs: Any, mesh: Mesh, wanted: Simulation) -> str:
    """Return whether a run on a mesh has the values and gradients of the one that is wanted."""
    made = _run(model, inputs, mesh)
    pairs = list(zip(made.output, wanted.output, strict=True))
    pairs += [(made.gradients[path], grad) for path, grad in wanted.gradients.items()]
    close = all(torch.allclose(a, b, equal_nan=True, **_CLOSE) for a, b in pairs)
    return "right" if close and made.apart == 0 else "wrong"


@row("an empty batch, empty sequences, or both", least=3, share=100)
def empty(draw: random.Random, count: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    model = Mixed().double().eval()
    for shape in ((0, 4), (2, 0), (0, 0)):
        tokens = torch.zeros(shape, dtype=torch.long)
        wanted = autoparallel.simulate(model, 1, example_inputs=tokens)
        for mesh in MESHES[: max(1, count // 3)]:
            note(counts, partial(_tried, model, tokens, mesh, wanted))
    return counts


@row("fewer rows than ranks, with dropout", share=200, least=2)
def few_rows(draw: random.Random, count: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    model = Mixed().double()
    for shape in ((1, 4), (2, 3), (3, 1), (1, 1))[:count]:
        tokens = _tokens(draw, *shape)
        wanted = autoparallel.simulate(model, 1, example_inputs=tokens)
        for mesh in MESHES[:count]:
            note(counts, partial(_tried, model, tokens, mesh, wanted))
    return counts


class _Floats(nn.Module):
    """A model of floating-point inputs, which a NaN or an infinity goes through."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x + self.down(torch.softmax(self.up(x), -1).clamp(1e-3, 0.5))
        return y.square().mean(), y


@row("inputs with NaN, infinities, denormal and huge numbers", share=100, least=2)
def not_finite(draw: random.Random, count: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    model = _Floats().double()
    numbers = (math.nan, math.inf, -math.inf, 5e-324, 1e200, -0.0)
    for number in numbers[:count]:
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).double()
        x[draw.randrange(6), draw.randrange(8)] = number
        wanted = autoparallel.simulate(model, 1, example_inputs=x)
        for mesh in MESHES[:2]:
            note(counts, partial(_tried, model, x, mesh, wanted))
    return counts


@row("gradients in bfloat16 on 2, 3 and 4 ranks, against those in float64", share=100, least=8)
def low_precision(draw: random.Random, count: int) -> Counter[str]:
    """Over several batches the error is at most a quarter above that of the unsplit model."""
    away = dict.fromkeys(map(str, (Mesh(tp=1), *MESHES[:3])), 0.0)
    low = _Floats().bfloat16()
    for _ in range(count):
        x = torch.randn(24, 8, generator=torch.Generator().manual_seed(draw.getrandbits(32)))
        exact = autoparallel.simulate(_Floats().double(), 1, example_inputs=x.double())
        for mesh in (Mesh(tp=1), *MESHES[:3]):
            made = _run(low, x.bfloat16(), mesh).gradients
            for path, grad in exact.gradients.items():
                away[str(mesh)] += float((made[path].double() - grad).square().sum())
    bound = 1.25 * math.sqrt(away.pop(str(Mesh(tp=1))))
    counts: Counter[str] = Counter()
    for mesh, squared in away.items():
        error = math.sqrt(squared)
        counts[
            "at most a quarter worse than unsplit" if error <= bound else f"{mesh}: {error}"
        ] += count
    return counts


@row("draws of dropout, and how many are kept", share=1)
def dropout_share(draw: random.Random, count: int) -> Counter[str]:
    """5000 at a time: 1e7 where other things are tried 2000 times."""
    counts: Counter[str] = Counter()
    ranks = single_rank(Mesh(tp=1))
    for number, chance in enumerate((0.1, 0.5, 0.9, 1e-3)):
        x = torch.ones(count, 1250)
        options = {"key": number + 1, "shape": x.shape, "placements": (Invariant(),)}
        kept = rng.dropout(x, chance, True, ranks=ranks, **options) != 0
        sigma = math.sqrt(chance * (1 - chance) / x.numel())
        away = abs(float(kept.double().mean()) - (1 - chance))
        counts["within 5 sigma" if away < 5 * sigma else f"{away / sigma:.1f} sigma"] += x.numel()
    return counts


@row("dropout that keeps everything or next to nothing", share=200, least=1)
def dropout_ends(draw: random.Random, count: int) -> Counter[str]:
    counts: Counter[str] = Counter()

    def tried(chance: float, kept: int, mesh: Mesh) -> str:
        model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(chance)).double()
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).double()
        made = autoparallel.simulate(model, mesh=mesh, example_inputs=x, backward=lambda y: y.sum())
        return "right" if int((made.output != 0).sum()) == kept else "wrong"

    ends = ((1 - 1e-10, 0), (1 - 2**-34, 0), (1.0, 0), (1e-10, 512), (0.0, 512))
    for chance, kept in ends:
        for mesh in MESHES[: min(count, 3)]:
            note(counts, partial(tried, chance, kept, mesh))
    return counts


@row("the masks of dropout on several meshes, against those of one rank", share=200, least=1)
def dropout_masks(draw: random.Random, count: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    model, tokens = Mixed().double(), _tokens(draw, 5, 6)
    wanted = autoparallel.simulate(model, 1, example_inputs=tokens)
    for mesh in MESHES[:count]:
        note(counts, partial(_tried, model, tokens, mesh, wanted))
    return counts


class _Seeds(nn.Module):
    """Its forward draws by a generator or a seed of its own."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.own = nn.Linear(8, 24), nn.Linear(24, 8), own

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.own:
            generator = torch.Generator().manual_seed(3)
            mask = torch.bernoulli(torch.full_like(x, 0.5), generator=generator)
        else:
            torch.manual_seed(4)
            mask = torch.rand_like(x)
        return self.down(self.up(x * mask).tanh()).square().mean()


@row("a forward that draws by a generator, or a seed, of its own")
def own_seeds(draw: random.Random, count: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).double()
    before = torch.get_rng_state()

    def tried(own: bool) -> str:
        model = _Seeds(own).double()
        wanted = model(x)
        plan = autoparallel.make_plan(model, 2, example_inputs=x)
        made = autoparallel.simulate(model, plan=plan, example_inputs=x)
        if not torch.allclose(made.output, wanted, **_CLOSE):
            return "wrong"
        return "runs as Python" if plan.breaks else "right"

    for own in (True, False):
        note(counts, partial(tried, own))
    torch.set_rng_state(before)
    return counts
