"""Text to batches: every text read, cached and cut the same way by every process."""

import pytest
import torch

from autoparallel.support import cache_files as files
from autoparallel.train import data
from autoparallel.train.data import Batches, Objective, prepare_corpus, read_corpus
from autoparallel.train.documents import CorpusError

VOCABULARY = 301


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """Thirty small documents, one hidden and one binary."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(30):
        words = " ".join(f"word{(number * 7 + place) % 23}" for place in range(60))
        (folder / f"{number:02}.txt").write_text(f"def function_{number}():\n    {words}\n")
    (folder / ".hidden").write_text("secret")
    (folder / "picture.bin").write_bytes(b"\0\1\2")
    (folder / "empty.txt").write_text("\n")
    return folder


@pytest.fixture(scope="module")
def corpus(text_folder, tmp_path_factory):
    return prepare_corpus(
        text_folder, vocabulary=VOCABULARY, cache_folder=tmp_path_factory.mktemp("cache")
    )


def test_default_corpus_is_the_standard_library_in_a_fixed_order():
    documents = read_corpus(limit_bytes=300_000)
    names = [document.name for document in documents]
    assert "_collections_abc.py" in names
    assert names == [document.name for document in read_corpus(limit_bytes=300_000)]
    assert not any(name.startswith(("test/", "site-packages/")) for name in names)
    assert sum(len(document.text.encode()) for document in documents) <= 300_010


def test_folder_leaves_out_hidden_empty_and_binary_files(text_folder):
    names = [document.name for document in read_corpus(text_folder)]
    assert names == [f"{number:02}.txt" for number in range(30)]


def test_limit_cuts_the_last_document(text_folder):
    documents = read_corpus(text_folder, limit_bytes=700)
    assert sum(len(document.text) for document in documents) == 700


def test_tokens_spell_the_text_and_held_out_text_is_apart(text_folder, corpus):
    texts = [document.text for document in read_corpus(text_folder)]
    tokenizer = corpus.tokenizer()
    spelled = tokenizer.decode(corpus.held_out.tolist(), skip_special_tokens=True)
    assert spelled == texts[19]
    spelled = tokenizer.decode(corpus.train.tolist(), skip_special_tokens=True)
    assert spelled == "".join(texts[:19] + texts[20:])
    assert (corpus.train == 0).sum() == 29
    assert corpus.vocabulary == len(tokenizer.get_vocab()) <= VOCABULARY
    assert corpus.train.max() < corpus.vocabulary


def test_a_single_file_holds_out_its_end(tmp_path):
    file = tmp_path / "one.txt"
    file.write_text("".join(f"line {number}\n" for number in range(1000)))
    corpus = prepare_corpus(file, vocabulary=VOCABULARY, cache_folder=tmp_path / "cache")
    tokenizer = corpus.tokenizer()
    parts = [
        tokenizer.decode(part.tolist(), skip_special_tokens=True)
        for part in (corpus.train, corpus.held_out)
    ]
    assert "".join(parts) == file.read_text()
    assert 0 < len(parts[1]) < len(parts[0]) / 10


def test_a_text_cannot_spell_a_special_token(tmp_path):
    file = tmp_path / "one.txt"
    file.write_text("a<|mask|>b<|endoftext|>c\n" * 40)
    corpus = prepare_corpus(file, vocabulary=VOCABULARY, cache_folder=tmp_path / "cache")
    assert (corpus.train < 2).sum() == 1  # the end of the document alone


def test_cache_is_used_and_keyed_by_content_and_options(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    file = tmp_path / "text.txt"
    file.write_text("some words and some more words\n" * 50)
    first = prepare_corpus(file, vocabulary=VOCABULARY, cache_folder=cache)
    assert len(list(cache.iterdir())) == 1

    def fail(*_):
        raise AssertionError("tokenized again")

    with monkeypatch.context() as patch:
        patch.setattr(data, "_tokenize", fail)
        again = prepare_corpus(file, vocabulary=VOCABULARY, cache_folder=cache)
        with pytest.raises(AssertionError, match="tokenized again"):
            prepare_corpus(file, vocabulary=VOCABULARY + 1, cache_folder=cache)
    assert torch.equal(first.train, again.train)
    assert torch.equal(first.held_out, again.held_out)
    assert first.tokenizer_json == again.tokenizer_json

    file.write_text("other words\n" * 50)
    prepare_corpus(file, vocabulary=VOCABULARY, cache_folder=cache)
    assert len(list(cache.iterdir())) == 2


def test_a_broken_cache_file_is_made_again(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("some words and some more words\n" * 50)
    first = prepare_corpus(file, vocabulary=VOCABULARY, cache_folder=tmp_path / "cache")
    (stored,) = (tmp_path / "cache").iterdir()
    stored.write_bytes(stored.read_bytes()[:100])
    again = prepare_corpus(file, vocabulary=VOCABULARY, cache_folder=tmp_path / "cache")
    assert torch.equal(first.train, again.train)


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    file = tmp_path / "text.txt"
    file.write_text("some words\n" * 50)
    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        prepare_corpus(file, vocabulary=VOCABULARY, cache_folder=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_corpora_lie_in_the_common_cache_folder(monkeypatch, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("some words\n" * 50)
    monkeypatch.setenv("AUTOPARALLEL_CACHE", str(tmp_path / "moved"))
    prepare_corpus(file, vocabulary=VOCABULARY)
    assert len(list((tmp_path / "moved" / "corpora").iterdir())) == 1


def test_tokenizer_is_the_same_every_time(text_folder, corpus, tmp_path):
    again = prepare_corpus(text_folder, vocabulary=VOCABULARY, cache_folder=tmp_path)
    assert again.tokenizer_json == corpus.tokenizer_json
    assert torch.equal(again.train, corpus.train)


def test_causal_labels_are_the_next_tokens(corpus):
    batch = Batches(corpus, batch=3, sequence=16).train(5)
    assert batch["input_ids"].shape == batch["labels"].shape == (3, 16)
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])


@pytest.mark.parametrize("objective", Objective)
def test_batches_depend_on_seed_and_step_alone(corpus, objective):
    batches = Batches(corpus, 2, 16, objective, seed=3)
    expected = batches.train(7)["input_ids"]
    torch.manual_seed(99)
    batches.train(8)
    assert torch.equal(batches.train(7)["input_ids"], expected)
    again = Batches(corpus, 2, 16, objective, seed=3).train(7)["input_ids"]
    assert torch.equal(again, expected)
    assert not torch.equal(batches.train(8)["input_ids"], expected)
    other = Batches(corpus, 2, 16, objective, seed=4).train(7)["input_ids"]
    assert not torch.equal(other, expected)
    assert not torch.equal(batches.held_out(7)["input_ids"], expected)


def test_masking_follows_the_published_shares(corpus):
    masked = Batches(corpus, batch=400, sequence=64, objective=Objective.MASKED)
    causal = Batches(corpus, batch=400, sequence=64)
    batch, originals = masked.train(1), causal.train(1)["input_ids"]
    chosen = batch["labels"] != data.IGNORED_LABEL
    assert torch.equal(batch["labels"][chosen], originals[chosen])
    assert torch.equal(batch["input_ids"][~chosen], originals[~chosen])
    hidden = batch["input_ids"][chosen] == 1
    kept = batch["input_ids"][chosen] == originals[chosen]
    assert chosen.float().mean() == pytest.approx(0.15, abs=0.01)
    assert hidden.float().mean() == pytest.approx(0.8, abs=0.03)
    assert kept.float().mean() == pytest.approx(0.1, abs=0.03)


def test_masking_always_leaves_something_to_predict(corpus):
    batches = Batches(corpus, 1, 8, Objective.MASKED, masked_fraction=0.0)
    assert (batches.train(0)["labels"] != data.IGNORED_LABEL).sum() == 1


def test_missing_text_is_named(tmp_path):
    with pytest.raises(CorpusError, match=r"no such file or folder: .*absent"):
        read_corpus(tmp_path / "absent")


@pytest.mark.parametrize("make", [lambda path: path.write_text(" \n"), lambda path: path.mkdir()])
def test_text_without_content_is_refused(tmp_path, make):
    path = tmp_path / "empty"
    make(path)
    with pytest.raises(CorpusError, match=r"no text in .*empty(.|\n)*fix:"):
        read_corpus(path)


def test_too_little_text_says_how_much_is_needed(tmp_path):
    file = tmp_path / "small.txt"
    file.write_text("too small")
    corpus = prepare_corpus(file, vocabulary=VOCABULARY, cache_folder=tmp_path / "cache")
    with pytest.raises(CorpusError, match=r"too little text in .*small.txt(.|\n)*needs 129"):
        Batches(corpus, batch=2, sequence=128)


def test_a_vocabulary_smaller_than_the_bytes_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="at least 258, got 100"):
        prepare_corpus(vocabulary=100, cache_folder=tmp_path)
