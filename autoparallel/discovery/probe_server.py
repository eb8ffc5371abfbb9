"""The process in which ops are probed: it knows torch and this project, and nothing of the user's.

It is started by `probe_processes`, once for many probes. Each probe runs in a fork of it, so that
an op that corrupts memory or hangs harms neither the user's process nor the next probe.
"""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from autoparallel.discovery.discover import ProbeError, confirmed, discover
from autoparallel.discovery.discovered_rule import DiscoveredRule
from autoparallel.discovery.forked_run import Limits, ProcessEndedError, run_in_fork
from autoparallel.graph.operators import operator_of
from autoparallel.rules.rule import OpCall

__all__ = ["IDLE_SECONDS", "answer", "carefully", "serve"]

# A server that nobody asks any more ends, and one is started again when it is needed.
IDLE_SECONDS = 60.0


def answer(call: OpCall, stored: DiscoveredRule | None, careful: bool = False) -> dict[str, Any]:
    """Return the rule of a call as JSON, or the reason why it has none.

    stored: a rule that was found before, which is confirmed first. careful: see `discover`. The
    keys are "confirmed" (True where it was), "rule", and "refused": the rest of a sentence that
    starts with the op; then "unforeseen" says that it did not refuse by itself.

    Example: `DiscoveredRule.from_json(answer(call, None)["rule"])`.
    """
    with warnings.catch_warnings():
        # Probing with unusual numbers may warn of what the user's model never does.
        warnings.simplefilter("ignore")
        try:
            if stored is not None and confirmed(stored, call, careful):
                return {"confirmed": True}
            return {"rule": discover(call, careful).to_json()}
        except ProbeError as error:
            return {"refused": str(error)}
        except (
            Exception
        ) as error:  # ops may fail in any way when they are judged: the plan says how
            why = f"cannot be probed: {type(error).__name__}: {error}"
            return {"refused": why, "unforeseen": True}


def carefully(work: Callable[[bool], bytes], limits: Limits) -> bytes:
    """Return what `work(False)` returns in a fork of this process.

    Where it crashes, return what `work(True)` does: it is to try in forks of its own whatever the
    op may not survive, so that its other loops can still be split. Raises ProcessEndedError.
    """
    try:
        return run_in_fork(lambda: work(False), limits)
    except ProcessEndedError as error:
        if not error.crashed:
            raise
        return run_in_fork(lambda: work(True), limits)


def _answered(request: bytes, careful: bool) -> bytes:
    """Return the answer to one request, in the fork that is made for it."""
    call, stored, libraries = pickle.loads(request)
    for path in libraries:
        torch.ops.load_library(path)
    if operator_of(call.node.target) is None:
        return json.dumps({"unknown": True}).encode()
    reply = answer(call, stored, careful)
    if reply.pop("unforeseen", False) and not careful:
        # An op that writes where it must not may break anything but the process: it is no better
        # than one that crashes.
        os.abort()
    return json.dumps(reply).encode()


def serve(handle: int, limits: Limits) -> None:
    """Answer requests that come by a pipe until it is closed, or none has come for a while.

    handle: of the pipe; what comes is pickled by the process that started this one, and what goes
    back is JSON, because an op may have written anywhere. limits: of one probe.
    """
    connection = Connection(handle)
    while connection.poll(IDLE_SECONDS):
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        try:
            reply = carefully(partial(_answered, request), limits)
        except ProcessEndedError as error:
            reply = json.dumps({"ended": str(error)}).encode()
        connection.send_bytes(reply)
