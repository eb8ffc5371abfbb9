"""Calibration finds planted figures again, and its file is hardware like any other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from broad_cases import broad

from autoparallel import make_plan
from autoparallel.analysis.timeline import timeline
from autoparallel.cli import main
from autoparallel.cost.calibrate import _Bench
from autoparallel.cost.collective_times import collective_seconds
from autoparallel.cost.fit import Call, Move, Product, Samples, fit
from autoparallel.cost.hardware import (
    Algorithm,
    Hardware,
    Link,
    Matmul,
    Regime,
    find_hardware,
    read_hardware,
    write_hardware,
)
from autoparallel.cost.matmul import product_seconds
from autoparallel.cost.memory_moves import moved_seconds
from autoparallel.cost.timed_runs import Effort
from autoparallel.placement import Collective
from autoparallel.train.models import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures("one_trace")

ROOT = Path(__file__).parents[2]
SHAPES = [(1, n, n, n) for n in (256, 512, 1024, 2048, 4096)] + [
    shape
    for n in (64, 128, 256, 512)
    for shape in ((1, 4096, n, 4096), (1, 4096, 4096, n), (1, n, 4096, 4096), (32, n, n, 64))
]


def noise(count: int) -> np.ndarray:
    """Factors of a few per cent, and one measurement in twelve that took thrice as long."""
    factors = 1 + 0.03 * np.sin(7.0 * np.arange(1, count + 1))
    factors[5::12] *= 3
    return factors


def product_samples(hardware: Hardware, itemsize: int) -> list[Product]:
    """What products take on it."""
    batch, rows, columns, depth = np.array(SHAPES, dtype=float).T
    arithmetic = product_seconds(batch, rows, columns, depth, itemsize, hardware)
    nbytes = np.array([float(Product(*shape, itemsize, 0.0).nbytes) for shape in SHAPES])
    seconds = np.maximum(arithmetic, moved_seconds(nbytes, hardware)) + hardware.launch_seconds
    return [
        Product(*shape, itemsize, float(one))
        for shape, one in zip(SHAPES, seconds * noise(len(SHAPES)), strict=True)
    ]


def move_samples(hardware: Hardware) -> list[Move]:
    sizes = [float(2**power) for power in range(16, 29, 2)]
    seconds = moved_seconds(np.array(sizes), hardware) + hardware.launch_seconds
    return [Move(int(size), float(one)) for size, one in zip(sizes, seconds, strict=True)]


def call_samples(link: Link, sizes: tuple[int, ...], across: bool) -> list[Call]:
    keys = [
        (kind, 2**power, size) for kind in Collective for size in sizes for power in range(8, 29, 2)
    ]
    factors = noise(len(keys))
    return [
        Call(kind, nbytes, size, across, collective_seconds(kind, nbytes, link, size) * factor)
        for (kind, nbytes, size), factor in zip(keys, factors, strict=True)
    ]


def test_planted_figures_of_a_gpu_are_found() -> None:
    """Efficiency, fill and reload of products, bandwidth by size, launches, and both links."""
    known = find_hardware("dgx-a100")
    planted = replace(
        known,
        matmul=replace(known.matmul, efficiency=0.7, fill=128.0, reload=120.0),
        memory_by_size=((2**20, 4e12), (2**24, 3e12), (2**28, 1.6e12)),
        launch_seconds=4e-6,
        inside=Link.ring(200e9, 5e-6, 9e-6),
        network=Link.ring(20e9, 15e-6, 9e-6),
    )
    samples = Samples(
        tuple(product_samples(planted, 2)),
        tuple(move_samples(planted)),
        (
            *call_samples(planted.inside, (2, 4, 8), across=False),
            *call_samples(planted.network, (2, 4), across=True),
        ),
        launch_seconds=4e-6,
        function_seconds=1e-12,
        spread=0.01,
    )
    found = fit(samples, known, Matmul(known.matmul.processors, known.matmul.tiles)).hardware
    assert (found.matmul.fill, found.matmul.reload) == (128.0, 120.0)
    assert found.matmul.efficiency == pytest.approx(0.7, rel=0.05)
    assert found.peak(2) == known.peak(2)
    assert found.sustained_bytes_per_second == pytest.approx(1.6e12, rel=0.01)
    assert dict(found.memory_by_size)[2**24] == pytest.approx(3e12, rel=0.01)
    assert (found.launch_seconds, found.spread) == (4e-6, 0.01)
    for link, truth in ((found.inside, planted.inside), (found.network, planted.network)):
        for kind in Collective:
            for nbytes in (2**10, 2**17, 2**24, 2**30):
                predicted = collective_seconds(kind, nbytes, link, 8)
                true = collective_seconds(kind, nbytes, truth, 8)
                assert predicted == pytest.approx(true, rel=0.1), (kind, nbytes)


def test_the_spread_of_equal_work_is_found() -> None:
    """A standard deviation, from the mean difference of two of the times."""
    bench = _Bench(Effort.quick(False), time.perf_counter)
    bench.relative = (1 + 0.05 * np.random.default_rng(0).standard_normal(4000)).tolist()
    assert bench.spread() == pytest.approx(0.05, rel=0.03)


def test_each_collective_has_a_way_of_its_own() -> None:
    """Two protocols of an all-reduce, and a reduce-scatter that is slower than half of one."""
    base = find_hardware("cpu")
    truth = Link(
        (
            Regime(Algorithm.RING, 0.3e9, 5e-6, 0.0, "low", ("all_reduce",)),
            Regime(Algorithm.RING, 3e9, 90e-6, 0.0, "high", ("all_reduce",)),
            Regime(Algorithm.RING, 4e9, 50e-6, 0.0, "", ("all_gather",)),
            Regime(Algorithm.RING, 1e9, 80e-6, 0.0, "", ("reduce_scatter",)),
            Regime(Algorithm.EXCHANGE, 2e9, 40e-6, 0.0, "", ("all_to_all",)),
        )
    )
    own = 80e-6 + 2**20 / 2 / 1e9  # not the all-gather's, which would be faster
    assert collective_seconds(Collective.REDUCE_SCATTER, 2**20, truth, 2) == pytest.approx(own)
    samples = Samples((), (), tuple(call_samples(truth, (2,), False)), 1e-6, 1e-9)
    found = fit(samples, base, Matmul())
    assert {len(each.collectives) for each in found.hardware.inside.regimes} == {1}
    for kind in Collective:
        for power in range(8, 29, 4):
            predicted = collective_seconds(kind, 2**power, found.hardware.inside, 2)
            true = collective_seconds(kind, 2**power, truth, 2)
            assert predicted == pytest.approx(true, rel=0.1), (kind, power)
    # Where no network was measured, nodes are no nearer than the preset says.
    (across,) = found.hardware.links((2 * base.devices_per_node,))
    for regime in across.regimes:
        assert regime.bytes_per_second <= base.network.regimes[0].bytes_per_second * 64
    outliers = [row for row in found.rows if abs(row.error) > 0.2]
    assert len(outliers) <= len(found.rows) // 10


def test_a_processor_by_itself_has_rates_of_its_own() -> None:
    """Nothing is known of it beforehand: the peaks are what was reached."""
    base = replace(find_hardware("cpu"), flops_per_second=(), memory_bytes_per_second=1.0)
    planted = replace(
        base,
        flops_per_second=((2, 60e9), (4, 100e9), (8, 50e9)),
        memory_by_size=((2**16, 60e9), (2**26, 10e9)),
        launch_seconds=2e-6,
    )
    products = [each for size in (2, 4, 8) for each in product_samples(planted, size)]
    samples = Samples(tuple(products), tuple(move_samples(planted)), (), 2e-6, 1e-9)
    found = fit(samples, base, Matmul()).hardware
    for itemsize, rate in planted.flops_per_second:
        assert found.peak(itemsize) * found.matmul.efficiency == pytest.approx(rate, rel=0.05)
    assert found.sustained_bytes_per_second == pytest.approx(10e9, rel=0.01)
    assert found.functions_per_second == pytest.approx(1e9)
    assert found.inside == base.inside


def test_the_time_per_byte_is_interpolated(tmp_path: Path) -> None:
    """Between two sizes, and constant beyond them; the file keeps it all."""
    hardware = replace(
        find_hardware("cpu"),
        memory_by_size=((2**10, 8e9), (2**20, 2e9)),
        functions_per_second=3e9,
    )
    sizes = np.array([2.0**5, 2.0**10, 2.0**15, 2.0**20, 2.0**25])
    per_byte = moved_seconds(sizes, hardware) / sizes
    assert per_byte == pytest.approx([1 / 8e9, 1 / 8e9, (1 / 8e9 + 1 / 2e9) / 2, 1 / 2e9, 1 / 2e9])
    write_hardware(hardware, tmp_path / "own.json")
    assert read_hardware(tmp_path / "own.json") == hardware


def run(*command: str) -> str:
    """Standard output of a command in this repository."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_is_quick() -> None:
    """It imports no torch."""
    code = (
        "import sys\nfrom autoparallel.cli import main\n"
        "try:\n    main(['calibrate', '--help'])\n"
        "except SystemExit:\n    pass\nprint('torch' in sys.modules)"
    )
    assert run("-c", code).splitlines()[-1] == "False"


