"""Discovered rules on disk: found again, proven again, and none at all where they are broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import custom_ops
import pytest
from broad_cases import share_of
from calls import Call, x

from autoparallel.discovery import unknown_ops as unknown
from autoparallel.discovery.discover import discover
from autoparallel.discovery.discovered_rule import DiscoveredRule
from autoparallel.discovery.disk_cache import (
    key_of,
    load,
    load_refusal,
    store,
    store_refusal,
)
from autoparallel.discovery.probe_processes import rule_of
from autoparallel.rules import registry
from autoparallel.rules.rule import OpCall
from autoparallel.support.cache_files import default_cache_folder

GATED = "a b (c d) -> a b d; c whole"
assert custom_ops.GATED is not None  # importing it registers the ops


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for the files; nothing is remembered in this process."""
    monkeypatch.setenv("AUTOPARALLEL_CACHE", str(tmp_path / "moved"))
    monkeypatch.setattr(registry, "_REMEMBERED", {})
    monkeypatch.setattr(unknown, "_REASONS", {})
    return tmp_path / "moved"


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that were probed, as they are."""
    seen: list[str] = []

    def counted(call: OpCall, stored: DiscoveredRule | None) -> tuple[DiscoveredRule, str]:
        rule, remark = rule_of(call, stored)
        if rule != stored:
            seen.append(call.node.target)
        return rule, remark

    monkeypatch.setattr(unknown, "rule_of", counted)
    return seen


def gated(*shape: int) -> OpCall:
    return Call("probed.gated.default", (x(*shape),)).example().call


def words(call: OpCall) -> str:
    """The rule, as a new process would find it."""
    registry._REMEMBERED.clear()
    rule, why = unknown.find_unknown(call)
    assert rule is not None, why
    return rule.discovered


def files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


def test_an_op_is_probed_once_for_all_sizes_of_a_pattern(cache: Path, probes: list[str]) -> None:
    """Other sizes that are related in the same way need no second look; another relation does."""
    assert words(gated(4, 5, 14)) == GATED
    assert len(probes) == 1
    assert len(files(cache)) == 1
    assert words(gated(4, 5, 14)) == words(gated(6, 7, 22)) == GATED
    assert len(probes) == 1
    assert words(gated(4, 7, 8)) == GATED
    assert len(probes) == 2


def test_the_key_is_of_the_op_and_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The version of torch, numbers that are no sizes, gradients, and the op's own source."""
    plain = gated(4, 5, 14)
    other = Call("probed.magnitude.default", (x(4, 5, 14),)).example().call
    fixed = Call("probed.gated.default", (x(4, 5, 14).detach(),)).example().call
    keys = {key_of(plain), key_of(other), key_of(fixed)}
    monkeypatch.setattr("torch.__version__", "0.0")
    keys.add(key_of(plain))
    monkeypatch.undo()
    monkeypatch.setattr("autoparallel.discovery.disk_cache._text", lambda function: "changed")
    keys.add(key_of(plain))
    assert len(keys) == 5


@pytest.mark.parametrize(
    "text", share_of(["", "{", "[]", '{"key": 1}', "{}\n" * 3, "[" * 10**6], 2)
)
def test_a_broken_file_is_as_good_as_none(text: str, cache: Path, probes: list[str]) -> None:
    """It is written anew, whole."""
    words(gated(4, 5, 14))
    (path,) = files(cache)
    whole = path.read_text()
    path.write_text(text)
    assert words(gated(4, 5, 14)) == GATED
    assert len(probes) == 2
    assert path.read_text() == whole


def test_a_stored_rule_that_is_wrong_is_not_believed(cache: Path, probes: list[str]) -> None:
    """What is on disk saves the search, not the proof."""
    call = gated(4, 5, 14)
    words(call)
    (path,) = files(cache)
    rows = json.loads(path.read_text())
    rows["found"]["linear"] = [[0]]
    path.write_text(json.dumps(rows))
    assert words(call) == GATED
    assert len(probes) == 2
    rows["found"]["linear"] = []
    assert json.loads(path.read_text()) == rows


def edited(found: dict[str, Any], path: str, value: Any) -> None:
    """Put a value in the place of another; a path ends with the name or number of the place."""
    *groups, last = [int(part) if part.isdecimal() else part for part in path.split("/")]
    place: Any = found
    for part in groups:
        place = place[part]
    place[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    share_of(
        [
            ("kernels/l1/0", "combined_parts(*[print('run')]) or kernels.combined_parts"),
            ("kernels/l1/0", "__builtins__"),
            ("kernels/l1/0", "stand_ins_for"),
            ("kernels/l1/0", "embedding_rows"),
            ("kernels/l1/2/0/0", "where=None, other=print('run'), more"),
            ("kernels/l1/2/0/0", "operation"),
            ("kernels/l1/2/0/1", {"a": "table"}),
            ("kernels/l1/1", "S(0, blocks=0)"),
            ("dtype", "load"),
            ("dtype", 3),
            ("values/1", 0.2),  # equal numbers prove any rule
            ("values/1", 1e999),
            ("pattern/0/0/0/0", 10**30),
            ("pattern/0/0/0/1/0", -1),
            ("operands", 5),
            ("results", [[[[]]]]),
            ("loops", []),
            ("linear", [[99]]),
        ],
        3,
    ),
)
def test_a_stored_rule_names_known_kernels_only(
    path: str, value: Any, cache: Path, probes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Names reach the text of a program, which runs as the rule is proven."""
    call = Call("probed.power_sum.default", (x(4, 5),)).example().call
    expected = words(call)
    (file,) = files(cache)
    whole = file.read_text()
    rows = json.loads(whole)
    edited(rows["found"], path, value)
    file.write_text(json.dumps(rows))
    assert load(key_of(call)) is None or path == "linear"
    assert words(call) == expected
    assert len(probes) == 2
    assert file.read_text() == whole
    assert "run" not in capsys.readouterr().out


def test_a_rule_survives_the_way_to_disk_and_back(cache: Path) -> None:
    """Every field, of a rule with integers that follow and of one with a kernel."""
    samples = [
        Call("probed.head_norm.default", (x(4, 5, 12), x(12), 3)),
        Call("probed.power_sum.default", (x(4, 5),)),
    ]
    for sample in samples:
        call = sample.example().call
        found = discover(call)
        store(key_of(call), found)
        assert load(key_of(call)) == found


def test_where_the_files_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The program's own variable, then the desktop's, then the home; none of them has to exist."""
    monkeypatch.setenv("AUTOPARALLEL_CACHE", "/moved")
    monkeypatch.setenv("XDG_CACHE_HOME", "/desktop")
    assert default_cache_folder() == Path("/moved")
    monkeypatch.delenv("AUTOPARALLEL_CACHE")
    assert default_cache_folder() == Path("/desktop/autoparallel")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_folder() == Path.home() / ".cache" / "autoparallel"
    # A user without a home, as containers run programs, has no files, and is not stopped.
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("no home")))
    with pytest.raises(FileNotFoundError, match="set AUTOPARALLEL_CACHE"):
        default_cache_folder()
    store_refusal("[1]", "some words", False)
    assert load("[1]") is None
    assert load_refusal("[1]") is None
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("AUTOPARALLEL_CACHE", str(blocked))
    call = gated(4, 5, 14)
    store(key_of(call), discover(call))
    assert load(key_of(call)) is None
    assert blocked.read_text() == ""
