"""An export: a text for another program, and a list of what that program cannot express."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Export"]


@dataclass(frozen=True)
class Export:
    """An Export is a plan in the words of another program.

    target: what the text is for. text: of the file. ending: of its name. missing: sentences, each
    of which says what of the plan the text does not have, and why; the text has them as comments
    too, where its language has comments.

    >>> print(Export("torchtitan", "[parallelism]", ".toml", ("no recompute modes",)))
    [parallelism]
    """

    target: str
    text: str
    ending: str
    missing: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.text
