"""Compares the cost of a dropout mask with torch's own: per element, and as a ratio.

    python benchmarks/random_numbers.py [--threads 1] [--json out/random_numbers.json]

Each of the three ways is timed in turn, over and over, and the least time of each counts: other
work of the machine then weighs on all three alike. Only the forward pass is timed, in float32.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from autoparallel.mesh import Mesh
from autoparallel.placement import Invariant, Placement, Shard
from autoparallel.runtime import rng
from autoparallel.runtime.axis_parts import take_part
from autoparallel.runtime.ranks import thread_ranks

# (name, shape of the whole, placement, number of ranks)
CASES: tuple[tuple[str, tuple[int, ...], Placement, int], ...] = (
    ("small", (64, 64), Invariant(), 1),
    ("activations", (8, 512, 768), Invariant(), 1),
    ("activations, sequence split", (8, 512, 768), Shard(1), 2),
    ("attention", (4, 12, 256, 256), Invariant(), 1),
    ("attention, heads split", (4, 12, 256, 256), Shard(1), 2),
    ("fused, in blocks", (8, 512, 768), Shard(2, blocks=3), 2),
    ("one dim", (1 << 21,), Invariant(), 1),
)
PROBABILITY = 0.1


def least_seconds(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return, for each function, the least time of one call in seconds."""
    least = dict.fromkeys(functions, float("inf"))
    for round_ in range(rounds + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            # The first two rounds warm up caches and torch's lazy parts.
            if round_ > 1:
                least[name] = min(least[name], time.perf_counter() - start)
    return least


def measure(
    shape: tuple[int, ...], placement: Placement, world_size: int, rounds: int
) -> dict[str, float]:
    """Return the seconds of torch's dropout and of both modes of ours on rank 0's part."""
    ranks = thread_ranks(Mesh(tp=world_size))[0]
    x = torch.randn(shape)
    if isinstance(placement, Shard):
        x = take_part(x, placement, world_size, 0).contiguous()

    def ours(mode: str) -> Callable[[], Any]:
        """Return a function that draws dropout in one mode."""
        source = rng.Generator(mode=mode)

        def call() -> torch.Tensor:
            """Draw once, as one pass."""
            with rng.using(source):
                return rng.dropout(
                    x, PROBABILITY, True, key=1, shape=shape, placements=(placement,), ranks=ranks
                )

        return call

    functions = {
        "torch": lambda: torch.nn.functional.dropout(x, PROBABILITY, True),
        "counter": ours("counter"),
        "fast": ours("fast"),
    }
    return {"elements": x.numel(), **least_seconds(functions, rounds)}


def main() -> None:
    """Time every case, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ways = ("torch", "counter", "fast")
    print(f"{'ns per element':30}", *[f"{way:>9}" for way in ways], "  counter/torch  fast/torch")
    rows = []
    for name, shape, placement, world_size in CASES:
        row = measure(shape, placement, world_size, options.rounds)
        rows.append({"name": name, **row})
        each = [row[way] / row["elements"] * 1e9 for way in ways]
        ratios = [row[way] / row["torch"] for way in ways[1:]]
        print(
            f"{name:30}",
            *[f"{value:9.2f}" for value in each],
            f"{ratios[0]:15.2f}{ratios[1]:12.2f}",
            flush=True,
        )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"threads": options.threads, "cases": rows}, indent=2))


if __name__ == "__main__":
    main()
