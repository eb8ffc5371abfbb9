"""How the documents become a site, with Sphinx: `make docs`."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

project = "torch-autoparallel"
author = copyright = "The torch-autoparallel authors"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = project
root_doc = "index"
exclude_patterns = ["*.py"]
# The documents are read on other sites too, and have no roles but Markdown's.
default_role = "code"
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_display_short_literal_types = True
toc_object_entries = False
maximum_signature_line_length = 88
# The names of types in signatures are those of many libraries, whose sites are not asked.
nitpicky = False
pygments_style = "friendly"
pygments_dark_style = "monokai"


def plain(app: Any, what: str, name: str, one: object, options: Any, lines: list[str]) -> None:
    """Read docstrings as the plain text that they are: nothing in them is marked up but code.

    Names of parameters and fields are set in bold where they are told of, as "name:".
    """
    names = sorted({*getattr(one, "__dataclass_fields__", ()), *_parameters(one)}, key=len)
    told = re.compile(rf"(?<![\w.])({'|'.join(names)})(?=:|, \w+:)") if names else None
    for at, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            parts = re.split(r"(`[^`]*`)", line)
            lines[at] = "".join(
                part if part.startswith("`") else _marked(part, told) for part in parts
            )


def _marked(text: str, told: re.Pattern[str] | None) -> str:
    """Return a text without what would mark it up, and with parameters in bold."""
    text = re.sub(r"([*|_\\])", r"\\\1", text)
    if told is None:
        return text
    return told.sub(lambda match: f"**{match[1]}**", text.replace("\\_", "_")).replace("_", "\\_")


def _parameters(one: object) -> tuple[str, ...]:
    """Return the names of a function's parameters."""
    try:
        return tuple(inspect.signature(one).parameters) if inspect.isfunction(one) else ()
    except ValueError:
        return ()


def setup(app: Any) -> None:
    """Connect what reads docstrings. Called by Sphinx."""
    app.connect("autodoc-process-docstring", plain)
