"""The process in which ops are probed: it knows torch and this project, and nothing of the user's.

It is started by `probe_processes`, once for many probes. Each probe runs in a fork of it, so that
an op that corrupts memory or hangs harms neither the user's process nor the next probe.
"""

from __future__ import annotations

import json
import pickle
import warnings
from multiprocessing.connection import Connection
from typing import Any

import torch

from autoparallel.discovery.discover import ProbeError, confirmed, discover
from autoparallel.discovery.discovered_rule import DiscoveredRule
from autoparallel.discovery.forked_run import Limits, ProcessEndedError, run_in_fork
from autoparallel.graph.operators import operator_of
from autoparallel.rules.rule import OpCall

__all__ = ["IDLE_SECONDS", "answer", "serve"]

# A server that nobody asks any more ends, and one is started again when it is needed.
IDLE_SECONDS = 60.0


def answer(call: OpCall, stored: DiscoveredRule | None) -> dict[str, Any]:
    """Return the rule of a call as JSON, or the reason why it has none.

    stored: a rule that was found before, which is confirmed first. The keys are "confirmed" (True
    where it was), "rule", and "refused": the rest of a sentence that starts with the op.

    Example: `DiscoveredRule.from_json(answer(call, None)["rule"])`.
    """
    with warnings.catch_warnings():
        # Probing with unusual numbers may warn of what the user's model never does.
        warnings.simplefilter("ignore")
        try:
            if stored is not None and confirmed(stored, call):
                return {"confirmed": True}
            return {"rule": discover(call).to_json()}
        except ProbeError as error:
            return {"refused": str(error)}
        except (
            Exception
        ) as error:  # ops may fail in any way when they are judged: the plan says how
            return {"refused": f"cannot be probed: {type(error).__name__}: {error}"}


def _answered(request: bytes) -> bytes:
    """Return the answer to one request, in the fork that is made for it."""
    call, stored, libraries = pickle.loads(request)
    for path in libraries:
        torch.ops.load_library(path)
    if operator_of(call.node.target) is None:
        return json.dumps({"unknown": True}).encode()
    return json.dumps(answer(call, stored)).encode()


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
            reply = run_in_fork(lambda request=request: _answered(request), limits)  # type: ignore[misc]
        except ProcessEndedError as error:
            reply = json.dumps({"ended": str(error)}).encode()
        connection.send_bytes(reply)
