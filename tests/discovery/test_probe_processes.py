"""Ops are probed where they can harm nothing: one that crashes or hangs is left whole, in words."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from calls import Call, fixed, x

import autoparallel
from autoparallel.discovery import probe_processes, unknown_ops
from autoparallel.discovery.disk_cache import load_refusal, refusal_key
from autoparallel.discovery.forked_run import Limits, ProcessEndedError, run_in_fork
from autoparallel.discovery.registered_rules import why_unproven
from autoparallel.rules import registry, user_rules
from autoparallel.rules.rule import OpCall, ShardingRule

HOME = os.getpid()
CALLS: list[int] = []


@pytest.fixture
def _forks() -> None:
    """Leave out what forks this process where autograd has started threads for devices in it."""
    unfit = probe_processes.in_fork(lambda _: b"")[1]
    if unfit and torch.version.cuda is not None:
        pytest.skip(f"a build with CUDA, and {unfit}")


@torch.library.custom_op("harmful::crash", mutates_args=())
def crash(x: torch.Tensor) -> torch.Tensor:
    """Fail as native code does, elsewhere than in the process of the tests."""
    if os.getpid() != HOME:
        os.abort()
    return x * 2


@torch.library.custom_op("harmful::hang", mutates_args=())
def hang(x: torch.Tensor) -> torch.Tensor:
    """Never end, elsewhere than in the process of the tests."""
    while os.getpid() != HOME:
        time.sleep(60)
    return x * 2


@torch.library.custom_op("harmful::counted", mutates_args=())
def counted(x: torch.Tensor) -> torch.Tensor:
    """Change something of the user's when it runs."""
    CALLS.append(os.getpid())
    return x * 2


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of any op."""
    monkeypatch.setenv("AUTOPARALLEL_CACHE", str(tmp_path))
    monkeypatch.setattr(registry, "_REMEMBERED", {})
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    monkeypatch.setattr(user_rules, "_WRITTEN_AT", {})
    monkeypatch.setattr(user_rules, "_TO_PROVE", set())
    monkeypatch.setattr(unknown_ops, "_REASONS", {})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[probe_processes._Server]:
    """A server of its own, which has not been started."""
    server = probe_processes._Server(Limits())
    monkeypatch.setattr(probe_processes, "_SERVER", server)
    yield server
    server.stop()


def call_of(target: str, *args: object) -> OpCall:
    return Call(target, args).example().call


def rule_of(call: OpCall) -> ShardingRule:
    rule, why = unknown_ops.find_unknown(call)
    assert rule is not None, why
    return rule


def assert_whole(rule: ShardingRule, why: str) -> None:
    assert rule.whole == set(rule.loops)
    assert rule.linear == ()
    assert not rule.replicates
    assert all(why in reason for reason in rule.reasons.values())


def pooled_backward() -> OpCall:
    """A call of an op of torch that writes where its operand of places says, whatever it says."""
    image = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    pooled, places = torch.nn.functional.max_pool2d(image, 2, return_indices=True)
    sizes = ((2, 2), (2, 2), (0, 0), (1, 1))
    return call_of(
        "aten.max_pool2d_with_indices_backward.default", pooled, image, *sizes, False, places
    )


def test_an_op_of_torch_that_crashes_keeps_whole_what_it_crashes_on(
    server: probe_processes._Server,
) -> None:
    """Its other loops are split; the next op is probed by the same server."""
    rule = rule_of(pooled_backward())
    assert rule.discovered.startswith("a b c d, a b")
    assert not {"l0", "l1"} & rule.whole
    assert {"l2", "l3"} <= rule.whole
    process = server.process
    assert process is not None
    found = rule_of(call_of("aten.histc.default", x(4, 5), 10))
    assert found.discovered == "a b -> c; a b c whole"
    assert server.process is process
    # What is harmless needs no process the second time.
    server.stop()
    registry._REMEMBERED.clear()
    assert rule_of(call_of("aten.histc.default", x(4, 5), 10)) == found
    assert server.process is None


def test_an_end_is_remembered_on_disk(server: probe_processes._Server) -> None:
    """The op is not tried again. A server that has ended is started again."""
    server.limits = Limits(wall_seconds=0.0)
    call = call_of("aten.histc.default", x(4, 5), 10)
    why = "the op did not end within 0 s"
    assert_whole(rule_of(call), why)
    stored = load_refusal(refusal_key(call))
    assert stored is not None
    assert stored[1]
    process = server.process
    assert process is not None
    process.kill()
    process.wait()
    registry._REMEMBERED.clear()
    assert_whole(rule_of(call), why)
    assert server.process is process
    assert_whole(rule_of(call_of("aten.histc.default", x(4, 5, 6), 10)), why)
    assert server.process is not process


def test_a_server_that_cannot_start_is_said(
    server: probe_processes._Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The op stays whole now, and nothing is remembered for later."""
    monkeypatch.setattr("sys.executable", "/no/such/python")
    call = call_of("aten.histc.default", x(4, 5), 10)
    assert_whole(rule_of(call), "the op could not be tried: no process starts")
    assert load_refusal(refusal_key(call)) is None
    monkeypatch.undo()


