"""The place in the user's model that an exported node comes from: module calls, source lines."""

from __future__ import annotations

import re
from typing import Any

from autoparallel.capture.source_files import HANDS_ON, ModelFiles

__all__ = ["Origins"]

_Scope = tuple[str, ...]
# Frames of these files are none of the user's.
_PACKAGE = __file__.rsplit("/", 2)[0] + "/"
# A frame of a stack trace, as Python writes it.
_FRAME = re.compile(r'^\s*File "(.+)", line (\d+), in (.+)$', re.MULTILINE)


class Origins:
    """Names the module calls of one exported program, in the order in which they appear.

    files: those that the model is written in. The first call of a module at a place is named by the
    module's path, the next ones "path@1", "path@2". Ask for the nodes in their order, as that is
    what the calls are numbered by.
    """

    def __init__(self, files: ModelFiles) -> None:
        self.files = files
        self.scopes: dict[tuple[str, ...], _Scope] = {(): ()}
        self.calls: dict[tuple[_Scope, str], int] = {}
        self.traces: dict[str, tuple[str, ...]] = {}
        self.lines: dict[str, str] = {}

    def scope(self, node: Any) -> _Scope:
        """Return the module calls that the node is inside of, the outermost first, as Node.scope.

        node: of the exported program. Its `nn_module_stack` has one key for each module call (torch
        2.13), so that two calls of one module are told apart.
        """
        stack = node.meta.get("nn_module_stack") or {}
        keys = tuple(stack)
        if keys not in self.scopes:
            scope: _Scope = ()
            for count, (qualified, _) in enumerate(stack.values(), 1):
                if keys[:count] not in self.scopes:
                    self.scopes[keys[:count]] = self._entered(scope, qualified)
                scope = self.scopes[keys[:count]]
        return self.scopes[keys]

    def _entered(self, scope: _Scope, qualified: str) -> _Scope:
        """Return the scope inside of a new call, in `scope`, of the module of that name."""
        # The exported module holds the user's as its attribute `model`.
        path = qualified.removeprefix("model").removeprefix(".")
        if not path:
            return scope
        count = self.calls[scope, path] = self.calls.get((scope, path), -1) + 1
        return (*scope, f"{path}@{count}" if count else path)

    def frames(self, node: Any) -> tuple[str, ...]:
        """Return the lines of the forwards that are at work at the node, the outermost first.

        There is one for the whole model and one for each module call, which are functions named
        "forward". Empty where torch keeps no stack.
        """
        trace = node.meta.get("stack_trace") or ""
        if trace not in self.traces:
            rows = (match[0].strip() for match in _FRAME.finditer(trace) if match[3] == "forward")
            self.traces[trace] = tuple(row for row in rows if _PACKAGE not in row)
        return self.traces[trace]

    def path(self, node: Any) -> str:
        """Return the path of the innermost module that the node is in; "" for the whole model."""
        scope = self.scope(node)
        return scope[-1].partition("@")[0] if scope else ""

    def line(self, node: Any) -> str:
        """Return "file.py:line" of the model's code that the node comes from; "" if unknown.

        That is the innermost line of a file that the model is written in: of a layer of a library
        the line that calls it. Where there is none, as in an nn.Sequential of torch's layers, it is
        the library's own, and has the library's name: "torch/nn/modules/linear.py:134".
        """
        trace = node.meta.get("stack_trace") or ""
        if trace not in self.lines:
            frames = [
                (match[1], match[2]) for match in _FRAME.finditer(trace) if match[3] != HANDS_ON
            ]
            written = [frame for frame in frames if frame[0] in self.files]
            innermost = (written or frames)[-1:]
            self.lines[trace] = "".join(
                f"{self.files.shown(file)}:{line}" for file, line in innermost
            )
        return self.lines[trace]

    def where(self, node: Any) -> str:
        """Return module path and source line, for errors."""
        return ", ".join(text for text in (self.path(node), self.line(node)) if text)
