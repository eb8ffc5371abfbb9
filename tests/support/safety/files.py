"""Rows of files that come from elsewhere: of the rule cache, of hardware, and checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import custom_ops
import torch
from calls import Call, x
from edited_plans import edit_one
from torch import nn

import autoparallel
from autoparallel.cost.hardware import find_hardware, read_hardware, write_hardware
from autoparallel.discovery import disk_cache, unknown_ops
from autoparallel.errors import AutoParallelError, CheckpointError, PlanError
from autoparallel.parallel.checkpoint_metadata import METADATA
from autoparallel.rules import registry

from .registry import note, row


def _rule_cache(edits: Iterable[Callable[[bytes], bytes] | bytes]) -> Counter[str]:
    """Edit the file of a rule that was found, or put other text there, and let it be looked up."""
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
        whole = path.read_bytes()

        def tried(edit: Callable[[bytes], bytes] | bytes) -> str:
            path.write_bytes(edit if isinstance(edit, bytes) else edit(whole))
            known = disk_cache.load(disk_cache.key_of(call))
            found = words()
            # A rule that says less than the right one is right too: each of its splits is proven.
            if found != expected and known is None:
                return f"another rule: {found}"
            return "found anew" if path.read_bytes() == whole else "the same rule"

        for edit in edits:
            note(counts, partial(tried, edit))
            path.write_bytes(whole)
        if before is None:
            del os.environ["AUTOPARALLEL_CACHE"]
        else:
            os.environ["AUTOPARALLEL_CACHE"] = before
    registry._REMEMBERED.clear()
    registry._REMEMBERED.update(remembered)
    unknown_ops._REASONS.clear()
    unknown_ops._REASONS.update(reasons)
    return counts


@row("one random edit of a file of the rule cache", share=20)
def rule_cache(draw: random.Random, count: int) -> Counter[str]:
    def edited(whole: bytes) -> bytes:
        rows = json.loads(whole)
        edit_one(rows, draw)
        return json.dumps(rows).encode()

    return _rule_cache([edited] * count)


@row("one random edit of a hardware file")
def hardware(draw: random.Random, count: int) -> Counter[str]:
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
            note(counts, tried)
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
            note(counts, tried)
    return counts


@row("one bit flipped in a file of a checkpoint", share=2)
def flipped(draw: random.Random, count: int) -> Counter[str]:
    return _checkpoints(draw, count, _flip, False)


@row("a file of a checkpoint cut short", share=2)
def cut(draw: random.Random, count: int) -> Counter[str]:
    return _checkpoints(draw, count, _cut, False)


@row("a byte of a checkpoint's table of contents changed, its digest too", share=2)
def sealed(draw: random.Random, count: int) -> Counter[str]:
    return _checkpoints(draw, count, _change, True)


class _Runs:
    """It makes a folder when it is read by a pickle, and harms nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@row("a table of contents that would call a function as it is read, its digest made to fit")
def runs(draw: random.Random, count: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as root:
        folder, made = Path(root) / "saved", Path(root) / "made"
        autoparallel.save_checkpoint(folder, nn.Linear(3, 2))

        def tried(protocol: int) -> str:
            text = pickle.dumps(_Runs(made), protocol)
            (folder / METADATA).write_bytes(text)
            digests = json.loads((folder / "digests.json").read_text())
            digests[METADATA] = hashlib.sha256(text).hexdigest()
            (folder / "digests.json").write_text(json.dumps(digests))
            try:
                autoparallel.load_checkpoint(folder, nn.Linear(3, 2))
            except AutoParallelError:
                return "it ran" if made.exists() else "refused"
            return "read as a table"

        for protocol in range(6):
            note(counts, partial(tried, protocol))
    return counts


@row("objects that are no numbers, texts or tensors, as `extra` of a checkpoint")
def extras(draw: random.Random, count: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    items = (len, nn.Linear, nn.Linear(2, 2), {1, 2}, object(), random, draw, 1j, b"bytes")
    with tempfile.TemporaryDirectory() as root:

        def tried(number: int) -> str:
            folder = Path(root) / str(number)
            try:
                autoparallel.save_checkpoint(folder, nn.Linear(2, 2), extra={"mine": items[number]})
            except AutoParallelError:
                return "left behind" if folder.exists() else "refused"
            return "saved"

        for number in range(len(items)):
            note(counts, partial(tried, number))
    return counts


@row("an empty folder, a file, foreign files or nothing, loaded as a checkpoint")
def no_checkpoints(draw: random.Random, count: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as root:
        empty, foreign, file = (Path(root) / name for name in ("empty", "foreign", "file"))
        empty.mkdir()
        foreign.mkdir()
        (foreign / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        file.write_text("precious")

        def tried(path: Path) -> str:
            try:
                autoparallel.load_checkpoint(path, nn.Linear(2, 2))
            except AutoParallelError:
                return "refused" if file.read_text() == "precious" else "written to"
            return "loaded"

        for path in (empty, foreign, file, Path(root) / "missing"):
            note(counts, partial(tried, path))
    return counts


@row("a checkpoint of wider numbers, loaded into a narrower model")
def narrower(draw: random.Random, count: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    kinds = (torch.float64, torch.float32, torch.float16)
    with tempfile.TemporaryDirectory() as root:

        def tried(wide: torch.dtype, narrow: torch.dtype) -> str:
            folder = Path(root) / f"{wide} {narrow}"
            model, other = nn.Linear(3, 2).to(wide), nn.Linear(3, 2).to(narrow)
            autoparallel.save_checkpoint(folder, model)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                autoparallel.load_checkpoint(folder, other)
            same = torch.equal(other.weight, model.weight.to(narrow))
            return "told" if same and any("weight" in str(w.message) for w in caught) else "silent"

        for place, wide in enumerate(kinds):
            for narrow in kinds[place + 1 :]:
                note(counts, partial(tried, wide, narrow))
    return counts


@row("a file of the rule cache that is empty, nested without end, or no text at all")
def unreadable_rules(draw: random.Random, count: int) -> Counter[str]:
    texts = (b"", b"[" * 10**6, b"\xff\xfe", b"null", b"{}", b"[]", b'{"a":' * 10**5)
    return _rule_cache(list(texts))
