"""The same runs on one process, on two and on four, split in every way: one curve for each model.

    python benchmarks/curves.py [steps]

GPT, BERT and a mixture of experts train with dropout: 20 steps in float64, whose losses must be
those of one process to 1e-9, and 200 in float32, to 1e-4. It draws docs/curves.svg. The experts are
transformers', whose norms and losses are of float32 whatever the weights are: 1e-5 instead.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")

COMMON = (
    "--data.limit_bytes=2000000", "--data.vocabulary=1000", "--data.sequence=64",
    "--training.batch=8", "--schedule.warmup=20", "--checkpoint.every=0", "--evaluation.every=0",
    "--log.picture=false",
)  # fmt: skip
SIZES = ("--model.layers=2", "--model.hidden=64", "--model.heads=4", "--model.dropout=0.1")
MODELS = {
    "gpt-tiny": SIZES,
    "bert-tiny": SIZES,
    "moe-tiny": (
        "--model.options.hidden_size=64", "--model.options.intermediate_size=128",
        "--model.options.attention_dropout=0.1", "--model.options.num_local_experts=4",
    ),
}  # fmt: skip
# The ranks and their arrangement; what is demanded of the plan.
WAYS = {
    "1 process": (1, "tp", ""),
    "tp = 2": (2, "tp", ""),
    "dp = 2, ZeRO": (2, "dp", '["*{} on dp is split"]'),
    "dp = 2, tp = 2": (4, "dp=2,tp", '["* on dp is whole"]'),
}
SPLIT = {
    "gpt-tiny": "feed_forward.*.weight", "bert-tiny": "feed_forward.*.weight",
    "moe-tiny": "experts.*",
}  # fmt: skip
EXPERTS = {"ep = 2": (2, "ep", '["*experts.* on ep is split 0"]')}
# Precision: steps, and how far losses may be apart.
TOLERANCES = {"float64": (20, 1e-9), "float32": (200, 1e-4)}


def losses(name: str, way: tuple[int, str, str], precision: str, steps: int) -> list[float]:
    """Return the losses of one run. Raises CalledProcessError where it fails."""
    ranks, mesh, demands = way
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [
            sys.executable, *(launcher if ranks > 1 else ()), "-m", "autoparallel", "train", name,
            *COMMON, *MODELS[name], f"--folder={folder}/run", f"--training.steps={steps}",
            "--schedule.decay_steps=200", f"--training.precision={precision}",
            f"--parallel.mesh={mesh}",
        ]  # fmt: skip
        if demands:
            command.append(f"--parallel.constraints={demands.format(SPLIT[name])}")
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths}
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        if ended.returncode:
            raise SystemExit(ended.stderr[-3000:])
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]


def main() -> None:
    """Run all of it, say how far apart the curves are, and draw them."""
    most = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    drawn, wrong = {}, []
    for name in MODELS:
        ways = {**WAYS, **(EXPERTS if name == "moe-tiny" else {})}
        for precision, (steps, within) in TOLERANCES.items():
            tolerance = max(within, 1e-5) if name == "moe-tiny" else within
            alone: list[float] = []
            for title, way in ways.items():
                curve = losses(name, way, precision, min(steps, most))
                alone = alone or curve
                apart = max(abs(one - other) for one, other in zip(alone, curve, strict=True))
                print(f"{name}, {precision}, {title}: {len(curve)} steps, loss {curve[-1]:.4f}, "
                      f"at most {apart:.1e} from one process", flush=True)  # fmt: skip
                if apart > tolerance:
                    wrong.append(f"{name}, {precision}, {title}: {apart:.1e}")
                if precision == "float32":
                    drawn.setdefault(name, {})[title] = curve
    draw(drawn)
    if wrong:
        raise SystemExit("too far apart: " + "; ".join(wrong))


def draw(drawn: dict[str, dict[str, list[float]]]) -> None:
    """Draw the curves upon each other, and below them their distances from one process."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "curves"
    figure, axes = plt.subplots(
        2, len(drawn), figsize=(12, 5), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    for (name, curves), (above, below) in zip(drawn.items(), axes.T, strict=True):
        alone = next(iter(curves.values()))
        for number, (title, curve) in enumerate(curves.items()):
            # They lie upon each other: wide and pale below, thin above.
            above.plot(curve, linewidth=8 - 1.7 * number, alpha=0.35 + 0.13 * number, label=title)
            apart = [max(abs(a - b), 1e-8) for a, b in zip(alone, curve, strict=True)]
            below.semilogy(apart, linewidth=0.8)
        above.set(title=name.removesuffix("-tiny"))
        above.legend(fontsize="small")
        below.axhline(1e-4, color="gray", linewidth=0.8, linestyle=":")
        below.set(xlabel="step")
    axes[0][0].set(ylabel="loss (nats per token)")
    axes[1][0].set(ylabel="distance from\none process")
    figure.savefig(ROOT / "docs" / "curves.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
