"""Write docs/coverage.md: how much of each model of the zoo is split, and why the rest is not.

python docs/make_coverage.py [family ...]; without names, all of them, which takes minutes. The rows
of others stay as they are.
"""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import zoo  # noqa: E402
from quick_links import QUICK_LINKS  # noqa: E402

import autoparallel  # noqa: E402
from autoparallel.mesh import Mesh  # noqa: E402
from autoparallel.parallel.simulate import simulate_plan  # noqa: E402
from autoparallel.plan import Plan  # noqa: E402
from autoparallel.planning.search import search  # noqa: E402
from autoparallel.rules.lookup import find_rule  # noqa: E402
from autoparallel.view.folded_rows import fold  # noqa: E402

WORLD_SIZES = (8, 2)
LAYERS = 3
HEAD = """# Coverage

What tensor parallelism splits of the models in `tests/support/zoo.py`: tiny ones of many families,
with random weights. Written by `python docs/make_coverage.py`, for the machine that
`tests/support/quick_links.json` describes, on which a small model is split as a large one is
elsewhere. Where two things stand in a cell, the first is for 8 ranks and the second for 2.

- FLOPs: of matrix products and convolutions, attention included, for the sizes planned for.
- bytes: of parameters of two dims and more.
- collectives: what one more layer adds, forward and backward, counted as they run. AR is an
  all-reduce, AG an all-gather, RS a reduce-scatter, A2A an all-to-all. A layer of T5, BART, Whisper
  and `nn.Transformer` is one of the encoder and one of the decoder, of CLIP one of each tower.
  It is what a model of four layers has more than one of three, or of one more each where these are
  planned in different ways.
- seconds: to trace the smaller model and to plan it for 8 ranks, on one CPU core.
- ops without a rule: those that read tensors and have no rule written by hand. Theirs is found by
  running them on small tensors.

| model | FLOPs split | bytes split | collectives per layer | seconds | ops without a rule |
|---|---|---|---|---|---|
"""
SHORT = {"all_reduce": "AR", "all_gather": "AG", "reduce_scatter": "RS", "all_to_all": "A2A"}


def row(name: str, layers: int = LAYERS) -> tuple[str, dict[str, list[str]]]:
    """The family's line of the table; and by reason, what is left whole on 8 ranks.

    layers: of the smaller one of two models that are compared.
    """
    inputs = zoo.inputs_for(name)
    models = [zoo.build(name, count) for count in (layers, layers + 1)]
    start = time.process_time()
    plans = [planned(models[0], inputs)]
    seconds = time.process_time() - start
    plans.append(planned(models[1], inputs))
    reasons = left_whole(plans[0])
    unknown = {op.target: None for op in plans[0].ops if op.reads and find_rule(op.target) is None}
    cells: list[list[str]] = []
    for world_size in WORLD_SIZES:
        if world_size != WORLD_SIZES[0]:
            plans = [replanned(plan, world_size) for plan in plans]
        counts = [
            Counter(simulate_plan(model, plan, (), inputs).collectives)
            for model, plan in zip(models, plans, strict=True)
        ]
        if any(counts[1][kind] < count for kind, count in counts[0].items()):
            return row(name, layers + 1)
        shares = [plans[0].split_flops, plans[0].split_parameter_bytes]
        cells.append([*map(_percent, shares), _added(*counts)])
    merged = [a if a == b else f"{a}, {b}" for a, b in zip(*cells, strict=True)]
    ops = ", ".join(target.removeprefix("aten.") for target in unknown) or "–"
    return f"| {name} | {' | '.join(merged)} | {seconds:.1f} | {ops} |", reasons


def planned(model: torch.nn.Module, inputs: Any) -> Plan:
    """The plan for the first number of ranks."""
    return autoparallel.make_plan(
        model, WORLD_SIZES[0], example_inputs=inputs, hardware=QUICK_LINKS
    )


def replanned(plan: Plan, world_size: int) -> Plan:
    """The plan of the same graph for another number of ranks."""
    assert plan.captured is not None
    return search(plan.captured, plan.model, Mesh(tp=world_size), plan.options)


def left_whole(plan: Plan) -> dict[str, list[str]]:
    """Matrices and products left whole, by reason; those that differ in an index are one."""
    rows = [(p.path, p.reason) for p in plan.parameters if p.reason and len(p.shape) > 1]
    rows += [(f"{op.where}: {op.target}", op.reason) for op in plan.ops if op.reason]
    found: dict[str, list[str]] = {}
    for folded in fold((path, reason, reason) for path, reason in rows):
        found.setdefault(folded.first, []).append(folded.path)
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".rstrip("0").rstrip(".")


def _added(fewer: Counter[str], more: Counter[str]) -> str:
    added = more.copy()
    added.subtract(fewer)
    parts = [
        f"{number} {SHORT.get(kind, kind)}" for kind, number in sorted(added.items()) if number
    ]
    return " + ".join(parts) or "none"


def written(path: Path) -> dict[str, tuple[str, list[str]]]:
    """The line and the notes of every family in a document; none where there is no document."""
    blocks = re.split(r"\n(?=- |\| |\n|#)", path.read_text() if path.exists() else "")
    lines = {block.split(" | ")[0][2:]: block for block in blocks if block.startswith("| ")}
    notes = [block.strip() for block in blocks if block.startswith("- ")]
    return {
        name: (line, [note for note in notes if note.startswith(f"- {name}:")])
        for name, line in lines.items()
    }


def main(names: Iterable[str]) -> None:
    torch.set_num_threads(1)
    document = ROOT / "docs" / "coverage.md"
    families = written(document)
    for name in names:
        sys.stderr.write(f"{name}\n")
        line, reasons = row(name)
        notes = []
        for reason, what in reasons.items():
            note = f"- {name}: {', '.join(f'`{item}`' for item in what)}: {reason}"
            # A long path is never broken: it would no longer be found by a search.
            wrapped = wrap(note, 100, subsequent_indent="  ", break_long_words=False)
            notes.append("\n".join(wrapped))
        families[name] = line, notes
    known = [families[name] for name in zoo.FAMILIES if name in families]
    text = HEAD + "\n".join(line for line, _ in known) + "\n"
    notes = [note for _, notes in known for note in notes]
    if notes:
        text += "\n## What is left whole on 8 ranks, and why\n\n" + "\n".join(notes) + "\n"
    document.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:] or zoo.FAMILIES)
