"""Text to batches: a corpus, a byte-level BPE, and batches that depend on (seed, step) alone.

The default corpus needs no download: it is the Python standard library's own sources, located
through the running interpreter. Every process that asks for the batch of a step gets the same one.

Sources: Sennrich et al. 2016 (BPE), Radford et al. 2019 (on bytes), Devlin et al. 2018, section 3.1
(masked language model).
"""

import hashlib
import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import safetensors
import safetensors.torch
import tokenizers
import torch
from torch import Tensor

from autoparallel.support.cache_files import default_cache_folder, write_whole
from autoparallel.train.documents import CorpusError, Document, corpus_files
from autoparallel.train.models import IGNORED_LABEL

__all__ = [
    "Batches",
    "Objective",
    "TokenizedCorpus",
    "prepare_corpus",
    "read_corpus",
]

END_OF_TEXT = "<|endoftext|>"
MASK = "<|mask|>"
SPECIAL_TOKENS = (END_OF_TEXT, MASK)  # Their numbers are their places: 0 and 1.
BYTE_ALPHABET = 256

DEFAULT_CORPUS_BYTES = 8_000_000
HELD_OUT_EVERY = 20  # Every twentieth document is held out.
CACHE_FORMAT = 1  # Raised when the cached tensors change their meaning.


