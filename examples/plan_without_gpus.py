"""Plans GPT-3 for 64 A100s without any: whether it fits, how fast it is, how that is known.

    python examples/plan_without_gpus.py
    python examples/plan_without_gpus.py --mesh auto --batch 128 --memory 60GiB --output out

No GPU is needed, no process group, and no weights: the model is built on the meta device. It prints
the answer in short; the plan, with every split and every collective; and the plan's communication,
computation and memory in closed form. With --output, it also writes the plan as JSON, a picture of
it and the step as a trace for ui.perfetto.dev.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

import autoparallel
from autoparallel import Mesh, Plan
from autoparallel.analysis.training_step import Timeline
from autoparallel.cost.hardware import find_hardware
from autoparallel.support.units import bytes_text, parse_bytes
from autoparallel.train.models import GPT, GPTConfig


def main() -> int:
    """Return the exit status: 0 if there is a plan that fits."""
    options = parse()
    config = GPTConfig(options.layers, options.hidden, options.heads, 51200, options.sequence, 0.0)
    with torch.device("meta"):
        model = GPT(config).to(torch.bfloat16)
        tokens = torch.zeros(options.batch, options.sequence, dtype=torch.long)
    start = time.monotonic()
    try:
        plan = autoparallel.make_plan(
            model,
            options.world_size,
            mesh=options.mesh,
            example_inputs=(tokens, tokens),
            hardware=options.hardware,
            optimizer="mixed_adam",
            memory_limit=options.memory,
        )
    except autoparallel.AutoParallelError as error:
        print(error, file=sys.stderr)
        return 1
    seconds = time.monotonic() - start
    step = autoparallel.timeline(plan)
    print(in_short(plan, step, options, seconds))
    autoparallel.print_plan(plan)
    names = {config.hidden: "h", config.vocabulary: "V", config.heads: "a"}
    forms = autoparallel.closed_forms(plan, names=names)
    print(autoparallel.forms_text(forms, plan))
    if options.output:
        write(plan, step, options.output)
    return 0


def in_short(plan: Plan, step: Timeline, options: Any, seconds: float) -> str:
    """Return the answer on one screen."""
    # The parameters are bfloat16, two bytes each.
    elements = sum(parameter.nbytes for parameter in plan.parameters) // 2
    used = sum(nbytes for _, nbytes in plan.memory)
    hardware = find_hardware(plan.hardware)
    nodes = -(-plan.world_size // hardware.devices_per_node)
    gap = plan.cost / plan.lower_bound - 1
    again = [path for path, mode in plan.recompute if mode != "none"]
    rows = [
        ("model", f"{elements / 1e9:.1f} billion parameters, {options.layers} layers"),
        ("machines", f"{plan.world_size} devices of {plan.hardware}, {plural(nodes, 'node')}"),
        ("batch", f"{options.batch} x {options.sequence} = {step.tokens:,} tokens a step"),
        ("arranged", str(plan.mesh)),
        ("fits", f"{bytes_text(used)} of {bytes_text(parse_bytes(options.memory))} on each device"),
        ("recomputed", f"{len(again)} of {options.layers} layers" if again else "nothing"),
        ("step", f"{step.seconds:.2f} s: {step.tokens_per_second:,.0f} tokens a second"),
        ("utilization", f"{step.mfu:.1%} of the peak"),
        ("waiting", f"{step.exposed_seconds:.2f} s for communication that nothing hides"),
        ("proven", f"no plan is more than {gap:.2%} cheaper ({plan.method})"),
        ("planned in", f"{seconds:.1f} s, here, without a GPU"),
    ]
    return "\n".join(f"{name:<12} {text}" for name, text in rows) + "\n"


def plural(count: int, name: str) -> str:
    """Return a count with its noun: "8 nodes", "1 node"."""
    return f"{count} {name}{'s' if count != 1 else ''}"


def write(plan: Plan, step: Timeline, folder: Path) -> None:
    """Write the plan, its picture and its trace as files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(plan.to_json())
    autoparallel.write_svg(plan, folder / "plan.svg")
    autoparallel.write_trace(step, folder / "step.trace.json")
    print(f"written to {folder}/: plan.json, plan.svg, step.trace.json")


def mesh_of(text: str) -> Mesh | str:
    """Return "auto", or the mesh that a text like "dp=8,tp=8" names."""
    if text == "auto":
        return text
    axes = (axis.partition("=") for axis in text.split(","))
    return Mesh(**{name.strip(): int(size) for name, _, size in axes})


def parse() -> Any:
    """Return the options of the command line. The defaults are GPT-3 (Brown et al. 2020, table
    2.1).
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=96)
    parser.add_argument("--hidden", type=int, default=12288)
    parser.add_argument("--heads", type=int, default=96)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=64, help="sequences in one step")
    parser.add_argument("--world-size", type=int, default=64)
    parser.add_argument("--mesh", type=mesh_of, default="dp=8,tp=8", help='or "auto"')
    parser.add_argument("--hardware", default="dgx-a100", help="a preset, or a file")
    parser.add_argument("--memory", default="76GiB", help="that a device may use")
    parser.add_argument("--output", type=Path, help="folder for plan, picture and trace")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
