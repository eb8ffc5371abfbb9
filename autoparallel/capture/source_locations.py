"""Where in the user's model an exported node comes from: module calls and source line."""

from __future__ import annotations

from typing import Any

__all__ = ["Origins", "source_line"]

_Scope = tuple[str, ...]
# Frames of these files are none of the user's.
_PACKAGE = __file__.rsplit("/", 2)[0] + "/"


class Origins:
    """Names the module calls of one exported program, in the order in which they appear."""

    def __init__(self) -> None:
        self.scopes: dict[tuple[str, ...], _Scope] = {(): ()}
        self.calls: dict[tuple[_Scope, str], int] = {}
        self.traces: dict[str, tuple[str, ...]] = {}

    def scope(self, node: Any) -> _Scope:
        """The module calls that the node is inside of, the outermost first, as Node.scope."""
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
        path = qualified.removeprefix("model").removeprefix(".")
        if not path:
            return scope
        count = self.calls[scope, path] = self.calls.get((scope, path), -1) + 1
        return (*scope, f"{path}@{count}" if count else path)

    def frames(self, node: Any) -> tuple[str, ...]:
        """The lines of the forwards that are at work where the node was made, the outermost first.

        One for each module call, and for the whole model; torch 2.13 keeps of a stack the frames
        that are named so. Empty where it keeps none.
        """
        trace = node.meta.get("stack_trace") or ""
        if trace not in self.traces:
            rows = [row.strip() for row in trace.splitlines()]
            self.traces[trace] = tuple(
                row for row in rows if row.startswith('File "') and _PACKAGE not in row
            )
        return self.traces[trace]

    def path(self, node: Any) -> str:
        """Path of the innermost module."""
        scope = self.scope(node)
        return scope[-1].partition("@")[0] if scope else ""

    def where(self, node: Any) -> str:
        """Module path and source line, for errors."""
        return ", ".join(text for text in (self.path(node), source_line(node)) if text)


def source_line(node: Any) -> str:
    """file.py:line of the user's code that made an exported node; empty where unknown."""
    trace = node.meta.get("stack_trace") or ""
    rows = [row.strip() for row in trace.splitlines() if row.strip().startswith("File ")]
    if not rows:
        return ""
    parts = rows[-1].split('"')
    number = rows[-1].split("line ")[-1].split(",")[0]
    return f"{parts[1].rsplit('/', 1)[-1]}:{number}" if len(parts) > 1 else ""
