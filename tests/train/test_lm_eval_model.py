"""Answers to lm-eval's three kinds of requests, from made models and from split ones."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from counting_model import Counting, tokenizer
from processes import run_processes
from torch import nn
from traces import trace_ahead

import autoparallel
from autoparallel.train.config import TrainingError
from autoparallel.train.config_text import read_config
from autoparallel.train.lm_eval_model import LanguageModel
from autoparallel.train.models import GPT, GPTConfig
from autoparallel.train.trained import Trained, open_trained

pytestmark = pytest.mark.usefixtures("one_trace")

RIGHT, WRONG = math.log(0.5), math.log(0.05)
TEXT = "a b c d e f g h xy a b"  # twelve tokens; "a" does not come after "y"


@dataclass(frozen=True)
class Request:
    """What the harness's Instance has of importance."""

    args: tuple[Any, ...]


def asked(module: nn.Module, sequence: int = 5, *, named: Any = None, shifts: bool = False) -> Any:
    changes = [f"--data.sequence={sequence}", f"--data.objective={'same' if shifts else 'next'}"]
    config = read_config(None, changes)
    return LanguageModel(
        Trained(module, config, named or tokenizer(), None, torch.device("cpu"), 3)
    )


def requests(*args: tuple[Any, ...]) -> list[Request]:
    return [Request(each) for each in args]


@pytest.mark.parametrize("shifts", [False, True])
def test_loglikelihood(shifts: bool) -> None:
    """A space between both belongs to either; what is too long loses its beginning."""
    model = asked(Counting(0.5, shifts), shifts=shifts)
    given = (
        ("a b", " c"), ("a b ", "c"), ("a b", " d"), ("a", " b c e"), ("c d e f g h", " xy"),
        ("a", ""), ("a", " b c d e f g h"),
    )  # fmt: skip
    answers = model.loglikelihood(requests(*given))
    assert [greedy for _, greedy in answers] == [True, True, False, False, True, True, True]
    window = 5 if shifts else 6
    expected = [RIGHT, RIGHT, WRONG, 2 * RIGHT + WRONG, 2 * RIGHT, 0.0, (window - 1) * RIGHT]
    assert [value for value, _ in answers] == pytest.approx(expected, rel=1e-12)
    assert all(type(value) is float and type(greedy) is bool for value, greedy in answers)


