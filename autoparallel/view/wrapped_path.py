"""Paths of modules in columns of a table: a path that is too long breaks after a dot."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

__all__ = ["WrappedPath"]

_PIECE = re.compile(r"(?:\{[^}]*\}|[^._{])*[._]?")


@dataclass(frozen=True, slots=True)
class WrappedPath:
    """A WrappedPath is the dotted path of a module or a value, which breaks after a dot.

    It breaks where it is too long for its column of a rich table. Only names that are too long by
    themselves break elsewhere: after an underscore, if they have one.

    >>> WrappedPath("decoder.layers.{0..11}.attention").lines(18)
    ['decoder.layers.', '{0..11}.attention']
    """

    text: str

    def lines(self, width: int) -> list[str]:
        """Return the path in lines of at most `width` letters, as far as its pieces allow."""
        lines = [""]
        for piece in filter(None, re.split(r"(?<=\.)(?![^{]*\})", self.text)):
            short = len(piece) <= width
            for part in [piece] if short else filter(None, _PIECE.findall(piece)):
                if len(lines[-1]) + len(part) > width and lines[-1]:
                    lines.append("")
                lines[-1] += part
        return lines

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Tell rich the least width, of the longest piece, and the greatest, of one line."""
        widest = max(map(len, self.lines(1)))
        return Measurement(min(widest, options.max_width), min(len(self.text), options.max_width))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Give rich the lines for the width that the table has found."""
        yield Text("\n".join(self.lines(options.max_width)), overflow="fold")
