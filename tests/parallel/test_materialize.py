"""Initial weights of a meta model are the same at every world size and under every plan."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import pytest
import torch
from broad_cases import share_of
from families import build, inputs_for
from processes import run_processes
from torch import nn

import autoparallel
from autoparallel.errors import AutoParallelError
from autoparallel.mesh import Mesh
from autoparallel.parallel import tiled_fills
from autoparallel.parallel.materialize import materialize
from autoparallel.parallel.module import parallel_module
from autoparallel.parallel.module_state import state_of
from autoparallel.placement import Invariant, Layout, Shard
from autoparallel.plan import Plan
from autoparallel.runtime.axis_parts import join_parts, take_part
from autoparallel.runtime.ranks import thread_ranks
from autoparallel.support.module_copy import on_meta

pytestmark = pytest.mark.usefixtures("one_trace")

SEED = 21


def never_again(*_: Any) -> Plan:
    raise AssertionError("planned again")


CASES: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "gpt": [(2, {"sequence_parallel": False}), (4, {"data_parallel": True}), (8, {})],
    "hf-gpt2": [(1, {}), (2, {})],
}


@pytest.mark.parametrize("name", share_of(CASES, 2))
def test_parts_of_a_planned_model_are_those_of_one_rank(name: str) -> None:
    """Fused weights in blocks, tied ones, unequal parts; joined from every rank."""
    sizes = {"hidden": 40, "heads": 10} if name == "gpt" else {}
    real = build(name, layers=1, **sizes).float()
    model, inputs = on_meta(real), inputs_for(name)
    expected = drawn(model)
    assert set(expected) == set(real.state_dict())
    cases = CASES[name]
    if name == "gpt":
        kept = {path: Invariant() for path, _ in real.named_parameters() if "attention" in path}
        cases = [*cases, (8, {"pins": kept})]
    split = set()
    for world_size, options in cases:
        plan = autoparallel.make_plan(model, world_size, example_inputs=inputs, **options)
        parts = []
        for ranks in thread_ranks(plan.mesh):
            torch.manual_seed(SEED)
            made = parallel_module(model, plan, ranks, None, never_again, 0)
            parts.append(made.state_dict())
        layouts = state_of(made).layouts
        assert set(parts[0]) == set(expected)
        for path, whole in expected.items():
            (placement,) = layouts.get(path, (Invariant(),))
            own = [part[path] for part in parts]
            if isinstance(placement, Shard):
                split.add((placement.blocks > 1, len({tuple(part.shape) for part in own}) > 1))
                own = [join_parts(own, placement)]
            assert all(torch.equal(part, whole) for part in own), (world_size, options, path)
    # Blocks in unequal parts are what no DTensor can say; the user has plain parts there.
    assert name != "gpt" or (False, True) in split
    assert (True, False) in split
    assert (True, True) not in split


def drawn(
    model: nn.Module,
    layouts: Mapping[str, Layout] = MappingProxyType({}),
    size: int = 1,
    at: int = 0,
) -> dict[str, torch.Tensor]:
    """The parts of rank `at` of `size`, always from the same seed."""
    torch.manual_seed(SEED)
    return materialize(model, layouts, thread_ranks(Mesh(tp=size))[at], torch.device("cpu"))


class Filled(nn.Module):
    """A Filled module has one weight that a function fills, in rows that need not divide."""

    def __init__(self, shape: tuple[int, ...], fill: Callable[[nn.Parameter], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.fill = fill

    def reset_parameters(self) -> None:
        """Fill the weight."""
        with torch.no_grad():
            self.fill(self.weight)


def with_row_of_zeros(weight: nn.Parameter) -> None:
    nn.init.normal_(weight)
    weight[3].zero_()


def in_boxes(weight: nn.Parameter) -> None:
    """As fused projections are filled, one after the other, and one of them transposed."""
    nn.init.xavier_uniform_(weight[:150])
    nn.init.trunc_normal_(weight[150:].t(), std=0.3)
    weight[:, 7:90].mul_(2).add_(1)


def by_new_memory(weight: nn.Parameter) -> None:
    weight.data = torch.nn.init.normal_(torch.empty_like(weight), 2.0).abs()


def by_python_numbers(weight: nn.Parameter) -> None:
    row = torch.tensor([float(k) for k in range(200)], device=weight.device)
    weight.copy_(row.mul(0.5).expand(300, 200))


def exponents(weight: nn.Parameter) -> None:
    weight.copy_(torch.log(torch.arange(1, 201, device=weight.device)).expand(300, 200))


def shuffled(weight: nn.Parameter) -> None:
    weight.copy_(torch.randperm(60000, device=weight.device).view(300, 200))


FILLS: dict[str, Callable[[nn.Parameter], Any]] = {
    "normal": partial(nn.init.normal_, mean=1.0, std=0.02),
    "uniform": nn.init.kaiming_uniform_,
    "truncated": partial(nn.init.trunc_normal_, std=2.0, a=-1.0, b=3.0),
    "constant": partial(nn.init.constant_, val=0.5),
    "drawn twice": lambda weight: nn.init.normal_(nn.init.ones_(weight), std=3.0),
    "exponential": lambda weight: weight.exponential_(2.0).clamp_(max=4.0),
    "a row of zeros": with_row_of_zeros,
    "boxes": in_boxes,
    "orthogonal": nn.init.orthogonal_,
    "sparse": partial(nn.init.sparse_, sparsity=0.3),
    "new memory": by_new_memory,
    "Python's numbers": by_python_numbers,
    "exponents": exponents,
    "shuffled": lambda weight: weight.copy_(
        torch.randperm(60000, device=weight.device).view(300, 200)
    ),
}


@pytest.mark.parametrize("name", FILLS)
def test_a_part_is_cut_of_what_one_rank_draws(name: str) -> None:
    """Under every layout the same numbers, distributed as torch's own."""
    with torch.device("meta"):
        model = Filled((300, 200), FILLS[name])
    whole = drawn(model)["weight"]
    for shard in (Shard(0), Shard(1), Shard(0, blocks=3), Shard(1, blocks=2, unit=5)):
        for at in range(4):
            part = drawn(model, {"weight": (shard,)}, 4, at)["weight"]
            assert torch.equal(part, take_part(whole, shard, 4, at)), (shard, at)
    torch.manual_seed(0)
    torchs = Filled((300, 200), FILLS[name])
    torchs.reset_parameters()
    ours, theirs = whole.double(), torchs.weight.detach().double()
    # 60000 numbers: means and deviations of two samples differ by five errors at most.
    assert abs(ours.mean() - theirs.mean()) <= 5 * theirs.std() * (2 / 60000) ** 0.5
    assert torch.allclose(ours.std(), theirs.std(), rtol=0.03)
    assert torch.allclose(ours.mean(0), theirs.mean(0), atol=float(theirs.std()) * 0.45)
    fractions = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    spread = float(theirs.quantile(0.95) - theirs.quantile(0.05))
    assert torch.allclose(ours.quantile(fractions), theirs.quantile(fractions), atol=0.03 * spread)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_two_tiles_are_alike(dtype: torch.dtype) -> None:
    """Neither of one weight nor of two, though they are filled by equal calls."""
    with torch.device("meta"):
        model = nn.ModuleList(nn.Linear(512, 512, dtype=dtype) for _ in range(2))
    weights = drawn(model)
    tiles = [
        tile
        for at in range(2)
        for rows in weights[f"{at}.weight"].split(128)
        for tile in rows.split(128, dim=1)
    ]
    assert len(tiles) == 32
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(tiles, 2))


