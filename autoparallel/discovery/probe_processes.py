"""Processes in which ops are probed: never the user's own, if that can be.

Native code that trusts its numbers (places, pivots, offsets) may write anywhere when it is run on a
part of its operands. So

- ops of torch, and of libraries that torch has loaded, are probed in a server (`probe_server`) that
  is started when the first of them is met;
- ops that only this process knows (torch.library, torch.autograd.Function, extension modules) are
  probed in a fork of this process. They are not imported elsewhere: a module of the user's may do
  anything when it is imported.
- Once CUDA is in use, or autograd has threads for devices, this process cannot be forked. Then such
  ops are probed in it, and the plan says so.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import IO, Any

import torch

from autoparallel.capture.custom_functions import function_op
from autoparallel.discovery.discover import confirmed, require_probeable
from autoparallel.discovery.discovered_rule import DiscoveredRule
from autoparallel.discovery.forked_run import Limits, ProcessEndedError
from autoparallel.discovery.probe_server import answer, carefully
from autoparallel.discovery.shape_pattern import Probe, ProbeError
from autoparallel.rules.rule import OpCall
from autoparallel.support.torch_private import is_custom_op

__all__ = ["EndedError", "in_fork", "is_only_here", "rule_of"]

# A server answers within the limits of one probe and some time for itself.
_MARGIN_SECONDS = 60.0
# The first byte of what a fork says: an answer, why it cannot differentiate, or that it failed.
_FIT, _UNFIT, _RAISES = b"+", b"-", b"!"
_WHERE = "in the process that tried it on small tensors"


class EndedError(ProbeError):
    """The process that probed an op crashed or hung. lasting: whether it would do so again."""

    def __init__(self, words: str, lasting: bool) -> None:
        super().__init__(words)
        self.lasting = lasting


def rule_of(call: OpCall, stored: DiscoveredRule | None) -> tuple[DiscoveredRule, str]:
    """Return the rule of an op that has none: `stored` if it still holds, or else a new one.

    call: the call that asks for it. stored: a rule that was found before, perhaps read from a file.
    Also returns a remark for the plan, "" where there is none. Raises ProbeError where the op
    cannot be probed, and EndedError where its process ended.

    Example: `rule_of(OpCall.of(graph, node), None)[0].rule(other_call)`.
    """
    require_probeable(Probe(call))
    if stored is not None and _is_harmless(call) and confirmed(stored, call):
        return stored, ""
    if is_only_here(call.node.target):
        return _from_fork(call, stored)
    reply = _SERVER.ask(pickle.dumps((call, stored, tuple(sorted(torch.ops.loaded_libraries)))))
    # Registered by an extension module, which is no library of torch's.
    return _from_fork(call, stored) if "unknown" in reply else (_read(reply, stored), "")


def _is_harmless(call: OpCall) -> bool:
    """Return whether a rule that another process has found can be tried in this one.

    That is so of torch's public ops that read no whole numbers: they check what they are given.
    """
    whole_numbers = any(
        not (operand.dtype.is_floating_point or operand.dtype.is_complex)
        and operand.dtype != torch.bool
        for operand in call.operands
    )
    native = not is_only_here(call.node.target)
    return native and Probe(call).checks and not whole_numbers


def is_only_here(target: str) -> bool:
    """Return whether an op is written in Python, of which other processes know nothing.

    >>> is_only_here("aten.mm.default")
    False
    """
    space, name, _ = target.split(".")
    return function_op(target) is not None or is_custom_op(f"{space}::{name}")


def in_fork(work: Callable[[bool], bytes]) -> tuple[bytes, str]:
    """Return what `work` returns in a fork of this process, and ""; where this process can have no
    fork, what it returns here, and the reason.

    work: is told whether to take care, see `carefully`. Raises EndedError where it crashes or does
    not end.

    >>> in_fork(lambda careful: b"done")
    (b'done', '')
    """
    if not hasattr(os, "fork"):
        return work(False), "the system has no fork"
    if torch.cuda.is_initialized():
        return work(False), "CUDA is in use"

    def fit(careful: bool) -> bytes:
        """Do the work in the fork, if it can differentiate at all."""
        try:
            torch.ones(1, requires_grad=True).sum().backward()
        except RuntimeError as error:
            return _UNFIT + str(error).encode()
        try:
            return _FIT + work(careful)
        except Exception:  # raised again where whoever asks can see it whole
            return _RAISES

    try:
        reply = carefully(fit, Limits())
    except ProcessEndedError as error:
        raise EndedError(f"{error} {_WHERE}", lasting=False) from error
    kind, rest = reply[:1], reply[1:]
    # An error is no crash: here it is raised with all that belongs to it.
    return (rest, "") if kind == _FIT else (work(False), rest.decode())


def _from_fork(call: OpCall, stored: DiscoveredRule | None) -> tuple[DiscoveredRule, str]:
    """Return the rule as a fork of this process finds it, and ""; where it can have no fork, the
    rule as this process finds it, and a remark that says so.
    """
    reply, unfit = in_fork(lambda careful: json.dumps(answer(call, stored, careful)).encode())
    # Functions that the user wrote, and runs in this process; but they are not run unsaid.
    remark = f"tried in this process, which cannot be forked: {unfit}" if unfit else ""
    return _read(json.loads(reply), stored), remark


def _read(reply: dict[str, Any], stored: DiscoveredRule | None) -> DiscoveredRule:
    """Return the rule that a reply tells of. Raises ProbeError where it tells of none."""
    if "ended" in reply:
        raise EndedError(f"{reply['ended']} {_WHERE}", lasting=True)
    if "refused" in reply:
        raise ProbeError(reply["refused"])
    if reply.get("confirmed"):
        assert stored is not None
        return stored
    return DiscoveredRule.from_json(reply["rule"])


class _Server:
    """The process that answers, started when it is first asked, and again where it has ended.

    limits: of one probe.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.lock = threading.Lock()
        self.owner = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: Connection | None = None
        self.errors: IO[bytes] | None = None

    def ask(self, request: bytes) -> dict[str, Any]:
        """Return the answer to a request. Raises EndedError where there is none."""
        with self.lock:
            try:
                reply = self.exchanged(request)
                if reply is None:
                    # It had nothing to do for too long, and ended as the request was on its way.
                    reply = self.exchanged(request)
            except BaseException:
                # An answer that is still to come would be taken for that to the next request.
                self.stop()
                raise
        if reply is None:
            raise EndedError(
                "could not be tried: its process ends before it answers", lasting=False
            )
        return dict(json.loads(reply))

    def exchanged(self, request: bytes) -> bytes | None:
        """Return the answer of a server; None where it has ended by itself."""
        if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
            self.start()
        assert self.connection is not None
        assert self.process is not None
        assert self.errors is not None
        try:
            self.connection.send_bytes(request)
            if not self.connection.poll(self.limits.wall_seconds + _MARGIN_SECONDS):
                raise EndedError("could not be tried: its process does not answer", lasting=False)
            return self.connection.recv_bytes()
        except (EOFError, OSError) as error:
            code = self.process.wait()
            if code == 0:
                return None
            self.errors.seek(0)
            said = self.errors.read().decode(errors="replace").strip().splitlines()
            words = f"exit code {code}{': ' + said[-1] if said else ''}"
            raise EndedError(
                f"could not be tried: its process ended ({words})", lasting=False
            ) from error

    def start(self) -> None:
        """Start a server: a plain interpreter with this one's paths, on the CPU, in one thread."""
        self.stop()
        ours, theirs = multiprocessing.Pipe()
        # Not by the start methods of multiprocessing, which run the user's main module again.
        lines = (
            "import sys",
            "sys.path[:] = sys.argv[2:]",
            "from autoparallel.discovery.forked_run import Limits",
            "from autoparallel.discovery.probe_server import serve",
            f"serve(int(sys.argv[1]), {self.limits!r})",
        )
        command = [sys.executable, "-c", "\n".join(lines), str(theirs.fileno()), *sys.path]
        variables = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        # Closed by `stop`.
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.errors,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, **variables},
                # An interrupt from the keyboard is for the user's process alone.
                start_new_session=True,
            )
        except (OSError, ValueError, TypeError) as error:
            raise EndedError(
                f"could not be tried: no process starts: {error}", lasting=False
            ) from error
        finally:
            theirs.close()
        self.connection, self.owner = ours, os.getpid()

    def stop(self) -> None:
        """End the server, if one is running and is this process's own."""
        process, connection, errors = self.process, self.connection, self.errors
        self.process = self.connection = self.errors = None
        if connection is not None:
            connection.close()
        if errors is not None:
            errors.close()
        if process is None:
            return
        if self.owner != os.getpid():
            # A fork's copy of the handle: the process is its parent's.
            process.returncode = 0
            return
        process.kill()
        process.wait()


_SERVER = _Server(Limits())
atexit.register(_SERVER.stop)
