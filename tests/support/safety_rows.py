"""What was tried with files that come from elsewhere, how often, and what happened."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import custom_ops
import torch
from calls import Call, x
from edited_plans import Edited, Mixed, edit_one
from torch import nn

import autoparallel
from autoparallel.cost.hardware import find_hardware, read_hardware, write_hardware
from autoparallel.discovery import disk_cache, unknown_ops
from autoparallel.errors import AutoParallelError, CheckpointError, PlanError
from autoparallel.mesh import Mesh
from autoparallel.parallel.checkpoint_metadata import METADATA
from autoparallel.rules import registry

__all__ = ["GOOD", "Row", "file_rows", "safety_rows"]

# All that may become of what is tried.
GOOD = frozenset(
    "refused, equal, right, found anew, the same rule, read, the plan of one thread".split(", ")
)


@dataclass(frozen=True)
class Row:
    """A row of the table. what: was tried. counts: how often each thing happened."""

    what: str
    counts: Counter[str]

    @property
    def is_good(self) -> bool:
        """Whether nothing happened but what may."""
        return set(self.counts) <= GOOD


def safety_rows(count: int, seed: int) -> Iterator[Row]:
    """Yield the rows. count: how often each thing is tried, or as often as is quick."""
    draw = random.Random(seed)
    yield from plan_rows(count, draw)
    yield from file_rows(count, draw)


def plan_rows(count: int, draw: random.Random) -> Iterator[Row]:
    """Yield the rows of edited plans."""
    tokens = torch.randint(10, (4, 6), generator=torch.Generator().manual_seed(0))
    for mesh in (Mesh(tp=2), Mesh(dp=2, tp=2)):
        edited = Edited(Mixed().double(), tokens, mesh)
        counts: Counter[str] = Counter()
        for _, text in edited.edits(draw.randrange(2**32), count):
            _count(counts, partial(edited.tried, text))
        yield Row(f"one random edit of a plan's JSON, on {mesh}", counts)


def file_rows(count: int, draw: random.Random) -> Iterator[Row]:
    """Yield the rows of all other files, and of threads."""
    yield Row("one random edit of a file of the rule cache", _rule_cache(draw, count // 20 or 1))
    yield Row("one random edit of a hardware file", _hardware(draw, count))
    for what, change, sealed in (
        ("one bit flipped in a file of a checkpoint", _flip, False),
        ("a file of a checkpoint cut short", _cut, False),
        ("a byte of a checkpoint's table of contents changed, its digest too", _change, True),
    ):
        yield Row(what, _checkpoints(draw, count // 2 or 1, change, sealed))
    yield Row("plans made in three threads at once", _threads(count // 100 or 1))


def _count(counts: Counter[str], work: Callable[[], str]) -> None:
    """Do something, and count what it returns, or the error that is none of the project's."""
    try:
        counts[work()] += 1
    except Exception as error:
        counts[f"{type(error).__name__}: {error}"[:120]] += 1


def _rule_cache(draw: random.Random, count: int) -> Counter[str]:
    """Edit the file of a rule that was found, and let it be looked up."""
    assert custom_ops.GATED is not None  # importing it registers the ops
    call = Call("probed.power_sum.default", (x(4, 5),)).example().call
    counts: Counter[str] = Counter()
    before = os.environ.get("AUTOPARALLEL_CACHE")
    remembered, reasons = dict(registry._REMEMBERED), dict(unknown_ops._REASONS)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["AUTOPARALLEL_CACHE"] = folder

        def words() -> str:
            registry._REMEMBERED.clear()
            unknown_ops._REASONS.clear()
            rule, why = unknown_ops.find_unknown(call)
            return rule.discovered if rule is not None else why

        expected = words()
        (path,) = Path(folder).rglob("*.json")
        whole = path.read_text()

        def tried() -> str:
            rows = json.loads(whole)
            edit_one(rows, draw)
            path.write_text(json.dumps(rows))
            known = disk_cache.load(disk_cache.key_of(call))
            found = words()
            # A rule that says less than the right one is right too: each of its splits is proven.
            if found != expected and known is None:
                return f"another rule: {found}"
            return "found anew" if path.read_text() == whole else "the same rule"

        for _ in range(count):
            _count(counts, tried)
            path.write_text(whole)
        if before is None:
            del os.environ["AUTOPARALLEL_CACHE"]
        else:
            os.environ["AUTOPARALLEL_CACHE"] = before
    registry._REMEMBERED.clear()
    registry._REMEMBERED.update(remembered)
    unknown_ops._REASONS.clear()
    unknown_ops._REASONS.update(reasons)
    return counts


def _hardware(draw: random.Random, count: int) -> Counter[str]:
    """Edit a description of hardware, and let it be read."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "own.json"
        write_hardware(find_hardware("dgx-a100"), path)
        whole = path.read_text()

        def tried() -> str:
            rows = json.loads(whole)
            edit_one(rows, draw)
            path.write_text(json.dumps(rows))
            try:
                read_hardware(path).at_pace_of(8).links((2, 4))
            except PlanError:
                return "refused"
            return "read"

        for _ in range(count):
            _count(counts, tried)
    return counts


def _flip(content: bytearray, draw: random.Random) -> bytearray:
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return content


def _cut(content: bytearray, draw: random.Random) -> bytearray:
    return content[: draw.randrange(len(content))]


def _change(content: bytearray, draw: random.Random) -> bytearray:
    content[draw.randrange(len(content))] = draw.randrange(256)
    return content


def _checkpoints(
    draw: random.Random,
    count: int,
    change: Callable[[bytearray, random.Random], bytearray],
    sealed: bool,
) -> Counter[str]:
    """Change a file of a checkpoint, and let it be loaded.

    sealed: the table of contents is changed, and the digests are made to fit.
    """
    counts: Counter[str] = Counter()
    torch.manual_seed(0)
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    with tempfile.TemporaryDirectory() as root:
        original, folder = Path(root) / "original", Path(root) / "changed"
        autoparallel.save_checkpoint(original, model, extra={"step": 3, "loss": [0.5, 0.25]})
        names = sorted(path.name for path in original.iterdir())

        def tried() -> str:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(original, folder)
            path = folder / (METADATA if sealed else draw.choice(names))
            content = path.read_bytes()
            changed = bytes(change(bytearray(content), draw))
            path.write_bytes(changed)
            if sealed:
                digests = json.loads((folder / "digests.json").read_text())
                digests[METADATA] = hashlib.sha256(changed).hexdigest()
                (folder / "digests.json").write_text(json.dumps(digests))
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    autoparallel.load_checkpoint(folder, other)
            except (CheckpointError, AutoParallelError):
                return "refused"
            return "equal" if changed == content else "read"

        for _ in range(count):
            _count(counts, tried)
    return counts


def _threads(count: int) -> Counter[str]:
    """Plan in three threads, and compare with the plan of one."""
    counts: Counter[str] = Counter()
    tokens = torch.zeros(2, 3, dtype=torch.long)

    def plan(model: nn.Module) -> str:
        return autoparallel.make_plan(model, 2, example_inputs=tokens).to_json()

    alone = plan(Mixed())

    def tried(model: nn.Module) -> str:
        return "the plan of one thread" if plan(model) == alone else "another plan"

    for _ in range(count):
        # They are made before: torch's generator, which that seeds, belongs to all threads.
        models = [Mixed() for _ in range(3)]
        threads = [
            threading.Thread(target=_count, args=(counts, partial(tried, model)))
            for model in models
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return counts
