"""Token files: a text in tokens, written once, and then mapped into memory by every process.

A folder holds the tokenizer, the tokens to train on, those held out, and a table of contents with
digests. It appears at once, when all of it is written. Its name follows from the text's stamp and
every option, so that another text or tokenizer makes another folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from autoparallel.support.cache_files import default_cache_folder
from autoparallel.support.json_text import read_json
from autoparallel.train.documents import CorpusError, Document, TextSource
from autoparallel.train.run_config import DataConfig

__all__ = [
    "END_NAMES",
    "Marks",
    "TokenFiles",
    "marks_of",
    "open_tokens",
    "prepare_tokens",
    "read_tokenizer",
]

FORMAT = 1  # Raised when the files change their meaning.
# A tokenizer is trained on so much of the text at most, from its beginning.
TRAINED_BYTES = 200_000_000
# The types of numbers in which tokens are written, by how many there are.
_DTYPES = ("uint16", "uint32")
_BATCH = 256  # documents that are tokenized at once
BYTE_ALPHABET = 256

# Names of tokens that end a text, in the order of preference.
END_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]")
# Names of tokens with a meaning, by what is looked for, in the order of preference.
_NAMES = {
    "end": END_NAMES,
    "mask": ("[MASK]", "<mask>", "<|mask|>"),
    "first": ("[CLS]", "<s>", "<|begin_of_text|>", "<|endoftext|>"),
    "between": ("[SEP]", "</s>", "<|endoftext|>", "<|end_of_text|>"),
}
_BPE_TOKENS = ("<|endoftext|>", "<|mask|>")
_WORDPIECE_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Marks:
    """Numbers of the tokens that are no text, None for those that a tokenizer has not.

    end: closes a document. mask: hides a token. first: begins a row of a masked model. between:
    ends a segment. special: all that no row may draw at random.
    """

    end: int
    mask: int | None
    first: int | None
    between: int | None
    special: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class TokenFiles:
    """A text in tokens.

    folder: of the files. train, held_out: (tokens,) of uint16 or uint32, mapped into memory; each
    document ends with the token `marks.end`. vocabulary: number of distinct tokens. tokenizer_json:
    the tokenizer as `tokenizers` stores it. digest: of the files. source: of the text, for people.
    nbytes: of the text.
    """

    folder: Path
    train: Any
    held_out: Any
    vocabulary: int
    tokenizer_json: str
    marks: Marks
    digest: str
    source: str
    nbytes: int

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Return the tokenizer by which the text was tokenized."""
        return tokenizers.Tokenizer.from_str(self.tokenizer_json)


