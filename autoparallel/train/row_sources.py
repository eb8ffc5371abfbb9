"""The rows of a run, opened as its configuration says."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch.distributed as dist

from autoparallel.parallel.checkpoint_files import together
from autoparallel.train.built_models import objective_of
from autoparallel.train.documents import CorpusError
from autoparallel.train.multiple_choice import ChoiceRows, Question, digest_of, questions_of
from autoparallel.train.rows import FunctionRows, Rows, TokenRows
from autoparallel.train.run_config import DataConfig, RunConfig
from autoparallel.train.token_files import (
    Marks,
    TokenFiles,
    marks_of,
    open_tokens,
    prepare_tokens,
    read_tokenizer,
)

__all__ = ["RowSource", "open_rows", "stand_in_rows"]


@dataclass(frozen=True, slots=True)
class RowSource:
    """Rows, and what they are of.

    vocabulary: distinct tokens; 0 where a function of the user's makes the rows. digest: of what
    they are made of. description: for people. tokenizer_json: None where there is no tokenizer.
    """

    rows: Rows
    vocabulary: int
    digest: str
    description: str
    tokenizer_json: str | None


def open_rows(config: RunConfig, say: Callable[[str], None]) -> RowSource:
    """Return the rows of a run; write the token files first where there are none.

    say: is told how far that is. One process of each machine writes, and the others wait for it.
    Raises CorpusError, on all ranks, where there is no such text or too little of it.
    """
    if config.data.source != "python" and _is_function(config.data.source):
        return RowSource(
            FunctionRows(config.data.source), 0, config.data.source, config.data.source, None
        )
    if objective_of(config) == "choices":
        return together("reading the questions", lambda: _open_choices(config))
    local_rank = int(os.environ.get("LOCAL_RANK", dist.get_rank() if dist.is_initialized() else 0))
    if local_rank == 0:
        folder = together("preparing the text", lambda: prepare_tokens(config.data, say))
    else:
        together("preparing the text", lambda: None)
        folder = prepare_tokens(config.data)
    tokens = open_tokens(folder)
    rows = _token_rows(config, tokens)
    description = (
        f"{tokens.source}, {tokens.nbytes / 1e6:.1f} MB, {len(tokens.train):,} tokens and "
        f"{len(tokens.held_out):,} held out, vocabulary {tokens.vocabulary:,}"
    )
    return RowSource(rows, tokens.vocabulary, tokens.digest, description, tokens.tokenizer_json)


def stand_in_rows(config: RunConfig) -> RowSource:
    """Return rows of the shapes that a run's have, without its text.

    Raises TrainingError where a function of the user's makes them.
    """
    if config.data.source != "python" and _is_function(config.data.source):
        return RowSource(FunctionRows(config.data.source), 0, "", config.data.source, None)
    if objective_of(config) == "choices":
        stand_in = {part: (Question("", ("", "", "", ""), 0),) for part in ("train", "held_out")}
        rows = _choice_rows(config, stand_in, lambda text: [0] * len(text), Marks(0, 0, 0, 0, (0,)))
        return RowSource(rows, config.data.vocabulary, "", config.data.source, None)
    zeros = np.zeros(config.data.sequence + 1, dtype=np.uint16)
    vocabulary = config.data.vocabulary
    marks = Marks(0, 0, 0, 0, (0,))
    tokens = TokenFiles(Path(), zeros, zeros, vocabulary, "", marks, "", config.data.source, 0)
    return RowSource(_token_rows(config, tokens), vocabulary, "", config.data.source, None)


def _open_choices(config: RunConfig) -> RowSource:
    """Return the rows of questions, which every process reads for itself.

    Raises CorpusError for files that are none, and where no tokenizer is named: that of the model
    that is fine-tuned.
    """
    named = config.data.tokenizer
    if named in ("bpe", "wordpiece"):
        raise CorpusError(
            f"data.tokenizer = {named!r} for multiple choice",
            why="the tokens are those of the model that is fine-tuned",
            fix="name its tokenizer.json; export-weights writes one beside the weights",
        )
    text = read_tokenizer(named)
    tokenizer = tokenizers.Tokenizer.from_str(text)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    questions = questions_of(config.data.source, config.data.held_out_every)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    rows = _choice_rows(config, questions, encode, marks_of(tokenizer, named))
    counts = {part: len(each) for part, each in questions.items()}
    vocabulary = tokenizer.get_vocab_size()
    description = (
        f"{config.data.source}, {counts['train']:,} questions and {counts['held_out']:,} held out, "
        f"vocabulary {vocabulary:,}"
    )
    return RowSource(rows, vocabulary, digest_of(questions, text), description, text)


def _choice_rows(
    config: RunConfig,
    questions: Mapping[str, Sequence[Question]],
    encode: Callable[[str], list[int]],
    marks: Marks,
) -> ChoiceRows:
    """Return the rows of questions, as the configuration wants them.

    Raises CorpusError for a configuration of which rows of questions would keep nothing.
    """
    # Words of a text that is cut into rows; the limit's default is of a text, too.
    for name, unused in (
        ("limit_bytes", (0, DataConfig.limit_bytes)),
        ("field", (DataConfig.field,)),
        ("subset", (DataConfig.subset,)),
        ("split", (DataConfig.split,)),
    ):
        value = getattr(config.data, name)
        if value not in unused:
            raise CorpusError(
                f"data.{name} = {value!r} for multiple choice",
                why="the questions of all files are read, and it is of other texts",
                fix="leave it out; name a file or a folder of fewer questions: data.source",
            )
    training = config.training
    return ChoiceRows(questions, encode, marks, training.batch, config.data.sequence, training.seed)


def _token_rows(config: RunConfig, tokens: TokenFiles) -> TokenRows:
    """Return the rows of token files, as the model and the configuration want them."""
    return TokenRows(
        tokens,
        config.training.batch,
        config.data.sequence,
        objective_of(config),
        config.training.seed,
        segments=config.model.kind == "bert" and config.model.sentence_order,
        masked_fraction=config.data.masked_fraction,
    )


def _is_function(source: str) -> bool:
    """Return whether a source is the name of a function, and no path or data set."""
    if source.startswith("hf:") or Path(source).exists():
        return False
    module, colon, name = source.partition(":")
    return bool(colon) and all(p.isidentifier() for p in [*module.split("."), name])
