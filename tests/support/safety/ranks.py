"""Rows of ranks that differ, fail or are gone: processes that communicate through gloo."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache, partial

from processes import run_processes
from rank_faults import FAILS, launch, said
from unlike_calls import calls, headers_without_hosts

from .registry import row


@cache
def _unlike() -> list[dict[str, str]]:
    return run_processes(calls, 2, 2, timeout_seconds=300.0)


@cache
def _faults() -> dict[str, list[tuple[str, str]]]:
    with tempfile.TemporaryDirectory() as folder:
        before = partial(launch, folder)
        (answers,) = run_processes(said, 1, timeout_seconds=300.0, before=before)
    return dict(answers)


def _differing(what: str, name: str, words: str) -> None:
    """Add the row of a call in which one rank differs. words: of the error, on all ranks."""

    @row(what, share=10**6)
    def differing(draw: random.Random, count: int) -> Counter[str]:
        return Counter("said" if words in said[name] else said[name] or "ran" for said in _unlike())


for what, name, words in (
    ("one rank in eval mode", "modes", "the modes of modules"),
    ("another batch size on one rank", "sizes", "the sizes, types or number of the inputs"),
    ("other numbers in the batch of one rank", "values", "were given different inputs: x"),
    ("one other number in the batch of one rank", "one value", "were given different inputs: x"),
    ("a parameter frozen on one rank", "frozen", "the parameters that are trained"),
    ("another attribute of the model on one rank", "attributes", "the program that fits the call"),
    ("a forward hook on one rank alone", "hooks", "hooks for which it runs as Python"),
    ("gradients off on one rank", "gradients", "whether gradients are recorded"),
):
    _differing(f"{what}, after calls in which all were alike", name, words)


@row("a rank that cannot make a group of hosts beside NCCL: it, and the others", share=10**6)
def hosts(draw: random.Random, count: int) -> Counter[str]:
    """The last rank fails by itself, and then with the others; last, it does not fail."""
    counts: Counter[str] = Counter()
    for alone, together, made in run_processes(headers_without_hosts, 2, 2):
        counts.update(
            "told" if not has and logged else "silent" for has, logged in (alone, together)
        )
        counts["right" if made == (True, []) else "wrong"] += 1
    return counts


def _fault(what: str, name: str, is_told: Callable[[str, str], bool]) -> None:
    """Add the row of a fault of one rank. is_told: by an error, and what is written at the end."""

    @row(what, share=10**6)
    def fault(draw: random.Random, count: int) -> Counter[str]:
        waiting = [said for rank, said in enumerate(_faults()[name]) if rank != FAILS]
        return Counter("said" if is_told(*said) else said[0].splitlines()[0] for said in waiting)


def _gone(text: str, _written: str) -> bool:
    return "2 did not answer" in text.splitlines()[0] and "of ranks 0, 1, 2" in text


_fault(
    "a token out of range in the rows of one rank: what the others say",
    "wrong_token",
    lambda text, _: "rank 2 has failed" in text and "IndexError" in text and "embedding" in text,
)
_fault(
    "an error in the backward pass of one rank: what the others say",
    "failing_hook",
    lambda text, _: "rank 2 has failed" in text and "ValueError: a hook of one rank" in text,
)
_fault("a rank that is gone in the backward pass", "gone", _gone)
_fault(
    "a rank that is gone as a parameter is gathered",
    "gone_from_a_parameter",
    lambda text, _: "2 did not answer" in text and "full_tensor()" in text,
)
_fault(
    "a rank that is gone in a collective of the user's own",
    "gone_from_a_sum",
    lambda _, written: "did not answer" in written and "called at" in written,
)
_fault("an error that all ranks catch, and a rank that is gone later", "caught_alike", _gone)
