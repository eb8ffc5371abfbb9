"""Multiple choice in RACE's format: rows, right answers, and fine-tuning, split and unsplit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from race_questions import WORDS, tokenizer, write_passages, write_weights
from torch import Tensor, nn
from training_runs import run_on, small_config

from autoparallel.train.choice_model import BertForChoices, ChoiceOutput
from autoparallel.train.documents import CorpusError
from autoparallel.train.models import Bert, BertConfig
from autoparallel.train.multiple_choice import (
    ChoiceRows,
    Question,
    choice_accuracy,
    questions_of,
    read_questions,
)
from autoparallel.train.run_config import RunConfig
from autoparallel.train.runner import run_training
from autoparallel.train.token_files import marks_of
from autoparallel.train.trained import open_trained

PASSAGE = {
    "article": "the sky is blue",
    "questions": ["what colour is the sky ?", "the sky is _ ?"],
    "options": [["red", "blue", "green", "black"], ["no", "red", "black", "blue"]],
    "answers": ["B", "D"],
}


def rows_of(questions: Any, batch: int = 4, sequence: int = 16) -> ChoiceRows:
    named = tokenizer()
    return ChoiceRows(
        {"train": questions, "held_out": questions}, lambda text: named.encode(text).ids,
        marks_of(named, "the test's"), batch, sequence, 0,
    )  # fmt: skip


def words(tokens: Tensor) -> str:
    return " ".join(WORDS[token] for token in tokens.tolist())


def test_questions_are_read(tmp_path: Path) -> None:
    """One passage a file, or one a line; a blank is filled with the answer."""
    (tmp_path / "high").mkdir()
    (tmp_path / "high" / "1.txt").write_text(json.dumps(PASSAGE))
    (tmp_path / "middle.jsonl").write_text(json.dumps(PASSAGE) + "\n\n" + json.dumps(PASSAGE))
    (tmp_path / "notes.md").write_text("no passage")
    questions = read_questions(tmp_path)
    assert len(questions) == 6
    assert questions[0].asked[1] == "what colour is the sky ? blue"
    assert questions[1].asked == tuple(f"the sky is {w} ?" for w in ("no", "red", "black", "blue"))
    assert [question.right for question in questions] == [1, 3] * 3
    assert read_questions(tmp_path / "high" / "1.txt") == questions[:2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no passage"),
        (json.dumps({**PASSAGE, "answers": ["B"]}), "shorter"),
        (json.dumps({**PASSAGE, "answers": ["B", "F"]}), "'F' of 4 answers"),
        (json.dumps({**PASSAGE, "answers": ["B", ""]}), "'' of 4 answers"),
        (json.dumps({**PASSAGE, "answers": ["BC", "D"]}), "'BC' of 4 answers"),
        (json.dumps({**PASSAGE, "options": ["abcd", "efgh"]}), "is no text"),
        (json.dumps({**PASSAGE, "options": [["a", None], ["a", "b"]]}), "is no text"),
        (json.dumps({**PASSAGE, "options": [["a"], ["b"]], "answers": ["A", "A"]}), "of 1 answers"),
        (json.dumps({**PASSAGE, "options": [["a", "b"], ["a", "b", "c", "d"]]}), "have 2, 4 answ"),
        ("", "is no passage"),
    ],
)
def test_what_is_no_passage_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "1.json").write_text(text)
    with pytest.raises(CorpusError, match=words):
        read_questions(tmp_path)


def test_a_line_of_json_may_hold_other_ends_of_lines(tmp_path: Path) -> None:
    text = json.dumps({**PASSAGE, "article": "the sky\u2028is blue"}, ensure_ascii=False)
    (tmp_path / "1.jsonl").write_text(f"{text}\r\n{text}\n")
    assert len(read_questions(tmp_path)) == 4


def test_no_questions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no questions in"):
        read_questions(tmp_path / "nothing")
    (tmp_path / "1.json").write_text(json.dumps(PASSAGE))
    with pytest.raises(CorpusError, match="too few passages"):
        questions_of(str(tmp_path), 2)


def test_folders_of_race_are_its_parts(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("dev", 1)):
        (tmp_path / part / "high").mkdir(parents=True)
        for number in range(count):
            (tmp_path / part / "high" / f"{number}.txt").write_text(json.dumps(PASSAGE))
    parts = questions_of(str(tmp_path), 20)
    assert {part: len(questions) for part, questions in parts.items()} == {
        "train": 6,
        "held_out": 2,
    }


def test_rows_hold_passage_question_and_answer() -> None:
    question = Question("the sky is blue", ("is the sky red", "is the sky blue"), 1)
    batch = rows_of([question]).batch_of([question])
    assert words(batch["input_ids"][0, 1]) == (
        "[CLS] the sky is blue [SEP] is the sky blue [SEP]" + 5 * " [PAD]"
    )
    assert batch["token_type_ids"][0, 1].tolist() == 6 * [0] + 5 * [1] + 5 * [0]
    assert batch["attention_mask"][0, 1].tolist() == 11 * [1] + 5 * [0]
    assert batch["labels"].tolist() == [1]
    # Too long a passage loses its end, the answer stays.
    short = rows_of([question], sequence=9).batch_of([question])["input_ids"][0, 1]
    assert words(short) == "[CLS] the sky [SEP] is the sky blue [SEP]"


def test_every_question_is_asked_once_in_an_epoch() -> None:
    questions = [Question("sky", ("yes", "no"), number % 2) for number in range(7)]
    questions = [replace(q, article=WORDS[4 + number]) for number, q in enumerate(questions)]
    rows = rows_of(questions, batch=7)
    first, second = (rows("train", number, 0, 7)["input_ids"][:, 0, 1] for number in (0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(4, 11))
    assert first.tolist() != second.tolist()
    parts = [rows("train", 0, *part)["input_ids"][:, 0, 1] for part in ((0, 3), (3, 4))]
    assert torch.cat(parts).tolist() == first.tolist()
    assert rows("train", 0, 0, 0)["input_ids"].shape == (0, 2, 16)


class CountsYes(nn.Module):
    """Its score of a text is how often "yes" is in it."""

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Tensor) -> ChoiceOutput:
        return ChoiceOutput(None, (input_ids == WORDS.index("yes")).sum(-1).double())


def test_accuracy_of_known_answers() -> None:
    asked = ("no", "yes", "yes yes", "no no")
    questions = [Question("sky", asked, right) for right in (2, 2, 1, 0, 2, 3)]
    score = choice_accuracy(CountsYes(), rows_of(questions), questions, "cpu")
    assert (score.value, score.count) == (3 / 6, 6)


@pytest.fixture(scope="module")
def race(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions whose right answer is the colour that the passage names, and a BERT's weights."""
    folder = tmp_path_factory.mktemp("race") / "RACE"
    write_passages(folder, 40)
    write_weights(folder.parent / "weights")
    return folder


