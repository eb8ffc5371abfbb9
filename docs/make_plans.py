"""Write docs/plans.md: what is planned for models of practitioners, beside what they print.

    python docs/make_plans.py [row ...]

Without names, all rows of docs/plans.json: many minutes. Each row is planned in a process of its
own, after a tiny model has been planned there, so that its seconds are not those of loading torch.
What was found is kept in docs/plans.json, and rows that are not named keep theirs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

DATA = ROOT / "docs" / "plans.json"
DOCUMENT = ROOT / "docs" / "plans.md"
HEAD = """# Plans of models at their real size

What the planner finds for models that others have trained, without a device, beside what they
print. Written by `make plans`, from `docs/plans.json`; `make plans ARGS="name"` does one row.

- plan: CPU seconds from the model, built on the meta device, to the plan; within the limit on a
  rank's memory, whose optimum is proven to the gap that is told.
- step, MFU: predicted (see [Prediction](architecture.md#reading-a-plan)), for bfloat16, Adam with
  master weights, or of the parameters' own type ("plain Adam") where practice has that, and one
  batch in one pass.
- layout: for each axis, the dims that products split on it, by share of FLOPs; and how it stores
  parameters. "whole": the axis does not split them.
- Predicted is the model's own program, op by op: attention that a library spells out (GPT-OSS) is
  not fused. Practice has single kernels for the gated product of experts, and for gathering their
  rows and putting them back.
- practice: the layout and the figure as printed. Software, precision and batches in several passes
  differ; a figure in tokens and one in seconds are for the same number of tokens a step as here,
  unless the layout says how many ranks it is for.

| row | machine, limit | plan | mesh: layout | step | MFU | here | practice | layout of practice |
|---|---|---|---|---|---|---|---|---|
"""


def build(row: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the model of a row on the meta device, in bfloat16, and its inputs."""
    import torch

    from autoparallel.commands.model_names import named_model
    from autoparallel.train.models import GPT, GPTConfig

    if isinstance(row["model"], str):
        named = named_model(
            row["model"], batch=row["batch"], sequence=row["sequence"], dtype="bfloat16"
        )
        return named.model, named.inputs
    with torch.device("meta"):
        model = GPT(GPTConfig(**row["model"])).to(torch.bfloat16)
        return model, model.example_inputs(batch=row["batch"])


def plan_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is found for one row."""
    import torch

    import autoparallel
    from autoparallel.commands.asked_plan import parse_mesh

    torch.set_num_threads(1)
    os.environ["AUTOPARALLEL_KEEP_PLANS"] = "0"  # the search is what takes the time
    # The first plan of a process loads much of torch.
    autoparallel.make_plan(torch.nn.Linear(8, 8), 2, example_inputs=torch.ones(4, 8))
    model, inputs = build(row)
    is_auto = row["mesh"] == "auto"
    start = time.process_time()
    try:
        plan = autoparallel.make_plan(
            model,
            row["ranks"] if is_auto else None,
            mesh="auto" if is_auto else parse_mesh(row["mesh"]),
            example_inputs=inputs,
            hardware=row["hardware"],
            optimizer=row.get("optimizer", "mixed_adam"),
            memory_limit=row["memory_limit"],
            recompute=row["recompute"],
        )
    except autoparallel.AutoParallelError as error:
        return {"plan_seconds": round(time.process_time() - start, 1), "refused": error.what}
    seconds = time.process_time() - start
    step = autoparallel.timeline(plan)
    return {
        "plan_seconds": round(seconds, 1),
        "gap": round(max(plan.cost / plan.lower_bound - 1, 0.0), 4) if plan.lower_bound else None,
        "step_bound": round(plan.step_bound / plan.step, 4) if plan.step else None,
        "mesh": ", ".join(f"{name}={size}" for name, size in plan.mesh.axes),
        "layout": layout_words(plan),
        "recomputed": recomputed_words(plan),
        "step": float(f"{plan.step:.4g}"),
        "mfu": round(step.mfu, 3),
        "tokens_per_second": round(step.tokens_per_second / plan.world_size),
        "flops_per_second": float(f"{step.mfu * step.peak / plan.world_size:.3g}"),
        "gibibytes": round(sum(nbytes for _, nbytes in plan.memory) / 2**30, 1),
    }


def layout_words(plan: Any) -> list[str]:
    """Return, for each axis, the dims that products split on it, and how it stores parameters."""
    from autoparallel.graph.graph import hint
    from autoparallel.placement import Shard
    from autoparallel.threads.cuts import threads_cut

    threads = plan.threads()
    texts = []
    for axis, (name, ranks) in enumerate(plan.mesh.axes):
        shares: dict[str, float] = {}
        for op in plan.ops:
            if not op.whole_flops:
                continue
            tensors = zip((*op.reads, *op.makes), (*op.operands, *op.results), strict=True)
            split = next(
                ((value, one[axis]) for value, one in tensors if isinstance(one[axis], Shard)), None
            )
            word = "whole"
            if split is not None:
                value, shard = split
                row = threads.dims[value][shard.dim]
                sizes = [hint(threads.threads[number].size) for number in row]
                cut = threads_cut(row, sizes, shard, ranks)
                names = [threads.threads[number].name for number in cut or row]
                word = "heads" if any("head" in each for each in names) else names[0]
            if any(kernel.startswith("experts") for kernel in op.kernels[axis : axis + 1]):
                word = "experts"
            shares[word] = shares.get(word, 0.0) + op.whole_flops
        total = sum(shares.values()) or 1.0
        known = sorted(shares, key=lambda word: -shares[word])
        parts = [word for word in known if shares[word] >= 0.02 * total]
        texts.append(f"{name}: {', '.join(parts)} ({_stored(plan, axis)})")
    return texts


def _stored(plan: Any, axis: int) -> str:
    """Return how an axis stores most bytes of the parameters."""
    from autoparallel.placement import Shard

    counted: dict[str, int] = {}
    for parameter in plan.parameters:
        layouts = (parameter.storage, parameter.gradient, parameter.state)
        split = [isinstance(layout[axis], Shard) for layout in layouts]
        words = ("parameters split", "gradients split", "optimizer state split")
        word = next((word for word, one in zip(words, split, strict=True) if one), "whole")
        counted[word] = counted.get(word, 0) + parameter.nbytes
    return max(counted, key=lambda word: counted[word], default="whole")


def recomputed_words(plan: Any) -> str:
    """Return how many blocks are recomputed, by mode."""
    modes = [mode for _, mode in plan.recompute if mode != "none"]
    again = sum(conversion.again for conversion in plan.conversions)
    parts = [f"{modes.count(mode)} blocks {mode}" for mode in dict.fromkeys(modes)]
    parts += [f"{again} copies made again"] if again else []
    return ", ".join(parts)


def line(row: Mapping[str, Any], sources: Sequence[str]) -> str:
    """Return a row's line of the table."""
    found, practice = row.get("found"), row["practice"]
    machine = f"{row['ranks']} × {row['hardware']}, {row['memory_limit']}"
    machine += ", plain Adam" * (row.get("optimizer") == "adam")
    told = "", ""
    if practice is not None:
        number = list(sources).index(practice["source"]) + 1
        figure, unit = practice["figure"], practice["unit"]
        told = f"{figure:,} {unit} [{number}]", practice["layout"]
    start = f"| {row['name']} | {machine} | "
    if found is None:
        return f"{start}not run | {row['mesh']} | | | | {told[0]} | {told[1]} |"
    if "refused" in found:
        return (
            f"{start}{found['plan_seconds']} s | {found['refused']} | | | | {told[0]} | {told[1]} |"
        )
    layout = "; ".join([*found["layout"], *[found["recomputed"]] * bool(found["recomputed"])])
    here = f"{found['tokens_per_second']:,} tokens/s/device"
    if practice is not None and practice["unit"].startswith("TFLOP"):
        here = f"{found['flops_per_second'] / 1e12:.0f} TFLOP/s/device"
    if practice is not None and practice["unit"] == "s":
        here = f"{found['step']:.3g} s"
    gap = f", gap {100 * found['gap']:.1f} %" if found["gap"] is not None else ""
    return (
        f"{start}{found['plan_seconds']} s{gap} | {found['mesh']}: {layout} | "
        f"{found['step']:.3g} s | {100 * found['mfu']:.0f} % | {here} | {told[0]} | {told[1]} |"
    )


def main(names: Iterable[str]) -> None:
    """Plan the rows of these names, all by default, and write the document."""
    data = json.loads(DATA.read_text())
    names = list(names)
    unknown = set(names) - {row["name"] for row in data["rows"]}
    if unknown:
        raise SystemExit(f"no rows are called {', '.join(sorted(unknown))}; see {DATA}")
    for row in data["rows"]:
        if names and row["name"] not in names:
            continue
        sys.stderr.write(f"{row['name']}\n")
        done = subprocess.run(
            [sys.executable, __file__, "--row", json.dumps(row)],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        row["found"] = json.loads(done.stdout.splitlines()[-1])
        DATA.write_text(_json(data))
    rows = "\n".join(line(row, data["sources"]) for row in data["rows"])
    sources = "\n".join(
        f"{number}. {text}" for number, text in enumerate(data["sources"].values(), 1)
    )
    DOCUMENT.write_text(f"{HEAD}{rows}\n\n## Sources\n\n{sources}\n")


def _json(data: Mapping[str, Any]) -> str:
    """Return the data as JSON with one row a line."""
    rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in data["rows"])
    head = json.dumps({key: data[key] for key in ("about", "sources")}, indent=1)
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


if __name__ == "__main__":
    if sys.argv[1:2] == ["--row"]:
        sys.stdout.write(json.dumps(plan_row(json.loads(sys.argv[2]))) + "\n")
    else:
        main(sys.argv[1:])
