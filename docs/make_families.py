"""Write docs/families.md: families beyond the zoo, how far they are split, and how exactly.

python docs/make_families.py [--missing] [family ...]; without names, all of them. Takes two hours
of one core. Those that are not named keep the line that they have, and each line is written as soon
as it is known, so that `--missing`, which takes those without a line alone, goes on where a run
has ended. Families of a library that is not installed keep their line, or have one that says so.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import family_checks as checks  # noqa: E402
import more_families  # noqa: E402

from autoparallel.plan import Plan  # noqa: E402

WORLD_SIZES = (2, 3)
# An error as a line has it.
_FIGURE = re.compile(r"(?:\d+e[+-]\d+|inf|nan)")
# A family whose error is larger is counted as wrong.
TOLERANCE = 1e-9
HEAD = """# More families

Tiny models with random weights of the families in `tests/support/more_families.py`, none of which
is in the zoo that the rules were written with ([coverage.md](coverage.md)): one step of training in
float64, without dropout, on 2 and on 3 simulated ranks, against the unsplit module, and against
ours on one rank where a model draws random numbers all the same (ViLT, PhiMoE). Written by
`make families`; `make broad` also has each on a mesh of two axes. Where two things stand in a cell,
the first is for 2 ranks and the second for 3.

- weights: bytes of parameters of two dims and more that are split. FLOPs: of matrix products and
  convolutions.
- breaks: modules that stay the user's Python, for the reason that is given for the first. Modules
  inside of them are traced and split one by one.
- loss, gradients: the largest relative error; that of outputs and of buffers that the step writes
  is not larger unless it is named.
- seconds: to trace and to plan it for 2 ranks, on one CPU core. Equal modules are tried once.

What breaks are left, by what makes them:

- How many rows there are follows from values: patches that are drawn among those of a mask (vilt).
  What can be prepared outside of the model is better there.
- A library makes a mask in a trace, and none in a call, and its model cannot take it (autoformer).
- The forward reads the sizes of images out of a tensor, others in each batch (qwen2-vl).
- The forward registers a buffer in its first call (x-alibi): call it once before it is split.
- An autograd Function runs modules (reformer) or numpy (ibert) in its passes.

"""
TABLE = """| family | kind | library | weights % | FLOPs % | breaks | loss | gradients | seconds |
|---|---|---|---|---|---|---|---|---|
"""


DOCUMENT = ROOT / "docs" / "families.md"
FAILED = "failed"


@dataclass(frozen=True)
class Row:
    """One family's line. verdict: "right", "wrong", "failed" or "not installed"."""

    text: str
    verdict: str

    @staticmethod
    def read(text: str) -> Row:
        """Return the row of a line as it is in the document, with the verdict that it shows."""
        cells = [cell.strip() for cell in text.replace("\\|", "").strip("|").split("|")]
        if not cells[3]:
            return Row(text, "not installed" if cells[5] == "not installed" else FAILED)
        figures = [float(item) for item in _FIGURE.findall(" ".join(cells[6:8]))]
        right = all(figure < TOLERANCE for figure in figures)
        return Row(text, "right" if right and figures else "wrong")


def row(name: str) -> Row:
    """Plan and run the family, and say how it went."""
    family = more_families.FAMILIES[name]
    begin = f"| {name} | {family.kind} | {family.library} "
    if not more_families.is_installed(family.library):
        return Row(begin + "| | | not installed | | | |", "not installed")
    try:
        expected = checks.unsplit(name)
        plans, errors = [], []
        start = time.process_time()
        whole = checks.traced(name).captured is not None
        # A model that is traced in parts is traced anew for each number of ranks.
        start = start if whole else time.process_time()
        seconds = 0.0
        for world_size in WORLD_SIZES:
            plans.append(checks.plan_for(name, world_size))
            seconds = seconds or time.process_time() - start
            step, apart = checks.simulated(name, plans[-1])
            errors.append((checks.errors_of(step, expected), apart))
    except Exception as error:
        what = f"{type(error).__name__}: {str(error).splitlines()[0]}".replace("|", "\\|")
        return Row(begin + f"| | | {what} | | | |", FAILED)
    finally:
        checks.traced.cache_clear()
    right = all(error.worst < TOLERANCE and apart < TOLERANCE for error, apart in errors)
    cells = [
        _both(f"{100 * plan.split_parameter_bytes:.0f}" for plan in plans),
        _both(f"{100 * plan.split_flops:.0f}" for plan in plans),
        _breaks(plans[0]),
        _both(f"{error.loss:.0e}" for error, _ in errors),
        _both(_gradients(error) for error, _ in errors),
        f"{seconds:.1f}",
    ]
    return Row(f"{begin}| {' | '.join(cells)} |", "right" if right else "wrong")


def _both(texts: Iterable[str]) -> str:
    """The text for 2 ranks and that for 3, or the one where they are the same."""
    return ", ".join(dict.fromkeys(texts))


def _breaks(plan: Plan) -> str:
    if not plan.breaks:
        return "–"
    reason = plan.breaks[0].reason.partition(":")[0].replace("|", "\\|")
    return f"{len(plan.breaks)}: {reason}"


def _gradients(errors: checks.Errors) -> str:
    text = f"{errors.gradients:.0e}"
    for name in ("outputs", "buffers"):
        error = getattr(errors, name)
        if not error < TOLERANCE:
            text += f" ({name} {error:.0e})"
    return text if errors.gradients < TOLERANCE else f"{text} at `{errors.where}`"


def page(rows: Sequence[Row]) -> str:
    """The whole page."""
    counts = Counter(row.verdict for row in rows)
    total = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    libraries = sorted({family.library for family in more_families.FAMILIES.values()})
    versions = ", ".join(
        f"{library} {importlib.metadata.version(library).partition('+')[0]}"
        for library in libraries
        if more_families.is_installed(library)
    )
    table = "\n".join(row.text for row in rows)
    versions = textwrap.fill(f"Versions: {versions}.", 100)
    return f"{HEAD}{len(rows)} families: {total}.\n{versions}\n\n{TABLE}{table}\n"


def written() -> dict[str, Row]:
    """Return the lines that the document has, by the names of their families."""
    lines = DOCUMENT.read_text().partition(TABLE)[2].splitlines()
    rows = {line.split("|")[1].strip(): Row.read(line) for line in lines}
    return {name: row for name, row in rows.items() if name in more_families.FAMILIES}


def main(words: Sequence[str]) -> None:
    """Write the lines of families, and leave the others as they are. words: of the command line."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the libraries' own
    rows = written()
    names = [word for word in words if word != "--missing"] or list(more_families.FAMILIES)
    for name in names:
        if "--missing" in words and name in rows:
            continue
        made = row(name)
        if made.verdict != "not installed" or name not in rows:
            rows[name] = made
        sys.stderr.write(f"{made.verdict:14} {made.text}\n")
        DOCUMENT.write_text(
            page([rows[known] for known in more_families.FAMILIES if known in rows])
        )


if __name__ == "__main__":
    main(sys.argv[1:])
