"""`autoparallel explain`: why a plan has what it has, and what the alternatives would cost."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoparallel.commands.asked_plan import model_again, read_plan
from autoparallel.commands.command import Command, progress
from autoparallel.errors import PlanError

if TYPE_CHECKING:
    from autoparallel.questions.explanation import Alternative, Explanation

__all__ = ["EXPLAIN"]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `explain`."""
    parser.add_argument("plan", type=Path, help="a file that `autoparallel plan -o` has written")
    parser.add_argument(
        "subject",
        nargs="*",
        help='a parameter or module by its path or the end of it, an op or a value, or "collective '
        'VALUE"; without any, the redistributions that take most of a step',
    )
    parser.add_argument(
        "--why-not",
        action="append",
        default=[],
        metavar="SUBJECT:CHOICE",
        help='an alternative to be told, as "fc1: row": row, column, whole, split, "split 1", or a '
        'placement such as "S(0, blocks=3)", and "on AXIS" behind it; may be given again',
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="under a memory limit, look for the best plan with each alternative, which takes as "
        "long as planning; by default bytes are charged at the price that the limit has",
    )
    parser.add_argument("--json", action="store_true", help="print the explanations as JSON")


def _run(options: argparse.Namespace) -> int:
    """Print the explanations."""
    questions = [(subject, "") for subject in options.subject]
    for text in options.why_not:
        subject, colon, choice = text.rpartition(":")
        if not colon or not subject.strip() or not choice.strip():
            raise PlanError(f"--why-not {text!r} names no choice", fix='say "fc1: row"')
        questions.append((subject.strip(), choice.strip()))
    plan = read_plan(options.plan)
    named = model_again(plan)
    progress("tracing it, and preparing to plan it anew")
    from autoparallel.api import traced_plan
    from autoparallel.questions.explain import Explainer

    plan = traced_plan(named.model, plan, example_inputs=named.inputs)
    if plan.memory_limit is not None and options.search:
        progress("each alternative is searched within the memory limit, which takes a while")
    if not questions:
        dearest = sorted(plan.conversions, key=lambda row: -row.seconds)[:2]
        questions = [(f"collective {row.value}", "") for row in dearest if row.seconds]
    explainer = Explainer(plan)
    answers = [
        explainer.explain(subject, why_not=why_not, search=options.search)
        for subject, why_not in questions
    ]
    if options.json:
        print(json.dumps([_rows(answer) for answer in answers], indent=1))
    else:
        print("\n\n".join(map(str, answers)))
    return 0


def _rows(answer: Explanation) -> dict[str, Any]:
    """Return an explanation as JSON can hold it."""
    return {
        "subject": answer.subject.node,
        "module": answer.subject.module,
        "kind": answer.kind,
        "chosen": answer.chosen,
        "seconds": answer.seconds,
        "seconds_per_byte": answer.price,
        "asked": None if answer.asked is None else _alternative(answer.asked),
        "alternatives": [_alternative(other) for other in answer.alternatives],
    }


def _alternative(other: Alternative) -> dict[str, Any]:
    """Return an alternative as JSON can hold it: an infinite cost, which JSON has not, is null."""
    finite = math.isfinite(other.added_cost)
    return {
        "text": other.text,
        "added_cost": other.added_cost if finite else None,
        "proven": other.proven if math.isfinite(other.proven) else None,
        "added_seconds": other.added_seconds if other.plan is not None else None,
        "excess_bytes": other.excess_nbytes,
        "added_step": other.added_step if math.isfinite(other.added_step) else None,
        "chain": list(other.chain),
        "differences": [
            {
                "kind": row.kind,
                "name": row.name,
                "module": row.where,
                "line": row.line,
                "from": row.first,
                "to": row.second,
                "seconds": row.seconds,
            }
            for row in other.differences
        ],
    }


EXPLAIN = Command(
    "explain",
    "say why a plan has what it has, and what the alternatives would cost",
    (
        'autoparallel explain plan.json --why-not "feed_forward.expand: row"',
        'autoparallel explain plan.json token_embedding.weight "collective layer_norm"',
    ),
    _add_arguments,
    _run,
)
