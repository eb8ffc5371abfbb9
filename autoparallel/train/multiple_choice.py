"""Multiple choice in RACE's format: questions of passages, and the rows that a model chooses from.

A file holds one passage as a JSON object, or one in each line of a .jsonl file:

    {"article": "...", "questions": ["..."], "options": [["...", "..."]], "answers": ["B"]}

Source: Lai et al. 2017 (RACE); Devlin et al. 2018, section 4.4, for the rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoparallel.support.json_text import read_other_json
from autoparallel.train.documents import CorpusError
from autoparallel.train.evaluation import Score
from autoparallel.train.outputs import whole
from autoparallel.train.rows import Batch, permuted
from autoparallel.train.token_files import Marks

__all__ = [
    "ChoiceRows",
    "Question",
    "choice_accuracy",
    "digest_of",
    "questions_of",
    "read_questions",
]

# The longest question with its answer, in tokens; the passage has the rest of a row.
_ASKED_TOKENS = 128
_MARKS_OF_A_TEXT = 3  # at its beginning, between passage and question, at its end
_LETTERS = "ABCDEFGHIJ"  # by which right answers are named
_FORMAT = '{"article": "...", "questions": [...], "options": [[...]], "answers": ["A", ...]}'


@dataclass(frozen=True, slots=True)
class Question:
    """A question of a passage.

    article: the passage. asked: the question with each of the answers, a "_" of the question
    replaced by it. right: the index of the right one.
    """

    article: str
    asked: tuple[str, ...]
    right: int


def read_questions(path: str | Path) -> tuple[Question, ...]:
    """Return the questions of a file, or of all files below a folder, in the order of names.

    path: .txt and .json files of one passage each, .jsonl files of one in each line.
    Raises CorpusError where there are none, for one that is not in the format, and where questions
    have different numbers of answers: a batch has as many for each.

    Example: `read_questions("RACE/test/high")`
    """
    questions = [
        question
        for passage in _passages(Path(path).expanduser())
        for question in _questions(*passage)
    ]
    if not questions:
        raise CorpusError(
            f"no questions in {path}",
            why="there is no file of that name, or no .txt, .json or .jsonl file below it",
            fix=f"name a folder of RACE, or a file of {_FORMAT}",
        )
    counts = sorted({len(question.asked) for question in questions})
    if len(counts) > 1:
        raise CorpusError(
            f"questions in {path} have {', '.join(map(str, counts))} answers",
            why="all rows of a batch choose from as many",
            fix="put them into files of their own",
        )
    return tuple(questions)


def questions_of(source: str, held_out_every: int) -> dict[str, tuple[Question, ...]]:
    """Return the questions to train on and those held out, as "train" and "held_out".

    source: a folder of RACE, whose folders train and dev they are; of anything else the questions
    of one passage in so many are held out.
    """
    root = Path(source).expanduser()
    if (root / "train").is_dir() and (root / "dev").is_dir():
        return {"train": read_questions(root / "train"), "held_out": read_questions(root / "dev")}
    questions = read_questions(root)
    passages = {
        text: number for number, text in enumerate(dict.fromkeys(q.article for q in questions))
    }
    parts = {
        part: tuple(
            question
            for question in questions
            if (passages[question.article] % held_out_every == held_out_every - 1) == held
        )
        for part, held in (("train", False), ("held_out", True))
    }
    if not parts["held_out"]:
        raise CorpusError(
            f"too few passages in {source}",
            why=f"there are {len(passages)}, and one in {held_out_every} is held out",
            fix="give more, set data.held_out_every, or make folders train and dev",
        )
    return parts


def digest_of(questions: Mapping[str, Sequence[Question]], tokenizer_json: str) -> str:
    """Return a digest of what rows are made of."""
    rows = {
        part: [[q.article, *q.asked, q.right] for q in each] for part, each in questions.items()
    }
    return hashlib.sha256(json.dumps([rows, tokenizer_json]).encode()).hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class ChoiceRows:
    """Rows of questions: each is of as many texts as it has answers.

    A text is the mark that begins a row, the passage, a mark, the question with one of the answers,
    a mark, and filling that attention_mask leaves out. Where it is too long the passage loses its
    end. questions: by part, "train" or "held_out". encode: the tokens of a text. batch: questions
    of one step. sequence: tokens of a text. seed: of the order of an epoch.

    Example: `ChoiceRows(questions, encode, marks, 8, 512, 0)("train", 0, 0, 8)["labels"]`
    """

    questions: Mapping[str, Sequence[Question]]
    encode: Callable[[str], list[int]]
    marks: Marks
    batch: int
    sequence: int
    seed: int

    def __post_init__(self) -> None:
        if self.sequence <= _MARKS_OF_A_TEXT:
            raise CorpusError(
                f"data.sequence = {self.sequence} for multiple choice",
                why=f"a row holds {_MARKS_OF_A_TEXT} marks beside its text",
                fix="give longer rows: data.sequence",
            )
        if self.marks.first is None or self.marks.between is None:
            raise CorpusError(
                "the tokenizer has no tokens that begin a row and end a segment",
                why="rows of multiple choice need [CLS] and [SEP], or tokens that do as well",
                fix="give the tokenizer of the model that is fine-tuned: data.tokenizer",
            )

    def __call__(self, part: str, number: int, first: int, count: int) -> Batch:
        """Return questions of a batch, by the names that forward has for their tensors.

        part: "train" or "held_out". number: of the batch. first, count: which questions of it.
        """
        total = len(self.questions[part])
        chosen = []
        for row in range(count):
            epoch, index = divmod(number * self.batch + first + row, total)
            chosen.append(permuted(index, total, f"{self.seed}/{part}/{epoch}"))
        return self.batch_of([self.questions[part][place] for place in chosen])

    def batch_of(self, questions: Sequence[Question]) -> Batch:
        """Return questions as tensors: (b, c, s) of texts, and (b,) labels."""
        known = questions or next(iter(self.questions.values()))  # a rank may have none of them
        choices = len(known[0].asked)
        shape = (len(questions), choices, self.sequence)
        tokens, types, mask = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
        for row, question in enumerate(questions):
            article = self.encode(question.article)
            for place, asked in enumerate(question.asked):
                text, begin = self._text(article, self.encode(asked))
                tokens[row, place, : len(text)] = torch.tensor(text)
                types[row, place, begin : len(text)] = 1
                mask[row, place, : len(text)] = 1
        return {
            "input_ids": tokens,
            "token_type_ids": types,
            "attention_mask": mask,
            "labels": torch.tensor([question.right for question in questions], dtype=torch.int64),
        }

    def _text(self, article: list[int], asked: list[int]) -> tuple[list[int], int]:
        """Return the tokens of a text, and where its second segment begins."""
        first, between = self.marks.first or 0, self.marks.between or 0
        # An answer is at the end of what is asked.
        room = self.sequence - _MARKS_OF_A_TEXT
        asked = asked[-min(_ASKED_TOKENS, room) :]
        article = article[: room - len(asked)]
        return [first, *article, between, *asked, between], len(article) + 2


@torch.no_grad()
def choice_accuracy(
    module: nn.Module, rows: ChoiceRows, questions: Sequence[Question], device: torch.device | str
) -> Score:
    """Return how often the choice of the highest score is the right one. A collective call.

    module: split or plain; its output has `logits` of (b, c). rows: how texts become tensors.
    """
    was, right = module.training, 0
    module.eval()
    for begin in range(0, len(questions), rows.batch):
        batch = rows.batch_of(questions[begin : begin + rows.batch])
        batch = {name: value.to(device) for name, value in batch.items()}
        logits = module(**batch).logits
        right += int((whole(logits).argmax(-1) == batch["labels"]).sum())
    module.train(was)
    return Score("multiple-choice accuracy", right / len(questions), len(questions))


def _passages(path: Path) -> Iterator[tuple[Any, str]]:
    """Yield the JSON objects of files, each with the place that it is from."""
    files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    for file in files:
        if file.suffix not in (".txt", ".json", ".jsonl") or not file.is_file():
            continue
        where = str(file)
        try:
            text = file.read_text(encoding="utf-8")
            if file.suffix != ".jsonl":
                yield read_other_json(text), where
                continue
            # Only this ends a line: a text may hold others that splitlines knows, such as U+2028.
            for number, line in enumerate(text.split("\n"), 1):
                where = f"{file}, line {number}"
                if line.strip():
                    yield read_other_json(line), where
        except (OSError, ValueError) as error:
            raise CorpusError(
                f"{where} is no passage with questions",
                why=f"{type(error).__name__}: {error}",
                fix=f"write {_FORMAT}",
            ) from error


def _questions(passage: Any, where: str) -> Iterator[Question]:
    """Yield the questions of a passage. Raises CorpusError where it is not in the format."""
    try:
        article, answers = passage["article"], passage["answers"]
        for asked, options, answer in zip(
            passage["questions"], passage["options"], answers, strict=True
        ):
            if not isinstance(options, list) or not _are_texts([article, asked, *options]):
                raise TypeError("an article, a question or an option is no text")
            # An empty answer, or one of two letters, is none of them.
            letters = [*_LETTERS[: len(options)]]
            if answer not in letters or len(options) < 2:
                raise ValueError(f"{answer!r} of {len(options)} answers")
            texts = tuple(
                asked.replace("_", option) if "_" in asked else f"{asked} {option}"
                for option in options
            )
            yield Question(article, texts, letters.index(answer))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CorpusError(
            f"{where} is no passage with questions",
            why=f"{type(error).__name__}: {error}",
            fix=f"write {_FORMAT}",
        ) from error


def _are_texts(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) for value in values)