def prepare_tokens(config: DataConfig, say: Say = lambda text: None) -> Path:
    """Return the folder of a text's token files; make it where there is none.

    say: is told now and then how far it is. Processes may do so at once: the first one that is
    done names the folder. Raises CorpusError for a text that cannot be read or is too small, and
    for a tokenizer that is none or lacks a token that ends a text.

    Example: `open_tokens(prepare_tokens(DataConfig())).vocabulary`
    """
    source = text_source(config)
    cache = _cache_folder(config)
    folder = cache / _key(config, source)
    if (folder / "contents.json").exists():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=cache, prefix="partial-"))
    except OSError as error:
        raise CorpusError(
            f"the token files cannot be written to {cache}",
            why=error.strerror or str(error),
            fix="give another folder: data.cache, or AUTOPARALLEL_CACHE",
        ) from error
    try:
        _write(config, source, partial, say)
        try:
            os.rename(partial, folder)
        except OSError:
            # Another process was quicker; its files are the same.
            if not (folder / "contents.json").exists():
                raise
    except OSError as error:
        raise CorpusError(
            f"the token files cannot be written to {cache}",
            why=error.strerror or str(error),
            fix="see the space on the device, or give another folder: data.cache",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _cache_folder(config: DataConfig) -> Path:
    """Return the folder of all token files."""
    try:
        named = Path(config.cache).expanduser() if config.cache else None
        return named or default_cache_folder() / "tokens"
    except (OSError, RuntimeError) as error:
        raise CorpusError(
            "there is no folder for the token files",
            why=str(error),
            fix="give one: data.cache, or AUTOPARALLEL_CACHE",
        ) from error


def open_tokens(folder: Path) -> TokenFiles:
    """Return the token files in a folder. Raises CorpusError where they cannot be read."""
    try:
        contents = read_json((folder / "contents.json").read_text())
        tokenizer_json = (folder / "tokenizer.json").read_text()
        if contents["dtype"] not in _DTYPES:
            raise ValueError(f"tokens of {contents['dtype']!r:.40}")
        dtype = np.dtype(contents["dtype"])
        train, held_out = (
            np.memmap(folder / name, dtype=dtype, mode="r") for name in ("train", "held_out")
        )
        lengths = [len(train), len(held_out)]
        if lengths != contents["tokens"]:
            raise ValueError(f"they have {lengths} tokens, and had {contents['tokens']}")
        return TokenFiles(
            folder,
            train,
            held_out,
            contents["vocabulary"],
            tokenizer_json,
            Marks(**{**contents["marks"], "special": tuple(contents["marks"]["special"])}),
            contents["digest"],
            contents["source"],
            contents["nbytes"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorpusError(
            f"the token files in {folder} cannot be read",
            why=f"{type(error).__name__}: {error}",
            fix="remove the folder, so that it is made anew",
        ) from error


def text_source(config: DataConfig) -> TextSource:
    """Return the text that a configuration names."""
    return TextSource(config.source, config.field, config.subset, config.split, config.limit_bytes)


def _key(config: DataConfig, source: TextSource) -> str:
    """Return a name that follows from all that the tokens depend on."""
    trained = config.tokenizer in ("bpe", "wordpiece")
    tokenizer = config.tokenizer if trained else read_tokenizer(config.tokenizer)
    options = [FORMAT, tokenizers.__version__, tokenizer, config.held_out_every, source.stamp()]
    options += [config.vocabulary] if trained else []
    return hashlib.sha256(json.dumps(options).encode()).hexdigest()[:24]


def read_tokenizer(path: str) -> str:
    """Return the content of a tokenizer.json, or of the one in a folder."""
    file = Path(path).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    try:
        text = file.read_text()
        tokenizers.Tokenizer.from_str(text)
        return text
    # The library raises plain exceptions for a text that is no tokenizer.
    except Exception as error:
        raise CorpusError(
            f"no tokenizer in {path}",
            why=str(error)[:300],
            fix='name a tokenizer.json, or train one: data.tokenizer = "bpe" or "wordpiece"',
        ) from error


def _write(config: DataConfig, source: TextSource, folder: Path, say: Say) -> None:
    """Write all files of a text into a folder."""
    tokenizer = _tokenizer(config, source, say)
    marks = marks_of(tokenizer, config.tokenizer)
    vocabulary = tokenizer.get_vocab_size()
    dtype = np.dtype(_DTYPES[0] if vocabulary <= 2**16 else _DTYPES[1])
    digest = hashlib.sha256()
    counts, nbytes = {"train": 0, "held_out": 0}, 0
    files = {name: (folder / name).open("wb") for name in counts}
    try:
        texts = _parted(source.documents(), config.held_out_every)
        while group := list(islice(texts, _BATCH)):
            # A text that spells a special token gets its characters' tokens.
            encoded = tokenizer.encode_batch([text for _, text in group], add_special_tokens=False)
            for (part, text), row in zip(group, encoded, strict=True):
                tokens = np.array([*row.ids, marks.end], dtype=dtype).tobytes()
                files[part].write(tokens)
                digest.update(part.encode() + tokens)
                counts[part] += len(row.ids) + 1
                nbytes += len(text.encode(errors="replace"))
            say(f"tokenizing {config.source}: {nbytes / 1e6:.1f} MB")
    finally:
        for file in files.values():
            file.close()
    if not counts["train"] or not counts["held_out"]:
        raise CorpusError(
            f"no text in {config.source}",
            why="it is empty, or holds nothing but empty, hidden or binary files",
            fix="name a file or a folder of plain text: data.source",
        )
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    contents = {
        "dtype": dtype.name,
        "tokens": [counts["train"], counts["held_out"]],
        "vocabulary": vocabulary,
        "marks": {name: getattr(marks, name) for name in Marks.__dataclass_fields__},
        "digest": digest.hexdigest(),
        "source": "the Python standard library" if config.source == "python" else config.source,
        "nbytes": nbytes,
    }
    (folder / "contents.json").write_text(json.dumps(contents, indent=1))


def _tokenizer(config: DataConfig, source: TextSource, say: Say) -> tokenizers.Tokenizer:
    """Return the tokenizer that was named, or one that is trained on the text to train on."""
    if config.tokenizer not in ("bpe", "wordpiece"):
        tokenizer = tokenizers.Tokenizer.from_str(read_tokenizer(config.tokenizer))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer
    least = BYTE_ALPHABET + len(_BPE_TOKENS)
    if config.tokenizer == "bpe" and config.vocabulary < least:
        raise CorpusError(
            f"data.vocabulary must be at least {least}, got {config.vocabulary}",
            why=f"every byte is a token, and so are {', '.join(_BPE_TOKENS)}",
            fix="ask for more tokens",
        )
    say(f"training a tokenizer of {config.vocabulary} tokens on {config.source}")
    trainer: Any
    pre, decoders, trainers = tokenizers.pre_tokenizers, tokenizers.decoders, tokenizers.trainers
    if config.tokenizer == "bpe":
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocabulary,
            special_tokens=list(_BPE_TOKENS),
            initial_alphabet=sorted(pre.ByteLevel.alphabet()),
            show_progress=False,
        )
    else:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=config.vocabulary,
            special_tokens=list(_WORDPIECE_TOKENS),
            show_progress=False,
        )
    tokenizer.train_from_iterator(_to_train_on(source, config.held_out_every), trainer=trainer)
    return tokenizer


def _to_train_on(source: TextSource, every: int) -> Iterator[str]:
    """Yield texts for the tokenizer: nothing held out, so that the held-out loss is fair."""
    left = TRAINED_BYTES
    for part, text in _parted(source.documents(), every):
        if left > 0 and part == "train":
            yield text
            left -= len(text)


def _parted(documents: Iterator[Document], every: int) -> Iterator[tuple[str, str]]:
    """Yield (part, text): every so-manyth document is held out; of fewer, their ends are."""
    first = list(islice(documents, every))
    if len(first) < every:
        for document in first:
            cut = len(document.text) - len(document.text) // every
            yield "train", document.text[:cut]
            yield "held_out", document.text[cut:]
        return
    for number, document in enumerate(_chained(first, documents), 1):
        yield "held_out" if number % every == 0 else "train", document.text


def _chained(first: list[Document], others: Iterator[Document]) -> Iterator[Document]:
    yield from first
    yield from others


def marks_of(tokenizer: tokenizers.Tokenizer, name: str) -> Marks:
    """Return the tokens of a tokenizer that have a meaning. Raises CorpusError without an end."""
    numbers: dict[str, int | None] = {}
    for mark, names in _NAMES.items():
        known = [tokenizer.token_to_id(each) for each in names]
        numbers[mark] = next((number for number in known if number is not None), None)
    special = tuple(sorted(
        number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special
    ))  # fmt: skip
    end = numbers.pop("end")
    if end is None:
        raise CorpusError(
            f"the tokenizer {name} has no token that ends a text",
            why=f"none of its tokens is called {', '.join(_NAMES['end'])}",
            fix="add one of these as a special token",
        )
    return Marks(end=end, special=special, **numbers)