def test_a_rank_draws_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 1.2 of the n-th part of what one rank draws, split by rows or by columns."""
    tiles: list[int] = []
    seed = tiled_fills.tile_seed
    monkeypatch.setattr(
        tiled_fills, "tile_seed", lambda first, at: tiles.append(at) or seed(first, at)
    )
    with torch.device("meta"):
        model = nn.Linear(4096, 3072, bias=False)
    drawn(model)
    whole = len(tiles)
    for shard in (Shard(0), Shard(1)):
        for size, at in ((2, 0), (4, 3), (8, 5)):
            tiles.clear()
            drawn(model, {"weight": (shard,)}, size, at)
            assert 0 < len(tiles) <= 1.2 * whole / size, (shard, size)


class Deep(nn.Module):
    """A Deep model fills a grandchild's weight itself, has a buffer with data, and ties."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Sequential(nn.Linear(6, 6)), nn.LSTM(6, 3))
        self.head = nn.Linear(6, 6, bias=False)
        self.head.weight = self.inner[0][0].weight
        self.register_buffer("steps", torch.arange(4.0, device="cpu"))
        self.register_buffer("known", torch.ones(3, device="cpu"))

    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            self.inner[0][0].weight.data.fill_(3.0)
            self.steps[1:].mul_(10)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()


