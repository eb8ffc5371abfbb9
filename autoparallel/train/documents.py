"""Documents of text: the standard library's sources, files, folders, JSON lines, data sets.

They come one by one, in a fixed order, so that a text need not fit into memory.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoparallel.errors import AutoParallelError
from autoparallel.support.json_text import read_other_json

__all__ = ["CorpusError", "Document", "TextSource", "corpus_files"]

# Folders of the standard library that hold no prose of programs: tables, tests, other packages.
_SKIPPED_FOLDERS = frozenset(
    ("dist-packages", "encodings", "idlelib", "lib2to3", "site-packages", "test", "tests")
)
# A file of more text is read as several documents, which end where a line does.
_PIECE_BYTES = 4_000_000


class CorpusError(AutoParallelError):
    """The text asked for is missing, unreadable, empty or too small, or its options are."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a corpus.

    name: path below the corpus's root, with slashes. text: its content.
    """

    name: str
    text: str


def corpus_files(path: str | Path | None) -> tuple[Path, Iterator[Path]]:
    """Return the root that names are relative to, and the files of a corpus in order.

    path: a file, a folder, or None for the sources of the standard library. Raises CorpusError
    where nothing is there.
    """
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        if not root.is_dir():
            raise CorpusError(
                "the standard library's sources are not there",
                why=f"{root} is no folder (a frozen or zipped Python?)",
                fix="name a file or a folder of plain text",
            )
        return root, (file for file in _walk(root, _SKIPPED_FOLDERS) if file.suffix == ".py")
    chosen = Path(path).expanduser()
    if chosen.is_file():
        return chosen.parent, iter([chosen])
    if chosen.is_dir():
        return chosen, _walk(chosen)
    raise CorpusError(
        f"no such file or folder: {path}",
        why=f"nothing is there, seen from {Path.cwd()}",
        fix="check the path of the text",
    )


def _walk(root: Path, skipped: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield the files below root, sorted by name per folder, without hidden and skipped ones."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - skipped - {"__pycache__"})
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in sorted(names):
            file = Path(folder, name)
            if not name.startswith(".") and file.is_file():
                yield file


@dataclass(frozen=True, slots=True)
class TextSource:
    """A text to train on, as the configuration names it.

    name: "python", a path, or "hf:NAME" of a data set. field: of the text, in JSON lines and data
    sets. subset, split: of a data set. limit_bytes: of text that is read at most, 0 for all.

    >>> "python" in str(TextSource("python"))
    True
    """

    name: str
    field: str = "text"
    subset: str = ""
    split: str = "train"
    limit_bytes: int = 0

    def documents(self) -> Iterator[Document]:
        """Yield the documents, the last one cut where the limit is.

        Raises CorpusError where there is nothing to read, or what is there is no text.
        """
        left = self.limit_bytes or sys.maxsize
        for document in self._all():
            content = document.text.encode(errors="replace")
            if len(content) > left:
                text = content[:left].decode(errors="ignore")
                document = Document(document.name, text)
            left -= len(content)
            yield document
            if left <= 0:
                return

    def stamp(self) -> list[Any]:
        """Return what the documents depend on: names, sizes and times of files, not their content.

        It is the key of what is made of them once and kept.
        """
        own = [self.name, self.field, self.limit_bytes]
        if self.name.startswith("hf:"):
            return [*own, self.subset, self.split]
        root, files = corpus_files(None if self.name == "python" else self.name)
        rows: list[Any] = []
        total = 0
        for file in files:
            # What lies behind the limit is not read; a margin is for files that are passed over.
            if self.limit_bytes and total > 2 * self.limit_bytes:
                break
            status = file.stat()
            total += status.st_size
            rows.append([file.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns])
        return [*own, str(root), rows]

    def _all(self) -> Iterator[Document]:
        if self.name.startswith("hf:"):
            yield from self._data_set(self.name.removeprefix("hf:"))
            return
        root, files = corpus_files(None if self.name == "python" else self.name)
        for file in files:
            name = file.relative_to(root).as_posix()
            try:
                yield from (
                    self._lines(file, name) if file.suffix == ".jsonl" else _texts(file, name)
                )
            except OSError as error:
                raise CorpusError(
                    f"cannot read {file}",
                    why=str(error),
                    fix="make it readable, or name another text",
                ) from error

    def _lines(self, file: Path, name: str) -> Iterator[Document]:
        """Yield the texts of a file of JSON lines."""
        with file.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = read_other_json(line)
                except ValueError as error:
                    raise CorpusError(
                        f"{file}, line {number} is no JSON",
                        why=str(error),
                        fix='write one object in each line: {"text": "..."}',
                    ) from error
                yield Document(f"{name}:{number}", self._text_of(row, f"{file}, line {number}"))

    def _data_set(self, name: str) -> Iterator[Document]:
        """Yield the texts of a data set of the library datasets, as they arrive."""
        try:
            import datasets
        except ImportError as error:
            raise CorpusError(
                f"the text hf:{name} needs the library datasets",
                why=str(error),
                fix="pip install datasets, or name a file or a folder of text",
            ) from error
        try:
            rows = datasets.load_dataset(
                name, self.subset or None, split=self.split, streaming=True
            )
            for number, row in enumerate(rows):
                yield Document(str(number), self._text_of(row, f"hf:{name}, row {number}"))
        except CorpusError:
            raise
        except Exception as error:  # of the network, the hub, the format: anything
            raise CorpusError(
                f"the data set hf:{name} cannot be read",
                why=f"{type(error).__name__}: {str(error)[:300]}",
                fix="see the name, data.subset, data.split and the network; or name a file",
            ) from error

    def _text_of(self, row: Any, where: str) -> str:
        """Return the text in a row of a data set."""
        text = row.get(self.field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise CorpusError(
                f"{where} has no text in the field {self.field!r}",
                why=f"it has {has}",
                fix="name the field of the text: data.field",
            )
        return text


def _texts(file: Path, name: str) -> Iterator[Document]:
    """Yield the text of a file, in pieces where it is long; nothing of a binary or empty one."""
    with file.open("rb") as content:
        number = 0
        while piece := content.read(_PIECE_BYTES):
            if len(piece) == _PIECE_BYTES:
                piece += content.readline(_PIECE_BYTES)
            if b"\0" in piece:
                return
            text = piece.decode("utf-8", errors="replace")
            if text.strip():
                yield Document(name if not number else f"{name}#{number}", text)
            number += 1
