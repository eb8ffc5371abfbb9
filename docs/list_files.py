"""Writes docs/files.md: the list of all files, every file after those that it imports."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from test_architecture import PACKAGES, files, imports_of  # noqa: E402

DOCUMENT = ROOT / "docs" / "files.md"
HEAD = """# Files, bottom-up

A file imports only from files above it; `tests/test_architecture.py` reads this list and the
imports. What each package is for: [architecture.md](architecture.md#where-each-thing-lives).
Written by `python docs/list_files.py` from the first lines of the files' docstrings.
"""
START, END = "<!-- files -->", "<!-- end of files -->"


def ordered() -> list[str]:
    """Names of all files, bottom-up; files of one folder stay together where they can."""
    known = files()
    waiting = {name: imports_of(path) & set(known) - {name} for name, path in known.items()}
    done: list[str] = []
    while waiting:
        folder = done[-1].rpartition("/")[0] if done else ""
        ready = [name for name, needs in waiting.items() if needs <= set(done)]
        if not ready:
            raise SystemExit(f"a cycle among {sorted(waiting)}")
        first = min(
            ready,
            key=lambda n: (PACKAGES.index(n.split("/")[0]), n.rpartition("/")[0] != folder, n),
        )
        done.append(first)
        del waiting[first]
    return done


def main() -> None:
    """Write the page."""
    rows = []
    for name in ordered():
        text = ast.get_docstring(ast.parse(files()[name].read_text())) or ""
        rows.append(f"| `{name}.py` | {text.partition(chr(10))[0]} |")
    table = "\n".join(["| file | what |", "|---|---|", *rows])
    DOCUMENT.write_text(f"{HEAD}\n{START}\n{table}\n{END}\n")


if __name__ == "__main__":
    main()
