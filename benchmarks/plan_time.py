"""How long it takes to plan, phase by phase, and how much memory: no weights and no GPU needed.

    python benchmarks/plan_time.py [--models gpt2,gpt3] [--world-size 8] [--json out/plan_time.json]

Models are made on the meta device, and each runs in a process of its own, so that its peak memory
is its own. Before the clock starts, one tiny model is captured, because the first export of a
process loads much of torch; --cold leaves that in.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PHASES = ("construct", "capture", "passes", "network", "solve", "read", "emit")
MODELS = ("gpt2", "gpt2-xl", "bert-large", "llama-3-8b", "gpt3", "hf-gpt3")
LLAMA_SEQUENCE = 2048


def construct(name: str) -> tuple[Any, dict[str, Any]]:
    """The model and its planning inputs, on the meta device."""
    import torch

    from autoparallel.train.models import GPT, Bert, BertConfig, GPTConfig

    own: dict[str, Callable[[], Any]] = {
        "tiny": lambda: GPT(GPTConfig(layers=1, hidden=16, heads=2, vocabulary=31, positions=8)),
        "gpt2": lambda: GPT(GPTConfig.gpt2()),
        "gpt2-xl": lambda: GPT(GPTConfig.gpt2_xl()),
        "gpt3": lambda: GPT(GPTConfig.gpt3()),
        "bert-large": lambda: Bert(BertConfig.large()),
    }
    with torch.device("meta"):
        if name in own:
            model = own[name]()
            return model, model.example_inputs(batch=2)
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
        tokens = torch.empty(2, LLAMA_SEQUENCE, dtype=torch.long)
        return model.train(), {"input_ids": tokens, "labels": tokens}


def measure(name: str, world_size: int, cold: bool) -> dict[str, Any]:
    """Seconds per phase and peak memory of one model, in this process."""
    from dataclasses import replace

    from autoparallel import search as searching
    from autoparallel.graph.capture import capture
    from autoparallel.graph.passes import run_passes
    from autoparallel.mesh import Mesh
    from autoparallel.options import Options
    from autoparallel.rewrite.emit import emit
    from autoparallel.runtime.groups import thread_groups

    seconds = dict.fromkeys(PHASES, 0.0)

    def timed(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[phase] += time.perf_counter() - start

        return run

    if not cold:
        capture(construct("tiny")[0], (), construct("tiny")[1])
    model, inputs = timed("construct", construct)(name)
    captured = timed("capture", capture)(model, (), inputs)
    captured = replace(captured, graph=timed("passes", run_passes)(captured.graph))
    # The phases inside of `search`, by the names that it calls.
    searching.build_network = timed("network", searching.build_network)
    searching.exact.solve = timed("solve", searching.exact.solve)
    start = time.perf_counter()
    plan = searching.search(captured, name, Mesh(tp=world_size), Options())
    whole = time.perf_counter() - start
    seconds["read"] = whole - seconds["network"] - seconds["solve"]
    timed("emit", emit)(captured.graph, plan, thread_groups(world_size)[0], name)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "nodes": len(captured.graph.nodes),
        "copies": [len(paths) for paths in captured.repeats],
        "seconds": {**seconds, "total": sum(seconds.values())},
        "peak_bytes": peak * (1 if sys.platform == "darwin" else 1024),
    }


def in_own_process(name: str, world_size: int, cold: bool) -> dict[str, Any]:
    """Run `measure` in a fresh interpreter."""
    command = [sys.executable, __file__, "--one", name, "--world-size", str(world_size)]
    done = subprocess.run(
        command + ["--cold"] * cold, check=True, stdout=subprocess.PIPE, text=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated")
    parser.add_argument("--world-size", type=int, default=8)
    parser.add_argument("--cold", action="store_true", help="count torch's own start-up too")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.world_size, options.cold)))
        return
    names = options.models.split(",")
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        parser.error(f"unknown model {unknown[0]!r}: choose among {', '.join(MODELS)}")
    header = ("total", *PHASES)
    print(f"{'model':12}{'params':>9}{'nodes':>7}{'GiB':>6}", *[f"{name:>9}" for name in header])
    rows = []
    for name in names:
        row = in_own_process(name, options.world_size, options.cold)
        rows.append(row)
        print(
            f"{name:12}{row['parameters'] / 1e9:8.2f}B{row['nodes']:7}"
            f"{row['peak_bytes'] / 2**30:6.2f}",
            *[f"{row['seconds'][phase]:9.2f}" for phase in header],
            flush=True,
        )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        figures = {"world_size": options.world_size, "cold": options.cold, "models": rows}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
