"""The bundled plain models: sizes, meaning, and that they trace."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from autoparallel.train.built_models import build_model
from autoparallel.train.config_text import read_config
from autoparallel.train.models import GPT, Bert, BertConfig, GPTConfig

SMALL_GPT = GPTConfig(layers=2, hidden=24, heads=3, vocabulary=101, positions=19)
SMALL_BERT = BertConfig(layers=2, hidden=24, heads=3, vocabulary=101, positions=19)
MODELS = [(GPT, SMALL_GPT), (Bert, SMALL_BERT)]


@pytest.mark.parametrize(
    ("model_class", "config", "expected"),
    [
        (GPT, GPTConfig.gpt2(), 124_439_808),  # as counted for the published checkpoints
        (GPT, GPTConfig.gpt2_xl(), 1_557_611_200),
        (GPT, GPTConfig.gpt3(), 174_604_259_328),
        (Bert, BertConfig.large(), 335_176_506),  # pre-norm adds one norm, the pooler is left out
    ],
    ids=["gpt2", "gpt2_xl", "gpt3", "bert_large"],
)
def test_published_sizes(model_class: type, config: object, expected: int) -> None:
    """Constructed without memory."""
    with torch.device("meta"):
        model = model_class(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert all(value.is_meta for value in model.example_inputs().values())


@pytest.mark.parametrize(("model_class", "config"), MODELS, ids=["gpt", "bert"])
def test_traces_with_any_batch_and_sequence(model_class: type, config: object) -> None:
    torch.manual_seed(0)
    model = model_class(config).eval()
    inputs = model.example_inputs(3, 7)
    dynamic = {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in inputs}
    exported = torch.export.export(model, (), inputs, dynamic_shapes=dynamic, strict=False)
    other = model.example_inputs(5, 11)
    found, expected = exported.module()(**other), model(**other)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logits, expected.logits)
    assert model(other["input_ids"]).loss is None


def random_model(model_class: type[nn.Module], config: object) -> nn.Module:
    torch.manual_seed(1)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def test_gpt_sees_no_later_token() -> None:
    model = random_model(GPT, SMALL_GPT)
    tokens = model.example_inputs(2, 9)["input_ids"]
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 101
    differs = (model(tokens).logits != model(changed).logits).any(-1)
    assert not differs[:, :5].any()
    assert differs[:, 5:].all()


def test_bert_sees_all_but_padding() -> None:
    model = random_model(Bert, SMALL_BERT)
    inputs = model.example_inputs(2, 9)
    assert inputs["attention_mask"][:, -1].tolist() == [1, 0]
    changed = inputs["input_ids"].clone()
    changed[:, -1] = (changed[:, -1] + 1) % 101
    first, second = (
        model(**inputs).logits != model(**{**inputs, "input_ids": changed}).logits
    ).any(-1)[:, :-1]
    assert first.all()
    assert not second.any()


def test_only_counted_labels_count() -> None:
    model = random_model(GPT, SMALL_GPT)
    inputs = model.example_inputs(2, 9)
    inputs["labels"][:, 3:] = -100
    expected = nn.functional.cross_entropy(
        model(**inputs).logits[:, :3].flatten(0, 1), inputs["labels"][:, :3].flatten()
    )
    torch.testing.assert_close(model(**inputs).loss, expected)


def test_dropout_is_for_training() -> None:
    model = random_model(GPT, SMALL_GPT)
    inputs = model.example_inputs(2, 9)
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    model.train()
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("config_class", [GPTConfig, BertConfig])
def test_heads_must_divide(config_class: type) -> None:
    with pytest.raises(ValueError, match="10 hidden / 3 heads"):
        config_class(hidden=10, heads=3)


def model_and_inputs() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A function as `autoparallel plan` takes it."""
    return nn.Linear(4, 4), {"input": torch.ones(2, 4)}


def test_a_function_that_plans_are_made_of_is_trained() -> None:
    """The example inputs beside the model are for planning."""
    config = read_config(None, [f"--model.kind={__name__}:model_and_inputs"])
    assert isinstance(build_model(config, 0), nn.Linear)