def read_corpus(
    path: str | Path | None = None, limit_bytes: int = DEFAULT_CORPUS_BYTES
) -> tuple[Document, ...]:
    """Return the documents of a file, of all text files in a folder, or of the standard library.

    path: None for the standard library. limit_bytes: reading stops after so many (the last document
    is cut). The order is that of the names. Hidden files and files with NUL bytes are passed over.
    Raises CorpusError for a missing or unreadable path, and if no text remains.
    """
    root, files = corpus_files(path)
    documents: list[Document] = []
    bytes_left = limit_bytes
    for file in files:
        if bytes_left <= 0:
            break
        try:
            content = file.read_bytes()[:bytes_left]
        except OSError as error:
            raise CorpusError(
                f"cannot read {file}",
                why=str(error),
                fix="make it readable, or pass --data another path",
            ) from error
        if not content.strip() or b"\0" in content:
            continue
        bytes_left -= len(content)
        name = file.relative_to(root).as_posix()
        documents.append(Document(name, content.decode("utf-8", errors="replace")))
    if not documents:
        raise CorpusError(
            f"no text in {root if path is None else path}",
            why="it is empty, or holds nothing but empty, hidden or binary files",
            fix="pass --data a file or a folder of plain text",
        )
    return tuple(documents)


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedCorpus:
    """A corpus in tokens.

    train, held_out: (tokens,) int32, documents end with token 0. vocabulary: number of distinct
    tokens, special ones included. tokenizer_json: the tokenizer as `tokenizers` stores it. source:
    the name of the text, for people. nbytes: size of the text.
    """

    train: Tensor
    held_out: Tensor
    vocabulary: int
    tokenizer_json: str
    source: str
    nbytes: int

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Return the tokenizer by which the text was tokenized."""
        return tokenizers.Tokenizer.from_str(self.tokenizer_json)


def prepare_corpus(
    path: str | Path | None = None,
    *,
    vocabulary: int = 4001,
    limit_bytes: int = DEFAULT_CORPUS_BYTES,
    cache_folder: str | Path | None = None,
) -> TokenizedCorpus:
    """Read text, train a byte-level BPE of `vocabulary` tokens on it, and tokenize it; cached.

    path, limit_bytes: as of `read_corpus`. vocabulary: tokens, special ones included; a small text
    may not hold enough pairs: TokenizedCorpus.vocabulary tells how many came out. cache_folder: by
    default the user's. The cache's key is the content of the text and every option, so a changed
    text is seen.
    Raises CorpusError as read_corpus does, and if vocabulary is below 258.

    Example: `prepare_corpus("my_texts/", vocabulary=8000)`
    """
    if vocabulary < BYTE_ALPHABET + len(SPECIAL_TOKENS):
        raise CorpusError(
            f"vocabulary must be at least {BYTE_ALPHABET + len(SPECIAL_TOKENS)}, got {vocabulary}",
            why=f"every byte is a token, and so are {', '.join(SPECIAL_TOKENS)}",
            fix="ask for more tokens",
        )
    documents = read_corpus(path, limit_bytes)
    source = "the Python standard library" if path is None else str(path)
    nbytes = sum(len(document.text.encode()) for document in documents)
    folder = default_cache_folder() / "corpora" if cache_folder is None else Path(cache_folder)
    file = folder / f"corpus-{_corpus_key(documents, vocabulary)}.safetensors"
    cached = _read_cache(file)
    if cached is None:
        cached = _tokenize(documents, vocabulary)
        _write_cache(file, *cached)
    train, held_out, tokenizer_json = cached
    size = tokenizers.Tokenizer.from_str(tokenizer_json).get_vocab_size()
    return TokenizedCorpus(train, held_out, size, tokenizer_json, source, nbytes)


def _corpus_key(documents: tuple[Document, ...], vocabulary: int) -> str:
    """Return a hash of everything that the tokens depend on."""
    options = [CACHE_FORMAT, tokenizers.__version__, vocabulary, HELD_OUT_EVERY, SPECIAL_TOKENS]
    digest = hashlib.sha256(json.dumps(options).encode())
    for document in documents:
        content = document.text.encode()
        digest.update(f"\0{document.name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:24]


def _tokenize(documents: tuple[Document, ...], vocabulary: int) -> tuple[Tensor, Tensor, str]:
    """Return tokens of the training part, of the held-out part, and the tokenizer as JSON.

    The tokenizer is trained on the training part alone, so that the held-out loss is fair.
    """
    train, held_out = _split(documents)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(train, trainer=trainer)
    tokens = [_encode(tokenizer, texts) for texts in (train, held_out)]
    return tokens[0], tokens[1], tokenizer.to_str()


def _split(documents: tuple[Document, ...]) -> tuple[list[str], list[str]]:
    """Return training and held-out texts: whole documents if there are enough, else ends."""
    texts = [document.text for document in documents]
    if len(texts) >= HELD_OUT_EVERY:
        held_out = texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        del texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        return texts, held_out
    cuts = [len(text) - len(text) // HELD_OUT_EVERY for text in texts]
    train = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
    return train, [text[cut:] for text, cut in zip(texts, cuts, strict=True)]


def _encode(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> Tensor:
    """Return all texts in one row of tokens, each closed by the end-of-text token."""
    end = [tokenizer.token_to_id(END_OF_TEXT)]
    # Not special in the corpus: a text that spells a special token gets its characters' tokens.
    tokenizer.encode_special_tokens = True
    encodings = tokenizer.encode_batch_fast(texts)
    tokenizer.encode_special_tokens = False
    tokens = [token for encoding in encodings for token in encoding.ids + end]
    return torch.tensor(tokens, dtype=torch.int32)


def _read_cache(file: Path) -> tuple[Tensor, Tensor, str] | None:
    """Return what _write_cache wrote, or None if there is nothing that can be read."""
    try:
        with safetensors.safe_open(file, framework="pt") as stored:
            tokenizer = stored.metadata()["tokenizer"]
            tokens = (stored.get_tensor("train"), stored.get_tensor("held_out"))
        tokenizers.Tokenizer.from_str(tokenizer)
    except Exception:  # tokenizers raises plain exceptions for a text that is none
        return None
    if any(row.dtype != torch.int32 or row.ndim != 1 for row in tokens):
        return None
    return (*tokens, tokenizer)


def _write_cache(file: Path, train: Tensor, held_out: Tensor, tokenizer_json: str) -> None:
    """Write the tokens and the tokenizer, all at once or not at all."""
    content = safetensors.torch.save(
        {"train": train, "held_out": held_out}, metadata={"tokenizer": tokenizer_json}
    )
    write_whole(file, content)


class Objective(StrEnum):
    """The task that the labels pose."""

    CAUSAL = "causal"  # the next token
    MASKED = "masked"  # the original of a token that was hidden


@dataclass(frozen=True, slots=True, eq=False)
class Batches:
    """Batches of a corpus, each a function of (seed, step) and nothing else.

    corpus: the tokens. batch: rows. sequence: tokens per row. objective: the task. seed: of all
    choices. masked_fraction: of the tokens, for Objective.MASKED. Raises CorpusError if the
    training or the held-out part is shorter than one row and a label.

    Example: `Batches(prepare_corpus(), batch=8, sequence=128).train(0)["input_ids"].shape`
    """

    corpus: TokenizedCorpus
    batch: int
    sequence: int
    objective: Objective = Objective.CAUSAL
    seed: int = 0
    masked_fraction: float = 0.15

    def __post_init__(self) -> None:
        for part, tokens in (("training", self.corpus.train), ("held-out", self.corpus.held_out)):
            if len(tokens) < self.sequence + 1:
                raise CorpusError(
                    f"too little text in {self.corpus.source}",
                    why=f"its {part} part has {len(tokens)} tokens, and one row of {self.sequence} "
                    f"tokens with its labels needs {self.sequence + 1}",
                    fix=f"give more text (1/{HELD_OUT_EVERY} of it is held out) or shorter rows",
                )

    def train(self, step: int) -> dict[str, Tensor]:
        """Return the batch of a training step: input_ids, labels, both (batch, sequence) int64."""
        return self._make(self.corpus.train, f"train/{step}")

    def held_out(self, index: int) -> dict[str, Tensor]:
        """Return the index-th evaluation batch, of text that training never sees."""
        return self._make(self.corpus.held_out, f"held-out/{index}")

    def _make(self, tokens: Tensor, name: str) -> dict[str, Tensor]:
        """Return rows at random places of the tokens, the same ones for the same name."""
        # A hash instead of seed + step: neighbouring seeds must not give neighbouring batches.
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        starts = torch.randint(len(tokens) - self.sequence, (self.batch, 1), generator=generator)
        rows = tokens[starts + torch.arange(self.sequence + 1)].long()
        if self.objective is Objective.CAUSAL:
            return {"input_ids": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}
        return self._hide(rows[:, :-1].contiguous(), generator)

    def _hide(self, originals: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Choose tokens to predict: 80% become the mask, 10% another token, 10% stay.

        originals: (batch, sequence). Returns input_ids, and labels that are ignored elsewhere.
        """
        chosen = torch.rand(originals.shape, generator=generator) < self.masked_fraction
        # The mean over no label is not a number.
        if not chosen.any():
            chosen[0, 0] = True
        fate = torch.rand(originals.shape, generator=generator)
        others = torch.randint(
            len(SPECIAL_TOKENS), self.corpus.vocabulary, originals.shape, generator=generator
        )
        mask = SPECIAL_TOKENS.index(MASK)
        shown = torch.where(fate < 0.8, mask, torch.where(fate < 0.9, others, originals))
        return {
            "input_ids": torch.where(chosen, shown, originals),
            "labels": torch.where(chosen, originals, IGNORED_LABEL),
        }