def test_a_file_that_cannot_be_written_is_refused_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not after the minutes that measuring takes."""
    assert main(["calibrate", "--output", str(tmp_path / "none" / "own.json")]) == 2
    assert main(["calibrate", "--output", str(tmp_path / "own.txt")]) == 2
    told = capsys.readouterr().err
    assert f"no folder {tmp_path / 'none'}" in told
    assert "must end in .json" in told
    assert "measuring" not in told


@pytest.mark.parametrize("processes", [1, *broad(2)])
def test_the_command_writes_what_plans_take(processes: int, tmp_path: Path) -> None:
    """End to end; of two processes also the collectives."""
    file = tmp_path / "my-machine.json"
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    module = ["-m", *(launcher if processes > 1 else []), "autoparallel"]
    out = run(*module, "calibrate", "--quick", "--json", "--output", str(file), "--name", "mine")
    measured = json.loads(out[out.index("{") :])
    assert all(row["measured"] > 0 and row["fitted"] > 0 for row in measured["rows"])
    collectives = [row for row in measured["rows"] if row["what"].startswith("all-reduce")]
    assert bool(collectives) == (processes > 1)
    hardware = read_hardware(file)
    assert hardware.name == "mine"
    assert f"on {processes} x" in hardware.source
    assert (hardware.inside == find_hardware("cpu").inside) == (processes == 1)
    model = GPT(GPTConfig(layers=1, hidden=16, heads=2, vocabulary=32, positions=8))
    plan = make_plan(model, 2, hardware=str(file))
    assert plan.hardware == "mine"
    assert timeline(plan).seconds > 0


def test_predictions_are_compared_with_measurements(tmp_path: Path) -> None:
    """The benchmark runs; how near the two are is no matter of a test."""
    file = tmp_path / "predicted.json"
    benchmark = "benchmarks/predicted.py"
    options = ("--tiny", "--steps", "1", "--models", "bert", "--processes", "1")
    run(benchmark, *options, "--json", str(file))
    rows = json.loads(file.read_text())
    assert [row["processes"] for row in rows] == [1]
    for row in rows:
        assert row["measured"] > 0
        phases = (row["forward"], row["backward"], row["update"])
        assert sum(phase[0] for phase in phases) == pytest.approx(row["predicted"])
