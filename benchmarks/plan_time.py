"""Measures the time and memory of planning, phase by phase: no weights and no GPU are needed.

    python benchmarks/plan_time.py [--rows gpt2:8,gpt3:8x8@80GiB] [--json out/plan_time.json]

A row is a model and a mesh, and may have a memory limit behind an @; a limit below what the model
needs measures the refusal. Models are made on the meta device, and each row runs in a process of
its own, so that its peak memory is its own. The total is the time from the model to its plan; to
make the model, to import torch and this package, and to emit the parallel program are extra.
Before the clock starts, one tiny model is captured, because the first export of a process loads
much of torch; --cold leaves that in.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PHASES = ("capture", "passes", "rules", "tiling", "network", "solve", "explain", "read", "memory")
EXTRA = ("import", "construct", "emit")
MODELS = ("gpt2", "gpt2-xl", "bert-large", "llama-3-8b", "gpt3", "hf-gpt3", "gpt-1t")
ROWS = (
    *(f"{model}:8" for model in MODELS[:-1]),
    *(f"{model}:8x8" for model in MODELS[:-2]),
    "gpt2:2x2x2",
    "gpt3:2x2x2",
    "gpt-1t:48x8x8",
    "gpt2:8@4GiB",
    "llama-3-8b:8x8@24GiB",
    "llama-3-8b:8x8@2GiB",
    "gpt3:8x8@80GiB",
)
AXES = {1: ("tp",), 2: ("dp", "tp"), 3: ("dp", "sp", "tp")}
LLAMA_SEQUENCE = 2048


def construct(name: str, batch: int) -> tuple[Any, dict[str, Any]]:
    """Return the model and its planning inputs, on the meta device.

    name: one of MODELS, or "tiny". batch: sequences in the inputs.
    """
    import torch

    from autoparallel.train.models import GPT, Bert, BertConfig, GPTConfig

    bundled: dict[str, Callable[[], Any]] = {
        "tiny": lambda: GPT(GPTConfig(layers=1, hidden=16, heads=2, vocabulary=31, positions=8)),
        "gpt2": lambda: GPT(GPTConfig.gpt2()),
        "gpt2-xl": lambda: GPT(GPTConfig.gpt2_xl()),
        "gpt3": lambda: GPT(GPTConfig.gpt3()),
        # The largest of Narayanan et al. 2021 (arXiv:2104.04473), table 1.
        "gpt-1t": lambda: GPT(GPTConfig(layers=128, hidden=25600, heads=160, positions=2048)),
        "bert-large": lambda: Bert(BertConfig.large()),
    }
    with torch.device("meta"):
        if name in bundled:
            model = bundled[name]()
            return model, model.example_inputs(batch=batch)
        import transformers

        transformers.logging.set_verbosity_error()
        if name == "llama-3-8b":
            model = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(
                    num_hidden_layers=32,
                    hidden_size=4096,
                    num_attention_heads=32,
                    num_key_value_heads=8,
                    intermediate_size=14336,
                    vocab_size=128256,
                    use_cache=False,
                )
            )
        else:
            model = transformers.GPT2LMHeadModel(
                transformers.GPT2Config(
                    n_layer=96, n_embd=12288, n_head=96, n_positions=2048, use_cache=False
                )
            )
        tokens = torch.empty(batch, LLAMA_SEQUENCE, dtype=torch.long)
        return model.train(), {"input_ids": tokens, "labels": tokens}


class Clock:
    """The seconds of each phase, by `now`; of a phase inside of another, only the inner one
    counts.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.seconds = dict.fromkeys((*PHASES, *EXTRA), 0.0)
        self.running: list[str] = []
        self.since = 0.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside of this context for phase `name`."""
        self._next()
        self.running.append(name)
        try:
            yield
        finally:
            self._next()
            self.running.pop()

    def _next(self) -> None:
        """Add the time since the last change to the phase that was running."""
        now = self.now()
        if self.running:
            self.seconds[self.running[-1]] += now - self.since
        self.since = now

    def watch(self, owner: Any, attribute: str, phase: str) -> None:
        """Count calls of `owner.attribute` for `phase` from now on."""
        function = getattr(owner, attribute)

        def run(*args: Any, **kwargs: Any) -> Any:
            """Call the function, inside its phase."""
            with self.phase(phase):
                return function(*args, **kwargs)

        setattr(owner, attribute, run)


def measure(
    row: str, hardware: str, data_parallel: bool | None, cold: bool, cpu: bool
) -> dict[str, Any]:
    """Return the seconds per phase and the peak memory of one row, measured in this process.

    row: as "gpt3:8x8" or "gpt3:8x8@80GiB". hardware: preset or file. data_parallel: whether
    products may be split along the batch; None for meshes of several axes only. cold: torch's
    start-up counts too. cpu: processor time, where others use the machine.
    """
    clock = Clock(time.process_time if cpu else time.perf_counter)
    with clock.phase("import"):
        from autoparallel.capture import graph_breaks as breaks
        from autoparallel.errors import MemoryLimitError
        from autoparallel.mesh import Mesh
        from autoparallel.planning import network_solver as solving
        from autoparallel.planning import plan_model, search
        from autoparallel.planning.request import make_options
        from autoparallel.rewrite.emit import emit
        from autoparallel.rules.lookup import find_rule
        from autoparallel.runtime.ranks import thread_ranks
        from autoparallel.strategy import build_network as builder

    request, _, limit = row.partition("@")
    name, _, sizes = request.partition(":")
    shape = tuple(map(int, sizes.split("x")))
    mesh = Mesh(**dict(zip(AXES[len(shape)], shape, strict=True)))
    if not cold:
        tiny, inputs = construct("tiny", 2)
        breaks.trace(tiny, (), inputs, known=find_rule)
    # A phase is the time in a function, by the name under which its caller finds it.
    clock.watch(breaks, "capture", "capture")
    clock.watch(breaks, "run_passes", "passes")
    clock.watch(builder, "match_rules", "rules")
    clock.watch(builder, "CandidateSplits", "tiling")
    clock.watch(search, "build_network", "network")
    # Within a limit there are many plain solves, and work between them.
    clock.watch(solving.NetworkSolver, "within" if limit else "__call__", "solve")
    clock.watch(search, "cost_of_splitting", "explain")
    clock.watch(plan_model, "memory_of", "memory")
    with clock.phase("construct"):
        model, inputs = construct(name, batch=max(2, mesh.world_size))
    options = make_options(
        mesh,
        len(shape) > 1 if data_parallel is None else data_parallel,
        limit or None,
        None,
        hardware=hardware,
    )
    captured = breaks.trace(model, (), inputs, known=find_rule)
    plan = None
    with clock.phase("read"), contextlib.suppress(MemoryLimitError):
        plan = plan_model.fastest_plan(model, captured, (mesh,), options)
    # ru_maxrss is in bytes on macOS and in kilobytes elsewhere. It is read before the program is
    # emitted, which is not part of planning.
    planned = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if plan is not None:
        with clock.phase("emit"):
            emit(captured.graph, plan, thread_ranks(mesh)[0], name)
    return {
        "row": row,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "nodes": len(captured.graph.nodes),
        "copies": [len(paths) for paths in captured.repeats],
        "total": sum(clock.seconds[phase] for phase in PHASES),
        "seconds": clock.seconds,
        "peak_bytes": planned * (1 if sys.platform == "darwin" else 1024),
        "cost": plan.cost if plan else 0.0,
        "lower_bound": plan.lower_bound if plan else 0.0,
        "method": plan.method if plan else "refused",
    }


def in_own_process(row: str, options: list[str]) -> dict[str, Any]:
    """Run `measure` in a fresh interpreter, and return its figures."""
    command = [sys.executable, __file__, "--one", row, *options]
    searching = {**os.environ, "AUTOPARALLEL_KEEP_PLANS": "0"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=searching)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure the rows that were asked for, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated, as gpt3:8x8")
    parser.add_argument("--hardware", default="dgx-a100", help="preset or file")
    parser.add_argument(
        "--data-parallel",
        action=argparse.BooleanOptionalAction,
        help="whether products may be split along the batch; by default with several axes",
    )
    parser.add_argument("--cold", action="store_true", help="count torch's own start-up too")
    parser.add_argument(
        "--cpu", action="store_true", help="CPU seconds: others use the machine too"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        figure = measure(
            options.one, options.hardware, options.data_parallel, options.cold, options.cpu
        )
        print(json.dumps(figure))
        return
    rows = options.rows.split(",")
    for row in rows:
        model, _, sizes = row.partition("@")[0].partition(":")
        known = model in MODELS and all(part.isdigit() for part in sizes.split("x"))
        if not known or len(sizes.split("x")) not in AXES:
            parser.error(
                f"unknown row {row!r}: a model of {', '.join(MODELS)}, and 8, 8x8 or 2x2x2"
            )
    passed = ["--hardware", options.hardware, *["--cold"] * options.cold, *["--cpu"] * options.cpu]
    if options.data_parallel is not None:
        passed.append("--data-parallel" if options.data_parallel else "--no-data-parallel")
    names = (*PHASES, *EXTRA)
    head = f"{'row':22}{'params':>9}{'nodes':>7}{'GiB':>6}{'total':>8}  "
    print(head + "".join(f"{name:>10}" for name in names) + "   bound")
    figures = []
    for row in rows:
        figure = in_own_process(row, passed)
        figures.append(figure)
        seconds = "".join(f"{figure['seconds'][name]:10.2f}" for name in names)
        gap = 1 - figure["lower_bound"] / figure["cost"] if figure["cost"] else 0.0
        print(
            f"{row:22}{figure['parameters'] / 1e9:8.2f}B{figure['nodes']:7}"
            f"{figure['peak_bytes'] / 2**30:6.2f}{figure['total']:8.2f}  {seconds}   "
            f"{figure['method']}" + (f", gap {gap:.2%}" if figure["cost"] else ""),
            flush=True,
        )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "hardware": options.hardware,
            "cold": options.cold,
            "cpu": options.cpu,
            "rows": figures,
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
