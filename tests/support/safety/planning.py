"""Rows of planning and training in one process: threads, state that is left behind, endurance."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from edited_plans import Mixed
from split_ranks import as_unsplit, programs_of
from torch import nn

import autoparallel
from autoparallel.errors import AutoParallelError, CaptureError
from autoparallel.mesh import Mesh
from autoparallel.parallel.module import parallel_module
from autoparallel.planning.replan import Replanner
from autoparallel.runtime.ranks import Ranks, run_ranks, thread_ranks

from .registry import note, row

ROOT = Path(__file__).parents[3]


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randint(10, shape, generator=torch.Generator().manual_seed(0))


def _plan(model: nn.Module) -> str:
    return autoparallel.make_plan(model, 2, example_inputs=_tokens(2, 3)).to_json()


def _together(work: list[Any]) -> None:
    threads = [threading.Thread(target=each) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@row("plans made in three threads at once", share=100)
def threads(draw: random.Random, count: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    alone = _plan(Mixed())

    def tried(model: nn.Module) -> str:
        return "the plan of one thread" if _plan(model) == alone else "another plan"

    for _ in range(count):
        # They are made before: torch's generator, which that seeds, belongs to all threads.
        models = [Mixed() for _ in range(3)]
        _together([partial(note, counts, partial(tried, model)) for model in models])
    return counts


@row("a plan made while another thread seeds torch's generator without end", share=200)
def seeding(draw: random.Random, count: int) -> Counter[str]:
    """The plan is the same, as nothing else than the seed is in doubt."""
    counts: Counter[str] = Counter()
    alone = _plan(Mixed())
    before = torch.get_rng_state()
    for _ in range(count):
        ended = threading.Event()

        def seeds(ended: threading.Event = ended) -> None:
            number = 0
            while not ended.wait(0.0005):
                torch.manual_seed(number := number + 1)

        def tried() -> str:
            try:
                text = _plan(Mixed())
            except CaptureError as error:
                text = str(error)
            if text == alone:
                return "the plan of one thread"
            return "told" if "another thread seeds it" in text else "another plan"

        thread = threading.Thread(target=seeds)
        thread.start()
        note(counts, tried)
        ended.set()
        thread.join()
    torch.set_rng_state(before)
    return counts


@row("two threads that each simulate a model at once", share=400)
def simulations(draw: random.Random, count: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    model, tokens = Mixed().double(), _tokens(4, 3)
    wanted = autoparallel.simulate(model, 1, example_inputs=tokens)

    def tried(world_size: int) -> str:
        made = autoparallel.simulate(model, world_size, example_inputs=tokens, product_weight=1e6)
        return "right" if torch.allclose(made.output[0], wanted.output[0], rtol=1e-10) else "wrong"

    for _ in range(count):
        _together([partial(note, counts, partial(tried, size)) for size in (2, 3)])
    return counts


class _Fails(nn.Module):
    """Its forward fails in one of several ways, each in the middle of a trace."""

    def __init__(self, way: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.way = nn.Linear(8, 8), way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        if self.way == 0:
            raise ValueError("no")
        if self.way == 1:
            return y.view(7)
        if self.way == 2:
            torch.manual_seed(3)
            return torch.rand_like(y) * y + float(y.sum())
        with torch.no_grad(), torch.autocast("cpu"):
            torch.set_default_dtype(torch.float64)
            try:
                return y @ y
            finally:
                torch.set_default_dtype(torch.float32)


@row("the state of torch and Python after a trace that failed", share=1000)
def failed_traces(draw: random.Random, count: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    alone = _plan(Mixed())

    def state() -> list[Any]:
        random_state = torch.get_rng_state().tolist(), random.getstate()
        modes = (
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.is_inference_mode_enabled(),
        )
        return [random_state, modes, torch.get_default_dtype(), torch.get_num_threads()]

    def tried(way: int) -> str:
        model = _Fails(way)
        before, weights = state(), model.up.weight.clone()
        with suppress(AutoParallelError):
            autoparallel.make_plan(model, 2, example_inputs=torch.ones(3, 8))
        same = state() == before and torch.equal(model.up.weight, weights)
        return "left as it was" if same and _plan(Mixed()) == alone else "changed"

    for way in range(4):
        note(counts, partial(tried, way))
    return counts


@row("lengths of the inputs of one split model, run by one program", share=10, least=6)
def lengths(draw: random.Random, count: int) -> Counter[str]:
    model = Mixed().double().eval()
    sizes = [(draw.randint(2, 9), draw.randint(2, 12)) for _ in range(count)]

    def script(module: nn.Module) -> Any:
        for size in sizes:
            module.zero_grad()
            loss, _ = module(_tokens(*size))
            loss.backward()
            yield loss
        return programs_of(module)

    def tried() -> str:
        programs = as_unsplit(model, 2, (_tokens(4, 6),), script, product_weight=1e6)
        return "right" if programs == 1 else f"{programs} programs"

    counts: Counter[str] = Counter()
    note(counts, tried)
    return Counter({what: number * len(sizes) for what, number in counts.items()})


@row("ranks that are simulated in one process", share=30, least=8)
def many_ranks(draw: random.Random, count: int) -> Counter[str]:
    size = min(64, count)
    model, tokens = Mixed().double(), _tokens(4, 6)
    wanted = autoparallel.simulate(model, 1, example_inputs=tokens)

    def tried() -> str:
        made = autoparallel.simulate(model, size, example_inputs=tokens, product_weight=1e6)
        away = max(float((made.gradients[p] - g).abs().max()) for p, g in wanted.gradients.items())
        return "right" if away < 1e-10 and made.apart == 0 else "wrong"

    counts: Counter[str] = Counter()
    note(counts, tried)
    return Counter({what: number * size for what, number in counts.items()})


@row("steps of training on two ranks: objects of Python, and memory", least=60)
def endurance(draw: random.Random, count: int) -> Counter[str]:
    """One and a half times as often as quick things: 3000 where these are tried 2000 times."""
    steps, warm = count + count // 2, 30
    model, tokens = Mixed(), _tokens(4, 6)
    plan = autoparallel.make_plan(model, mesh=Mesh(tp=2), example_inputs=tokens, product_weight=1e6)

    def work(ranks: Ranks) -> tuple[int, int]:
        replan = Replanner(plan.model, plan.mesh, plan.options)
        module = parallel_module(model, plan, ranks, None, replan, 0)
        optimizer = torch.optim.AdamW(module.parameters(), 1e-3)
        marks = []
        for step in range(steps):
            optimizer.zero_grad()
            module(tokens)[0].backward()
            optimizer.step()
            if step in (warm, steps - 1) and ranks.rank == 0:
                gc.collect()
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                marks.append((len(gc.get_objects()), pages * 4096))
        return marks

    marks = run_ranks(thread_ranks(plan.mesh, in_turn=True), work)[0]
    objects, nbytes = (after - before for before, after in zip(*marks, strict=True))
    happened = (
        "flat" if objects < 300 and nbytes < 16e6 else f"{objects} objects, {nbytes} bytes more"
    )
    return Counter({happened: steps})


@row("another package named `planners` before the project's own", share=1000)
def shadowed(draw: random.Random, count: int) -> Counter[str]:
    counts: Counter[str] = Counter()

    def tried(code: list[str]) -> str:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "planners").mkdir()
            (Path(folder) / "planners" / "__init__.py").write_text("print('theirs')")
            ran = subprocess.run(
                [sys.executable, *code],
                capture_output=True,
                text=True,
                cwd=folder,
                env={"PYTHONPATH": f"{folder}:{ROOT}", "PATH": ""},
                check=False,
            )
        said = "planners" in ran.stderr + ran.stdout and "theirs" not in ran.stdout
        return "refused" if ran.returncode and said else "taken"

    for code in (
        ["-c", "import autoparallel; autoparallel.make_plan"],
        ["-m", "autoparallel", "doctor"],
    ):
        note(counts, partial(tried, code))
    return counts
