"""Files that training reads and did not write: what is wrong with one is said, and nothing runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from training_runs import write_text

from autoparallel.commands.model_names import named_model
from autoparallel.errors import AutoParallelError
from autoparallel.train.built_models import build_model
from autoparallel.train.config_text import read_config
from autoparallel.train.data import prepare_corpus
from autoparallel.train.documents import CorpusError, TextSource
from autoparallel.train.evaluation import read_texts
from autoparallel.train.multiple_choice import read_questions
from autoparallel.train.run_config import DataConfig
from autoparallel.train.token_files import open_tokens, prepare_tokens
from autoparallel.train.weights import import_weights

DEEP = "[" * 10**5


def _build(file: Path) -> object:
    return build_model(read_config(None, [f"--model=hf:{file}"]), 300)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a text of JSON lines": ("text.jsonl", lambda file: list(TextSource(str(file)).documents())),
    "passages to evaluate": ("passages.jsonl", read_texts),
    "questions": ("questions.json", read_questions),
    "the contents of token files": ("contents.json", lambda file: open_tokens(file.parent)),
    "an index of weights": (
        "model.safetensors.index.json",
        lambda file: import_weights(nn.Linear(2, 2), file.parent),
    ),
    "a configuration": ("run.toml", lambda file: read_config(str(file))),
    "a model's configuration": ("config.json", _build),
    "a configuration to plan": ("config.json", lambda file: named_model(f"hf:{file}")),
}


@pytest.mark.parametrize("what", READERS)
@pytest.mark.parametrize("text", [f"a = {DEEP}", DEEP, "7", '{"weight_map": [3]}', "\0"])
def test_a_file_of_another_kind_is_refused(what: str, text: str, tmp_path: Path) -> None:
    """Nesting without end, other types than are looked for, and characters that are none."""
    name, read = READERS[what]
    (tmp_path / name).write_text(text)
    with pytest.raises(AutoParallelError):
        read(tmp_path / name)


@pytest.mark.parametrize("change", [{"dtype": "object"}, {"dtype": []}, {"tokens": "many"}])
def test_token_files_have_numbers_alone(change: dict[str, Any], tmp_path: Path) -> None:
    """Objects of Python would be read as addresses."""
    write_text(tmp_path)
    keys = [f"--data.source={tmp_path / 'text'}", f"--data.cache={tmp_path / 'cache'}"]
    folder = prepare_tokens(read_config(None, [*keys, "--data.vocabulary=300"]).data)
    contents = json.loads((folder / "contents.json").read_text())
    (folder / "contents.json").write_text(json.dumps({**contents, **change}))
    with pytest.raises(CorpusError, match="cannot be read"):
        open_tokens(folder)


@pytest.mark.parametrize("metadata", [None, {"tokenizer": "{}"}, {"other": "text"}])
def test_a_cached_corpus_without_its_tokenizer_is_made_again(
    metadata: dict[str, str] | None, tmp_path: Path
) -> None:
    file, cache = tmp_path / "text.txt", tmp_path / "cache"
    file.write_text("some words and some more words\n" * 50)
    first = prepare_corpus(file, vocabulary=300, cache_folder=cache)
    (stored,) = cache.iterdir()
    tokens = {"train": torch.zeros(4, dtype=torch.int32), "held_out": torch.zeros(4)}
    safetensors.torch.save_file(tokens, stored, metadata)
    again = prepare_corpus(file, vocabulary=300, cache_folder=cache)
    assert torch.equal(first.train, again.train)


def test_a_user_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("AUTOPARALLEL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(CorpusError, match="no folder for the token files") as caught:
        prepare_tokens(DataConfig())
    assert "set AUTOPARALLEL_CACHE" in caught.value.why
