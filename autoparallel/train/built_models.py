"""The model of a run: a bundled one, one of transformers, or what a function of the user's returns.

The same seed gives the same weights in every process; nothing here knows that there are others.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoparallel.support.json_text import read_other_json
from autoparallel.train.choice_model import BertForChoices
from autoparallel.train.config import TrainingError
from autoparallel.train.models import GPT, Bert, BertConfig, GPTConfig
from autoparallel.train.rows import user_function
from autoparallel.train.run_config import ModelConfig, RunConfig

__all__ = ["build_model", "objective_of", "require_rows_fit"]


def build_model(config: RunConfig, vocabulary: int) -> nn.Module:
    """Return the plain model, in training mode, with weights of the run's seed.

    vocabulary: the tokens of the tokenizer. With `model.meta` it is on the meta device. Raises
    TrainingError for a model that there is not, for arguments that it does not take, and for an
    embedding with fewer rows than the text has tokens.

    >>> build_model(RunConfig(), 300).token_embedding.weight.shape
    torch.Size([300, 256])
    """
    model = config.model
    if model.vocabulary and model.vocabulary < vocabulary:
        raise TrainingError(
            f"model.vocabulary = {model.vocabulary}, and the tokenizer has {vocabulary} tokens",
            why="each token is a row of the embedding",
            fix=f"give data.vocabulary = {model.vocabulary}, too, or no smaller model.vocabulary",
        )
    rows = model.vocabulary or vocabulary
    if model.is_bundled and not rows:
        raise TrainingError(
            "nothing says how many tokens there are",
            why=f"the rows come from {config.data.source}",
            fix="give model.vocabulary",
        )
    torch.manual_seed(config.training.seed)
    with torch.device("meta" if model.meta else "cpu"):
        built = _make(model, rows, config.data.sequence, objective_of(config))
    # What a plan is made of by the same name: a model and its example inputs.
    if isinstance(built, tuple) and len(built) == 2:
        built, _ = built
    if not isinstance(built, nn.Module):
        raise TrainingError(
            f"{model.kind} returned {type(built).__name__}",
            why="a model is a torch.nn.Module",
            fix="return one whose forward returns the loss",
        )
    return built.double().train() if config.training.precision == "float64" else built.train()


def require_rows_fit(model: nn.Module, example: Mapping[str, Any]) -> None:
    """Raise TrainingError unless the model's forward takes rows by the names that they have.

    Example: `require_rows_fit(model, {"input_ids": tokens, "labels": tokens})`
    """
    signature = inspect.signature(model.forward)
    try:
        signature.bind(**example)
    except TypeError:
        name = type(model).__name__
        raise TrainingError(
            f"{name}.forward does not take {' and '.join(example)}",
            why=f"rows are given by these names, and it takes {signature}",
            fix="call its arguments so; forward returns the loss",
        ) from None


def objective_of(config: RunConfig) -> str:
    """Return the labels that the model learns from: "next", "same", "masked" or "choices"."""
    kind = config.model.kind
    if config.data.objective != "auto":
        return config.data.objective
    if kind == "bert":
        return "masked"
    if kind.startswith("hf:"):
        name = _architecture(Path(kind[3:])) if kind.endswith(".json") else kind
        if name.endswith("ForMultipleChoice"):
            return "choices"
        return "masked" if name.endswith(("MaskedLM", "ForPreTraining")) else "same"
    return "next"


def _make(model: ModelConfig, vocabulary: int, sequence: int, objective: str) -> Any:
    """Return the model of a kind, on torch's default device."""
    if model.kind == "gpt":
        return GPT(GPTConfig(
            model.layers, model.hidden, model.heads, vocabulary, sequence, model.dropout
        ))  # fmt: skip
    if model.kind == "bert":
        chooses = objective == "choices"
        return (BertForChoices if chooses else Bert)(BertConfig(
            model.layers, model.hidden, model.heads, vocabulary, sequence, dropout=model.dropout,
            norm=model.norm, sentence_order=model.sentence_order and not chooses,
        ))  # fmt: skip
    if model.kind.startswith("hf:"):
        return _of_transformers(model.kind[3:], model.options, vocabulary, sequence)
    function = user_function(model.kind)
    try:
        return function(**model.options)
    except TypeError as error:
        raise TrainingError(
            f"{model.kind} cannot be called with model.options",
            why=str(error),
            fix="give the arguments that it takes in [model.options]",
        ) from error


def _of_transformers(name: str, options: Mapping[str, Any], vocabulary: int, sequence: int) -> Any:
    """Return a model of transformers: by its class, or by a config.json."""
    try:
        import transformers
    except ImportError as error:
        raise TrainingError(
            f"model.kind = 'hf:{name}' needs the library transformers",
            why=str(error),
            fix='pip install "torch-autoparallel[huggingface]"',
        ) from error
    if name.endswith(".json"):
        file = Path(name).expanduser()
        architecture = _architecture(file)
        kind = _class_of(transformers, architecture)
        table = {**read_other_json(file.read_text()), **options}
        table.pop("architectures", None)
        return kind(kind.config_class.from_dict({**table, "vocab_size": vocabulary}))
    kind = _class_of(transformers, name)
    known = kind.config_class().to_dict()
    strange = [key for key in options if key not in known]
    if strange:
        near = difflib.get_close_matches(strange[0], known, 1)
        raise TrainingError(
            f"model.options has {strange[0]!r}, which {kind.config_class.__name__} does not know",
            why="it would be kept, and change nothing",
            fix=f"do you mean {near[0]}?" if near else "see the library's documentation",
        )
    sizes: dict[str, Any] = {"vocab_size": vocabulary, **options}
    for size in ("max_position_embeddings", "n_positions"):
        if size in known and size not in options:
            sizes[size] = sequence
    # Their numbers are those of the tokenizer that the published weights came with.
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(known.get(token), int) and known[token] >= vocabulary:
            sizes.setdefault(token, None)
    return kind(kind.config_class(**sizes))


def _class_of(transformers: Any, name: str) -> Any:
    """Return a class of transformers by its name."""
    kind = getattr(transformers, name, None)
    if kind is None or getattr(kind, "config_class", None) is None:
        near = difflib.get_close_matches(name, [n for n in dir(transformers) if "For" in n], 1)
        raise TrainingError(
            f"transformers has no model {name!r}",
            why="model.kind = 'hf:CLASS' is the name of a class, such as LlamaForCausalLM",
            fix=f"do you mean {near[0]}?" if near else "see the library's documentation",
        )
    return kind


def _architecture(file: Path) -> str:
    """Return the class that a config.json is of."""
    try:
        rows = read_other_json(file.expanduser().read_text())
        return str(rows["architectures"][0])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise TrainingError(
            f"no model in {file}",
            why=f"{type(error).__name__}: {error}",
            fix='name a config.json of transformers, with "architectures"',
        ) from error