@pytest.mark.parametrize("sequence", [3, 4, 5, 20])
def test_loglikelihood_rolling(sequence: int) -> None:
    """Every token but the first is scored once, whatever the windows are."""
    module = Counting(0.5)
    answers = asked(module, sequence).loglikelihood_rolling(requests((TEXT,), ("a",)))
    assert answers == pytest.approx([10 * RIGHT + WRONG, 0.0], rel=1e-12)
    assert module.read == (11 if sequence == 20 else -(-11 // sequence) * sequence)


def test_a_text_begins_after_an_end() -> None:
    """Where the tokenizer has a token for it: it is followed by "?", by Counting's arithmetic."""
    ending = tokenizer()
    ending.add_special_tokens(["</s>"])
    module = Counting(0.5)
    module.table = nn.Parameter(torch.nn.functional.pad(module.table.detach(), (0, 1, 0, 1)))
    model = asked(module, 20, named=ending)
    # From "</s>" all twelve tokens are as likely.
    assert model.loglikelihood_rolling(requests(("a",))) == pytest.approx([-math.log(12)])
    assert model.loglikelihood(requests(("", "a")))[0][0] == pytest.approx(-math.log(12))


def test_nothing_is_asked_after_nothing() -> None:
    """Without a token that begins texts the first one would be left out of the sum."""
    module = Counting(0.5)
    model = asked(module)
    assert model.loglikelihood(requests(("a", ""))) == [(0.0, True)]
    assert module.read == 0
    with pytest.raises(TrainingError, match="likelihood of 'a' after nothing"):
        model.loglikelihood(requests(("", "a")))
    with pytest.raises(TrainingError, match="an answer after nothing"):
        model.generate_until(requests((" ", {})))


def test_tokens_that_grow_over_the_boundary() -> None:
    """ "de" is one token after "a d", so that of "e" none would be left to be scored."""
    grown = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({**{w: n for n, w in enumerate("abcdefghxy?")}, "de": 5}, "?")
    )
    grown.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    answers = asked(Counting(0.5), named=grown).loglikelihood(requests(("c d", "e"), ("d", "f")))
    assert answers == [(pytest.approx(RIGHT), True), (pytest.approx(WRONG), False)]


@pytest.mark.parametrize("objective", ["masked", "choices"])
def test_a_model_of_other_labels_is_refused(objective: str) -> None:
    config = read_config(None, [f"--data.objective={objective}", "--model=bert"])
    trained = Trained(Counting(0.5), config, tokenizer(), None, torch.device("cpu"), 3)
    with pytest.raises(TrainingError, match="trained on other labels"):
        LanguageModel(trained)


def test_an_answer_leaves_place_for_its_context() -> None:
    model = asked(Counting(0.5), 8)
    assert model.generate_until(requests(("a b c d", {}))) == ["e f g h"]
    for most in (9, 0):
        with pytest.raises(TrainingError, match=f"max_gen_toks = {most}"):
            model.generate_until(requests(("a b", {"max_gen_toks": most})))
    assert model.generate_until(requests(("a b", {"max_gen_toks": 1, "until": [""]}))) == ["c"]


def test_generate_until() -> None:
    model = asked(Counting(0.5), 12)
    given = (
        ("a b", {"until": ["g", "f"], "max_gen_toks": 9}),
        ("a b", {"until": "e", "do_sample": False, "temperature": 0.7}),
        ("a b c", {"until": [], "max_gen_toks": 2}),
    )
    assert model.generate_until(requests(*given)) == ["c d e ", "c d ", "d e"]
    drawn = model.generate_until(requests(("a", {"do_sample": True, "max_gen_toks": 8})))
    assert drawn != model.generate_until(requests(("a", {"max_gen_toks": 8})))


def gpt() -> Any:
    torch.manual_seed(0)
    return GPT(GPTConfig(1, 16, 4, 11, positions=8, dropout=0.0)).double().eval()


def answers_of(module: nn.Module) -> tuple[Any, ...]:
    model = asked(module, 8)
    return (
        model.loglikelihood(requests(("a b", " c d"), ("c d e f g h", " xy"), ("d", " e"))),
        model.loglikelihood_rolling(requests((TEXT,))),
    )


def on_ranks(count: int) -> tuple[Any, ...]:
    inputs = gpt().example_inputs(2, 8)
    return answers_of(autoparallel.autoparallelize(gpt(), count, example_inputs=inputs))


def on_rank(_: int) -> tuple[Any, ...]:
    return on_ranks(2)


def test_a_split_model_answers_alike() -> None:
    likely, rolling = answers_of(gpt())
    for result in run_processes(on_rank, 2, before=partial(trace_ahead, on_ranks, 1)):
        for (value, greedy), (expected, same) in zip(result[0], likely, strict=True):
            assert (value, greedy) == (pytest.approx(expected, rel=1e-12), same)
        assert result[1] == pytest.approx(rolling, rel=1e-12)


@pytest.mark.parametrize(
    ("beside", "begin", "ends"),
    [
        ({}, 11, (12, 13)),
        ({"bos_token": None, "eos_token": {"content": "<|more|>"}}, 13, (13, 12)),
        ({"bos_token": "<|more|>", "eos_token": "a"}, 13, (12, 13)),  # "a" is an ordinary token
    ],
)
def test_texts_begin_and_end_as_a_folder_says(
    tmp_path: Path, beside: Any, begin: int, ends: tuple[int, ...]
) -> None:
    """Of transformers: the sum of log p is that of the plain model after the same token."""
    transformers = pytest.importorskip("transformers")
    ending = tokenizer()
    ending.add_special_tokens(["<s>", "<|stop|>", "<|more|>"])
    ending.save(str(tmp_path / "tokenizer.json"))
    torch.manual_seed(0)
    plain = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=14, n_positions=16, n_embd=8, n_layer=1, n_head=2,
        bos_token_id=11, eos_token_id=[12, 13],
    )).eval()  # fmt: skip
    plain.save_pretrained(tmp_path)
    if beside:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(beside))
    trained = open_trained(tmp_path)
    assert (trained.begin, trained.ends) == (begin, ends)
    (answer,) = LanguageModel(trained).loglikelihood(requests(("", "a b")))
    likely = plain(torch.tensor([[begin, 0, 1]])).logits.detach().double().log_softmax(-1)
    assert answer[0] == pytest.approx(float(likely[0, 0, 0] + likely[0, 1, 1]), rel=1e-5)


@pytest.mark.optional
@pytest.mark.filterwarnings("ignore")
def test_the_harness_takes_it(tmp_path: Path) -> None:
    """Its own evaluation of a made task, whose answers are known."""
    harness = pytest.importorskip("lm_eval")
    from lm_eval.api.task import ConfigurableTask

    asked_rows = [{"text": "a b", "word": " c"}, {"text": "d e", "word": " f"}]
    rows = [*asked_rows, {"text": "a", "word": " c"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = ConfigurableTask(
        config={
            "task": "letters", "dataset_path": "json", "output_type": "loglikelihood",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
            "test_split": "test", "doc_to_text": "{{text}}", "doc_to_target": "{{word}}",
            "target_delimiter": "", "metric_list": [{"metric": "acc"}],
        }
    )  # fmt: skip
    result = harness.evaluate(asked(Counting(0.5)), {"letters": task}, bootstrap_iters=0)
    assert result["results"]["letters"]["acc,none"] == pytest.approx(2 / 3)