def config_of(race: Path, folder: Path, *changes: str) -> RunConfig:
    return small_config(
        race, f"--folder={folder}", "--model=bert", "--model.norm=post", "--model.layers=1",
        f"--model.weights={race.parent / 'weights'}", "--data.objective=choices",
        f"--data.source={race}", f"--data.tokenizer={race.parent / 'weights' / 'tokenizer.json'}",
        "--data.held_out_every=4", "--training.steps=20", "--optimizer.learning_rate=1e-2",
        "--checkpoint.every=20",
        "--evaluation.every=20", *changes,
    )  # fmt: skip


def learned(_: int, config: RunConfig, source: str) -> tuple[tuple[float, ...], Any, float]:
    """The losses of a run, the last held-out one, and the accuracy of what was saved."""
    result = run_training(config)
    trained = open_trained(Path(config.folder))
    assert isinstance(trained.rows, ChoiceRows)
    score = choice_accuracy(trained.module, trained.rows, read_questions(source), trained.device)
    return result.losses, result.held_out, score.value


@pytest.mark.broad
def test_fine_tuning(race: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A body that comes from elsewhere, with dropout: split over ranks it learns the same."""
    alone = config_of(race, tmp_path / "one")
    spread = config_of(race, tmp_path / "two", "--parallel.mesh=dp=2")
    losses, held_out, score = learned(0, alone, str(race))
    told = capfd.readouterr().err
    assert "choice_head.weight, choice_head.bias drawn anew" in told
    assert "head_bias" in told.partition("drawn anew")[2]
    assert losses[-1] < 0.5 < 1.0 < losses[0]
    assert score == 1.0
    for result in run_processes(learned, 2, spread, str(race)):
        assert result[0] == pytest.approx(losses, rel=1e-9)
        assert result[1:] == (pytest.approx(held_out, rel=1e-9), 1.0)


def test_the_tokenizer_must_be_named(race: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="for multiple choice"):
        run_on(1, config_of(race, tmp_path, "--data.tokenizer=wordpiece"))


@pytest.mark.parametrize("key", ["limit_bytes=100", "field=article", "subset=high", "split=test"])
def test_keys_that_questions_do_not_have_are_refused(race: Path, tmp_path: Path, key: str) -> None:
    with pytest.raises(CorpusError, match=f"data.{key.partition('=')[0]} = .* multiple choice"):
        run_on(1, config_of(race, tmp_path, f"--data.{key}"))


def test_rows_are_longer_than_their_marks() -> None:
    question = Question("sky", ("yes", "no"), 0)
    assert words(rows_of([question], 4, 4).batch_of([question])["input_ids"][0, 0]) == (
        "[CLS] [SEP] yes [SEP]"
    )
    with pytest.raises(CorpusError, match=r"data\.sequence = 3 for multiple choice"):
        rows_of([question], 4, 3)


def test_the_body_is_a_berts() -> None:
    sizes = BertConfig(1, 24, 3, len(WORDS), 16, sentence_order=True)
    body = {name for name, _ in Bert(sizes).named_parameters() if "head" not in name}
    chooser = BertForChoices(replace(sizes, sentence_order=False))
    assert {name for name, _ in chooser.named_parameters() if "head" not in name} == body
    output = chooser(**chooser.example_inputs(3, 8))
    assert output.logits.shape == (3, 4)
    assert output.loss is not None