@pytest.mark.usefixtures("_forks")
def test_a_users_op_that_crashes_is_left_whole() -> None:
    """It is known in this process alone, of which a fork crashes."""
    assert_whole(
        rule_of(call_of("harmful.crash.default", fixed(4, 5))), "the op crashed with SIGABRT"
    )


@pytest.mark.usefixtures("_forks")
def test_a_users_op_that_hangs_is_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for without end."""
    monkeypatch.setattr(probe_processes, "Limits", lambda: Limits(wall_seconds=0.5))
    rule = rule_of(call_of("harmful.hang.default", fixed(4, 5)))
    assert_whole(rule, "the op did not end within 0.5 s")


@pytest.mark.usefixtures("_forks")
def test_probing_changes_nothing_of_the_users() -> None:
    """What a Python op does besides is done in the fork."""
    call = call_of("harmful.counted.default", fixed(4, 5))
    CALLS.clear()
    assert rule_of(call).discovered.startswith("a b -> a b")
    assert CALLS == []


def test_once_cuda_is_in_use_an_op_is_tried_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process with a device cannot be forked: the plan says where the op was tried."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    CALLS.clear()
    rule = rule_of(call_of("harmful.counted.default", fixed(4, 5)))
    assert "tried in this process, which cannot be forked: CUDA is in use" in rule.discovered
    assert HOME in CALLS


def test_a_fork_that_cannot_differentiate_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd's threads for devices do not survive a fork, which its first backward says."""

    def backward(tensor: torch.Tensor) -> None:
        if os.getpid() != HOME:
            raise RuntimeError("autograd cannot be forked")

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    CALLS.clear()
    rule = rule_of(call_of("harmful.counted.default", fixed(4, 5)))
    assert "cannot be forked: autograd cannot be forked" in rule.discovered
    assert HOME in CALLS


def test_work_without_end_is_ended_by_its_own_time() -> None:
    """However many others the machine works for."""

    def work() -> bytes:
        while True:
            pass

    with pytest.raises(ProcessEndedError, match="within 1 s of processor time"):
        run_in_fork(work, Limits(processor_seconds=1))


def test_an_error_of_the_work_is_an_end() -> None:
    """Its process has no answer."""
    with pytest.raises(ProcessEndedError, match="exit code 1"):
        run_in_fork(lambda: bytes(1 // 0), Limits())


def test_an_error_in_a_fork_is_raised_here() -> None:
    """With its own type and words."""
    with pytest.raises(ZeroDivisionError):
        probe_processes.in_fork(lambda _: bytes(1 // 0))


@pytest.mark.usefixtures("_forks")
def test_a_registered_rule_is_proven_elsewhere_too() -> None:
    """An op that crashes on the parts that a user's rule gives it does not end the process."""
    call = call_of("harmful.crash.default", fixed(4, 5))
    autoparallel.register_rule("harmful.crash.default")(
        lambda call: ShardingRule.parse("a b -> a b", call)
    )
    assert "the op crashed with SIGABRT" in why_unproven(call)
