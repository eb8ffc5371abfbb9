"""The same runs on one process, on two and on four, split in every way: one curve for each model.

    python benchmarks/curves.py [gpt-tiny] [bert-tiny] [moe-tiny]

GPT, BERT and a mixture of experts train with dropout: 20 steps in float64, whose losses must be
those of one process to 1e-9, and 200 in float32, to 1e-4. The experts are transformers', whose
norms and losses are of float32 whatever the weights are: 1e-5 instead. The curves of a model are
kept in out/curves, and docs/curves.svg is drawn from those of all three, so that they can be run
one by one. All of them take about eight minutes of a processor.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "out" / "curves"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from processes import run_processes  # noqa: E402

from autoparallel.train.config_text import read_config  # noqa: E402
from autoparallel.train.runner import run_training  # noqa: E402

COMMON = (
    "--data.limit_bytes=2000000", "--data.vocabulary=1000", "--data.sequence=64",
    "--training.batch=8", "--schedule.warmup=20", "--schedule.decay_steps=200",
    "--checkpoint.every=0", "--evaluation.every=0", "--log.picture=false", "--log.quiet=true",
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


def arguments_of(name: str, way: tuple[int, str, str], precision: str) -> list[str]:
    """Return the changes to a shipped configuration that make a run of it."""
    _, mesh, demands = way
    arguments = [
        *COMMON, *MODELS[name], f"--training.steps={TOLERANCES[precision][0]}",
        f"--training.precision={precision}", f"--parallel.mesh={mesh}",
    ]  # fmt: skip
    if demands:
        arguments.append(f"--parallel.constraints={demands.format(SPLIT[name])}")
    return arguments


def on_rank(_: int, name: str, way: tuple[int, str, str], folder: str) -> dict[str, list[float]]:
    """Return the losses of a model's runs on the ranks that are there, by precision."""
    curves = {}
    for precision in TOLERANCES:
        changes = [*arguments_of(name, way, precision), f"--folder={folder}/{precision}"]
        curves[precision] = list(run_training(read_config(name, changes)).losses)
    return curves


def curves_of(name: str) -> tuple[dict[str, list[float]], list[str]]:
    """Run a model in all ways; return its curves in float32, and what is wrong with any."""
    drawn, wrong = {}, []
    alone: dict[str, list[float]] = {}
    for title, way in {**WAYS, **(EXPERTS if name == "moe-tiny" else {})}.items():
        with tempfile.TemporaryDirectory() as folder:
            curves = run_processes(on_rank, way[0], name, way, folder, timeout_seconds=3600.0)[0]
        alone = alone or curves
        for precision, (_, within) in TOLERANCES.items():
            curve = curves[precision]
            tolerance = max(within, 1e-5) if name == "moe-tiny" else within
            pairs = zip(alone[precision], curve, strict=True)
            apart = max(abs(one - other) for one, other in pairs)
            print(f"{name}, {precision}, {title}: {len(curve)} steps, loss {curve[-1]:.4f}, "
                  f"at most {apart:.1e} from one process", flush=True)  # fmt: skip
            if not apart <= tolerance:
                wrong.append(f"{name}, {precision}, {title}: {apart:.1e}")
        drawn[title] = curves["float32"]
    return drawn, wrong


def main() -> None:
    """Run the models that are named, or all; draw the curves if all are there."""
    wrong = []
    KEPT.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or MODELS:
        curves, complaints = curves_of(name)
        (KEPT / f"{name}.json").write_text(json.dumps(curves))
        wrong += complaints
    kept = {name: KEPT / f"{name}.json" for name in MODELS}
    if all(file.exists() for file in kept.values()):
        draw({name: json.loads(file.read_text()) for name, file in kept.items()})
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