def test_an_initializer_may_fill_what_lies_deeper() -> None:
    with torch.device("meta"):
        model = Deep()
    parts = drawn(model)
    assert torch.equal(parts["inner.0.0.weight"], torch.full((6, 6), 3.0))
    assert parts["head.weight"] is parts["inner.0.0.weight"]
    assert parts["steps"].tolist() == [0.0, 10.0, 20.0, 30.0]
    # The user's own tensors stay as they are; what no initializer touches needs no copy.
    assert model.steps.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert "known" not in parts
    assert float(parts["inner.1.weight_ih_l0"].std()) > 0.1


def test_attention_of_torch_fills_itself() -> None:
    """Its method has a name of its own, `_reset_parameters`."""
    with torch.device("meta"):
        model = nn.MultiheadAttention(16, 4)
    parts = drawn(model)
    bound = (6 / (16 + 48)) ** 0.5
    assert 0.9 * bound < float(parts["in_proj_weight"].abs().max()) <= bound
    assert not parts["in_proj_bias"].any()


def reads_values(weight: nn.Parameter) -> None:
    nn.init.normal_(weight)
    if float(weight.mean()) > -10:
        weight.add_(5.0)


def own_generator(weight: nn.Parameter) -> None:
    nn.init.normal_(weight, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("fill", [reads_values, own_generator])
def test_an_initializer_that_needs_torchs_numbers_has_them(
    fill: Callable[[nn.Parameter], Any],
) -> None:
    """And a warning says that every rank draws all of them."""
    with torch.device("meta"):
        model = Filled((30, 20), fill)
    torchs = Filled((30, 20), fill)
    torch.manual_seed(SEED)
    torchs.reset_parameters()
    with pytest.warns(UserWarning, match="every rank draws the whole"):
        part = drawn(model, {"weight": (Shard(1),)}, 3, 1)["weight"]
    assert torch.equal(part, take_part(torchs.weight.detach(), Shard(1), 3, 1))


@pytest.mark.parametrize(
    "fill", [lambda weight: None, lambda weight: weight[:5].zero_(), lambda weight: weight.mul_(2)]
)
def test_what_nothing_fills_is_told(fill: Callable[[nn.Parameter], Any]) -> None:
    """Not at all, not all of it, or by what reads it; on all ranks, which would wait for others."""
    with torch.device("meta"):
        model = Filled((30, 20), fill)
    for at in range(3):
        with pytest.raises(AutoParallelError, match="cannot be initialized") as error:
            drawn(model, {"weight": (Shard(0),)}, 3, at)
        assert error.value.where == "weight"


class Placed(nn.Module):
    """A weight, and numbers of its rows, which the meta device has lost."""

    def __init__(self, dtype: torch.dtype, filled: int, reads: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 2))
        self.register_buffer("places", torch.arange(5).to(dtype))
        self.filled, self.reads = filled, reads

    def reset_parameters(self) -> None:
        """Fill the weight, and some places."""
        nn.init.zeros_(self.weight)
        if self.filled:
            self.places[: self.filled].copy_(torch.arange(self.filled))
        if self.reads:
            assert not self.weight.any().item()


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.uint8, torch.complex64], ids=str)
@pytest.mark.parametrize(("filled", "reads"), [(0, False), (2, False), (0, True)])
def test_lost_numbers_without_nan_are_told(dtype: torch.dtype, filled: int, reads: bool) -> None:
    """Memory as it happens to be differs between ranks, and is nothing of the model's."""
    with torch.device("meta"):
        model, whole = Placed(dtype, filled, reads), Placed(dtype, 5, reads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that every rank draws the whole
        with pytest.raises(AutoParallelError, match="cannot be initialized") as error:
            drawn(model)
        assert torch.equal(drawn(whole)["places"], torch.arange(5).to(dtype))
    assert error.value.where == "places"


def start_apart(rank: int) -> list[str]:
    """Ranks that were seeded differently, with real weights and without."""
    found = []
    for meta in (False, True):
        torch.manual_seed(rank)
        with torch.device("meta" if meta else "cpu"):
            model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8, bias=False))
        try:
            autoparallel.autoparallelize(model, 2, example_inputs=torch.ones(4, 8))
        except AutoParallelError as error:
            found.append(error.what)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8, bias=False))
    try:
        autoparallel.autoparallelize(
            model, 2, example_inputs=torch.ones(4, 8), sequence_parallel=rank == 0
        )
    except AutoParallelError as error:
        found.append(error.what)
    return found


def test_ranks_that_start_apart_are_told() -> None:
    """Before anything is computed, on every rank, and what it is about: weights, seeds, plans."""
    for found in run_processes(start_apart, 2):
        assert found == [
            "the ranks start from different models: 0.weight, 0.bias, 2.weight",
            "the ranks start from different models: torch's random state",
            "the ranks have made different plans",
        ]
