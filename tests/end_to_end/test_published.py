"""The cost model against print: the tables of benchmarks/published.py."""

from __future__ import annotations

from itertools import islice

import pytest
from broad_cases import broad

from benchmarks import published
from benchmarks.published import Line

# Printed 12 points below tensor parallelism alone, where the rows beside it lose 3 or 4 and its
# gradients take 0.1 s of a step of 2.3 s: nothing in the model explains it, and nothing is fitted.
OUTLIER = "2.5 B on 2, 64 replicas"


def lines(table: str) -> list[Line]:
    return list(published.TABLES[table]())


@pytest.mark.parametrize("count", [2, *broad(8)])
def test_iteration_times(count: int) -> None:
    """Eight steps of Megatron-LM on V100 and A100, tensor parallel, within 5%."""
    found = list(islice(published.TABLES["iteration_times"](), count))
    assert len(found) == count
    for line in found:
        assert abs(line.error) < 0.05, str(line)


@pytest.mark.broad
def test_weak_scaling() -> None:
    """Efficiencies of four models within 4 points, on one replica and on 64."""
    baseline, *found = lines("weak_scaling")
    assert abs(baseline.error) < 0.05, str(baseline)
    assert len(found) == 8
    for line in found:
        assert abs(line.error) < (0.12 if line.what == OUTLIER else 0.04), str(line)


def test_all_reduces() -> None:
    """By size, from 32 KiB to 1 GiB: within 17%, and from 1 MiB on within 8%."""
    for line in lines("all_reduces"):
        assert abs(line.error) < (0.17 if "0.03" in line.what else 0.08), str(line)


def test_activation_bytes() -> None:
    """What a layer keeps, as the paper's five formulas: within 3%."""
    found = lines("activation_bytes")
    assert len(found) == 5
    for line in found:
        assert abs(line.error) < 0.03, str(line)


@pytest.mark.parametrize(("parameters", "devices"), [(7.5e9, 4), (7.5e9, 256), (1e12, 1024)])
def test_zero(parameters: float, devices: int) -> None:
    """Exactly as the paper's formulas: 16 bytes per parameter, of which a stage splits more."""
    formulas = (4 + 12 / devices, 2 + 14 / devices, 16 / devices)
    expected = tuple(parameters * each for each in formulas)
    assert published.zero_bytes(parameters, devices) == expected


def test_zero_as_printed() -> None:
    """The table's 18 figures, as far as it prints digits."""
    found = lines("zero")
    assert len(found) == 18
    for line in found:
        assert abs(line.error) < 0.005, str(line)


def test_fused_attention() -> None:
    """Both kernels, forward and backward, heads of 64 and 128, from 1024 tokens on: within 21%, and
    by less on the mean. Shorter sequences are up to 39% too quick.
    """
    found = lines("attention")
    assert len(found) == 60
    long = [line for line in found if not line.what.endswith(" 512")]
    assert all(abs(line.error) < 0.21 for line in long), max(long, key=lambda line: abs(line.error))
    assert sum(abs(line.error) for line in long) / len(long) < 0.09


@pytest.mark.broad
@pytest.mark.parametrize(
    ("table", "count"), [("pipelined", 10), ("selective", 8), ("layers", 10), ("sharded", 6)]
)
def test_what_was_kept_aside(table: str, count: int) -> None:
    """Models of up to a trillion parameters, passes of one layer, and fully sharded ones on A100
    and H100, on which nothing was fitted: within 12%.
    """
    found = lines(table)
    assert len(found) == count
    assert published.ROWS[table]["kept aside"]
    for line in found:
        assert abs(line.error) < 0.12, str(line)
