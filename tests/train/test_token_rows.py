"""Rows follow from the seed and the number of the batch alone, from any text and tokenizer."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import write_text

from autoparallel.train.config import TrainingError
from autoparallel.train.config_text import read_config
from autoparallel.train.documents import CorpusError
from autoparallel.train.models import IGNORED_LABEL
from autoparallel.train.rows import FunctionRows, TokenRows, permuted
from autoparallel.train.run_config import DataConfig
from autoparallel.train.token_files import TokenFiles, open_tokens, prepare_tokens, text_source


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_text(folder)
    return folder


def data(folder: Path, *changes: str) -> DataConfig:
    return read_config(
        None,
        [
            f"--data.source={folder / 'text'}", f"--data.cache={folder / 'cache'}",
            "--data.vocabulary=300", "--data.sequence=16", "--data.held_out_every=5", *changes,
        ],
    ).data  # fmt: skip


def tokens_of(config: DataConfig) -> TokenFiles:
    return open_tokens(prepare_tokens(config))


@pytest.mark.parametrize("count", [1, 2, 3, 100, 1000, 4097])
def test_an_order_has_every_place_once(count):
    places = [permuted(index, count, "a") for index in range(count)]
    assert sorted(places) == list(range(count))
    if count >= 100:
        assert places != [permuted(index, count, "b") for index in range(count)]
        # Neighbours are no neighbours: about one in `count` is by chance.
        assert sum(b - a == 1 for a, b in pairwise(places)) < 10


def test_tokens_spell_the_text(text):
    tokens = tokens_of(data(text))
    names = sorted(path.name for path in (text / "text").iterdir())
    assert tokens.train.dtype == np.uint16
    for part, chosen in (
        ("held_out", names[4::5]),
        ("train", [n for n in names if n not in names[4::5]]),
    ):
        spelt = tokens.tokenizer().decode(getattr(tokens, part).tolist(), skip_special_tokens=True)
        assert spelt == "".join((text / "text" / name).read_text() for name in chosen)


def test_files_are_made_once_and_again_for_another_text(text, tmp_path):
    config = data(text)
    folder, said = prepare_tokens(config), []
    before = (folder / "train").stat().st_mtime_ns
    assert prepare_tokens(config, said.append) == folder
    assert (folder / "train").stat().st_mtime_ns == before
    assert said == []
    assert prepare_tokens(replace(config, vocabulary=310)) != folder
    (tmp_path / "one.txt").write_text("a b c " * 100)
    other = replace(config, source=str(tmp_path / "one.txt"))
    first = prepare_tokens(other)
    (tmp_path / "one.txt").write_text("a b d " * 101)
    assert prepare_tokens(other) != first
    (first / "train").write_bytes(b"")
    with pytest.raises(CorpusError, match="cannot be read"):
        open_tokens(first)


def test_every_epoch_has_every_row_once_in_another_order(text):
    tokens = tokens_of(data(text))
    rows = TokenRows(tokens, batch=5, sequence=16, objective="next", seed=3)
    total = (len(tokens.train) - 1) // 16
    # Batches go over the end of an epoch.
    seen = [tuple(row.tolist()) for number in range(2 * total // 5 + 1)
            for row in rows("train", number, 0, 5)["input_ids"]]  # fmt: skip
    epochs = seen[:total], seen[total : 2 * total]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]
    lines = torch.from_numpy(tokens.train[: total * 16].astype(np.int64)).view(-1, 16)
    assert sorted(epochs[0]) == sorted(tuple(line.tolist()) for line in lines)


@pytest.mark.parametrize("objective", ["next", "same", "masked"])
def test_parts_of_a_batch_are_its_rows(text, objective):
    """So ranks may read any part, and a run goes on at any number of them."""
    tokens = tokens_of(data(text, "--data.tokenizer=wordpiece"))
    rows = TokenRows(tokens, 6, 16, objective, seed=1, segments=objective == "masked")
    whole = rows("train", 7, 0, 6)
    parts = [rows("train", 7, first, count) for first, count in ((0, 2), (2, 3), (5, 1), (6, 0))]
    for name, value in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), value)
    if objective == "next":
        assert torch.equal(whole["input_ids"][:, 1:], whole["labels"][:, :-1])
    if objective == "same":
        assert torch.equal(whole["input_ids"], whole["labels"])


def test_masked_rows(text):
    """Marks stay, each row predicts as many, and hidden tokens are the text's own."""
    tokens = tokens_of(data(text, "--data.tokenizer=wordpiece"))
    marks = tokens.marks
    rows = TokenRows(tokens, 200, 16, "masked", seed=1, segments=True, masked_fraction=0.3)
    batch = rows("train", 0, 0, 200)
    ids, labels, types = batch["input_ids"], batch["labels"], batch["token_type_ids"]
    chosen = labels != IGNORED_LABEL
    assert chosen.sum(1).tolist() == [round(0.3 * 13)] * 200
    assert not chosen[:, [0, 7, 15]].any()
    assert (ids[:, 0] == marks.first).all()
    assert (ids[:, [7, 15]] == marks.between).all()
    assert types[0].tolist() == [0] * 8 + [1] * 8
    shares = [
        float((ids[chosen] == marks.mask).double().mean()),
        float((ids[chosen] == labels[chosen]).double().mean()),
    ]
    assert shares == pytest.approx([0.8, 0.1], abs=0.05)
    others = ids[chosen & (ids != marks.mask) & (ids != labels)]
    assert not torch.isin(others, torch.tensor(marks.special)).any()
    assert 0.3 < batch["sentence_order_labels"].double().mean() < 0.7
    # Swapped segments are the same text, the other way round.
    plain = torch.where(chosen, labels, ids)
    lines = {tuple(line) for line in tokens.train[: len(tokens.train) // 13 * 13].reshape(-1, 13)}
    for row, swapped in zip(plain, batch["sentence_order_labels"], strict=True):
        one, two = row[1:7], row[8:15]
        assert tuple(torch.cat([two, one] if swapped else [one, two]).tolist()) in lines


def test_other_sources(text, tmp_path, monkeypatch):
    """Lines of JSON, a data set, a tokenizer from a file, and one document alone."""
    lines = [{"body": f"text {number} of the lines"} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = data(text, f"--data.source={tmp_path / 'rows.jsonl'}", "--data.field=body")
    from_lines = tokens_of(config)
    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda name, subset, split, streaming: iter(lines)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    from_set = tokens_of(replace(config, source="hf:some/name"))
    assert from_set.train.tolist() == from_lines.train.tolist()
    (tmp_path / "tokenizer.json").write_text(from_lines.tokenizer_json)
    named = tokens_of(replace(config, tokenizer=str(tmp_path)))
    assert named.train.tolist() == from_lines.train.tolist()
    (tmp_path / "one.txt").write_text("word " * 500)
    alone = tokens_of(data(text, f"--data.source={tmp_path / 'one.txt'}"))
    assert len(alone.held_out) > 10
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError, match="needs the library datasets"):
        tokens_of(replace(config, source="hf:some/other"))


def test_a_limit_cuts_the_text(text):
    source = text_source(data(text, "--data.limit_bytes=700"))
    documents = list(source.documents())
    assert sum(len(document.text) for document in documents) == 700


def test_a_function_of_the_users_makes_rows():
    batch = FunctionRows("faulty_rows:good")("train", 1, 2, 3)
    assert batch["x"].shape == (3, 4)
    with pytest.raises(TrainingError, match="returned no batch of 2 rows"):
        FunctionRows("faulty_rows:none")("train", 1, 2, 2)
