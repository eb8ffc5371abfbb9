"""Published steps with stages against plans of the product, on their own meshes."""

from __future__ import annotations

import pytest

from benchmarks import published_choices, published_pipelines


@pytest.mark.broad
@pytest.mark.parametrize(("table", "count"), [("pipelined", 6), ("interleaved", 6), ("llama", 2)])
def test_published_pipelines(table: str, count: int) -> None:
    """Megatron-LM of up to 1 T parameters on 3072 A100, and Llama 3 405B on 16384 H100: within
    10 %; fitted to nothing.
    """
    found = list(published_pipelines.TABLES[table]())
    assert len(found) == count
    for row in found:
        assert abs(row.error) < 0.1, str(row)


@pytest.mark.broad
@pytest.mark.parametrize("row", range(16))
def test_own_choice_is_as_quick(row: int) -> None:
    """All that the planner chooses for each published row, within a device's memory, beside the
    published layout.
    """
    (choice,) = published_choices.choices(row)
    assert choice.ratio <= 1.001, str(choice)
    assert choice.own.pipeline is None or max(choice.own.pipeline.memory) <= published_choices.LIMIT


@pytest.mark.broad
def test_own_splits_are_as_quick() -> None:
    """Splits and micro-batches that the planner chooses, beside the published ones."""
    (published,) = published_pipelines.pipelined(4)
    (own,) = published_pipelines.pipelined(4, own=True)
    assert own.plan.step <= published.plan.step * 1.001
