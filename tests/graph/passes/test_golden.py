"""Each pass on a small graph: the text before and after, and equal results when both are run.

`<pass>.txt` beside this file has a first line that says what is shown, the hints of symbols, the
graph before (written by hand) and the graph after. To write the graphs after anew:

    PYTHONPATH=tests/support python tests/graph/passes/test_golden.py

Read the difference before committing it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from graph_text import Run, graph_of_text, run_graph

from autoparallel.graph.graph import Graph
from autoparallel.graph.passes.run_passes import PASSES

FOLDER = Path(__file__).parent
BEFORE, AFTER = "\n-- before\n", "\n-- after\n"


@dataclass(frozen=True)
class Golden:
    """head: the lines before the graphs. sizes: hints of the symbols that it names."""

    head: str
    sizes: dict[str, int]
    before: str
    after: str

    @staticmethod
    def read(path: Path) -> Golden:
        head, _, rest = path.read_text().partition(BEFORE)
        before, _, after = rest.partition(AFTER)
        line = next((row for row in head.splitlines() if row.startswith("sizes: ")), "sizes: ")
        pairs = (pair.split("=") for pair in line.removeprefix("sizes: ").split(", ") if pair)
        sizes = {name: int(size) for name, size in pairs}
        return Golden(head, sizes, before.strip(), after.strip())


def compare(one: Run, two: Run) -> None:
    """Outputs, buffers and gradients are equal up to the rounding of their type."""
    assert len(one.outputs) == len(two.outputs)
    assert one.buffers.keys() == two.buffers.keys()
    pairs = [*zip(one.outputs, two.outputs, strict=True)]
    pairs += [(one.buffers[path], two.buffers[path]) for path in one.buffers]
    for name, gradient in one.gradients.items():  # a parameter that nobody reads may have gone
        pairs.append((gradient, two.gradients.get(name, torch.zeros_like(gradient))))
    assert one.gradients.keys() >= two.gradients.keys()
    for first, second in pairs:
        floating = first.dtype.is_floating_point
        tolerance = 8 * torch.finfo(first.dtype).eps if floating else 0.0
        torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)


NAMES = tuple(dict.fromkeys(run.__name__ for run in PASSES))
BY_NAME: dict[str, Callable[[Graph], Graph]] = {run.__name__: run for run in PASSES}


@pytest.mark.parametrize("name", NAMES)
def test_pass(name: str) -> None:
    """The text after is the golden one, a second run changes nothing, and results are equal."""
    golden, run = Golden.read(FOLDER / f"{name}.txt"), BY_NAME[name]
    graph = graph_of_text(golden.before, golden.sizes)
    assert str(graph) == golden.before
    after = run(graph).verify()
    assert str(after) == golden.after
    assert golden.after != golden.before
    assert str(run(after).verify()) == golden.after
    compare(run_graph(graph), run_graph(after))


def test_every_file_is_of_a_pass() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(NAMES)


def main() -> None:
    """Write every graph after anew."""
    for name, run in BY_NAME.items():
        path = FOLDER / f"{name}.txt"
        golden = Golden.read(path)
        after = run(graph_of_text(golden.before, golden.sizes)).verify()
        path.write_text(f"{golden.head}{BEFORE}{golden.before}\n{AFTER}{after}\n")


if __name__ == "__main__":
    main()
