"""Measures the discovery of the rule of an op that has none: milliseconds, and the rule found.

    python benchmarks/discovery.py

It prints wall-clock and processor time of one discovery each, without the cache on disk. Most are
torch's own ops, taken as if nobody had written their rules.
"""

import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

import custom_ops
from calls import Call, call, ints, x

from autoparallel.discovery.discover import discover

SAMPLES = [
    call("gelu.default", x(4, 5)),
    call("add.Tensor", x(4, 5), x(5)),
    call("linear.default", x(4, 5, 6), x(8, 6)),
    call("softmax.int", x(4, 5, 6), -1),
    call("layer_norm.default", x(4, 5, 6), (6,), x(6), x(6)),
    call("embedding.default", x(9, 6), ints(4, 5, high=9)),
    call("reshape.default", x(5, 24), (5, 4, 6)),
    call("chunk.default", x(5, 12), 3, 1),
    call("logsumexp.default", x(4, 5, 6), (1,)),
    call("mse_loss.default", x(4, 5), x(4, 5)),
    call("conv2d.default", x(5, 6, 7, 8), x(8, 6, 3, 2)),
    Call("probed.gated.default", (x(4, 5, 12),)),
    Call("probed.fused_heads.default", (x(4, 5, 576), 12)),
    Call("probed.scan.default", (x(4, 5, 6), x(6))),
]


def main() -> None:
    """Print one row per op."""
    # Importing the module has registered the ops; using it keeps the import from looking idle.
    assert custom_ops.GATED is not None
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # The first discovery of a process also pays for torch's lazy start-up.
    discover(SAMPLES[0].example().call)
    print("wall ms  cpu ms  op")
    for sample in SAMPLES:
        example = sample.example()
        wall, processor = time.perf_counter(), time.process_time()
        discovered = discover(example.call)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        rule = discovered.rule(example.call)
        assert rule is not None
        print(f"{wall * 1e3:7.0f} {processor * 1e3:7.0f}  {sample}: {rule.discovered}")


if __name__ == "__main__":
    main()
