"""Configurations as text: shipped ones are whole, what is resolved is read again."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from broad_cases import broad

from autoparallel.train.config import TrainingError
from autoparallel.train.config_text import (
    config_to_toml,
    known_keys,
    read_config,
    shipped_configs,
)
from autoparallel.train.dry_run import dry_run
from autoparallel.train.run_config import OptimizerConfig, ScheduleConfig
from autoparallel.train.run_log import RunLog
from autoparallel.train.schedule import rate_factor
from autoparallel.train.train_command import train_command

pytestmark = pytest.mark.usefixtures("one_trace")

# The papers' numbers of parameters, in millions: of Shoeybi et al. 2019, tables 2 and 5.
SIZES = {
    "gpt2-small": 124, "gpt2-355m": 355, "gpt2-2.5b": 2500, "gpt2-8.3b": 8300,
    "bert-336m": 336, "bert-1.3b": 1300, "bert-3.9b": 3900, "gpt3-175b": 175_000,
    "llama3-8b": 8030,
}  # fmt: skip


@pytest.mark.parametrize("name", shipped_configs())
def test_what_is_resolved_is_read_again(name, tmp_path):
    config = read_config(name)
    (tmp_path / "resolved.toml").write_text(config_to_toml(config))
    assert read_config(str(tmp_path / "resolved.toml")) == config


def test_keys_of_the_command_line_are_typed():
    config = read_config(
        "moe-tiny",
        [
            "--model.options.num_local_experts=4", '--parallel.constraints=["* is whole"]',
            "--optimizer.learning-rate=1", "--folder=out/a b", "--model=hf:OlmoeForCausalLM",
        ],
    )  # fmt: skip
    assert config.model.options["num_local_experts"] == 4
    assert config.model.options["hidden_size"] == 128
    assert config.parallel.constraints == ("* is whole",)
    assert config.optimizer.learning_rate == 1.0
    assert config.folder == "out/a b"
    assert config.model.kind == "hf:OlmoeForCausalLM"


def test_help_lists_every_key(capsys):
    assert train_command(["--help"]) == 0
    text = capsys.readouterr().out
    for path, _, meaning in known_keys():
        assert f"--{path}=" in text
        assert meaning


@pytest.mark.parametrize("name", ["gpt2-355m", *broad("bert-336m")])
def test_a_dry_run_needs_nothing(name, capsys):
    """The plan, the figures and what would be logged, of a model that no memory here holds."""
    assert train_command([name, "--dry-run", "--ranks=8", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows["parameters"] / 1e6 == pytest.approx(SIZES[name], rel=0.06)
    assert 0.1 < rows["predicted_mfu"] < 0.9
    assert rows["predicted_nbytes"] < 80 * 2**30
    assert {"loss", "mfu", "tokens_per_second"} <= set(rows["logged"])


@pytest.mark.broad
@pytest.mark.parametrize("name", SIZES)
def test_shipped_models_have_their_papers_sizes(name):
    ranks = {"gpt3-175b": 64, "gpt2-8.3b": 64, "bert-3.9b": 32, "llama3-8b": 32}.get(name, 8)
    run = dry_run(read_config(name), ranks)
    assert run.parameters / 1e6 == pytest.approx(SIZES[name], rel=0.06)
    assert run.nbytes < 80 * 2**30
    assert "tokens/s" in str(run)


def test_rates():
    config = ScheduleConfig(warmup=10, final_fraction=0.1)
    rates = [rate_factor(config, step, 100) for step in range(101)]
    assert rates[:2] == pytest.approx([0.1, 0.2])
    assert rates[9:11] == pytest.approx([1.0, 1.0])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert rate_factor(ScheduleConfig(warmup=0, decay_steps=50), 80, 100) == pytest.approx(0.1)
    assert rate_factor(ScheduleConfig(kind="constant", warmup=0), 80, 100) == 1.0


def test_norms_and_biases_do_not_decay():
    from autoparallel.train.models import Bert, BertConfig
    from autoparallel.train.optimizers import make_optimizers

    model = Bert(BertConfig(1, 16, 2, 31, positions=8, sentence_order=True))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, adamw = make_optimizers(model, OptimizerConfig(kind="muon"))
    inside = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert "blocks.0.feed_forward.expand.weight" in inside
    assert not [name for name in inside if "embedding" in name or "norm" in name]
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in adamw.param_groups)
    assert "token_embedding.weight" in decayed
    assert all(name.endswith("bias") or "norm" in name for name in kept)
    assert inside | decayed | kept == set(names.values())


def test_tensorboard_is_told_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = read_config(None, ["--log.tensorboard=true"]).log
    with pytest.raises(TrainingError, match="TensorBoard is not installed"):
        RunLog(config, tmp_path, enabled=True)
    RunLog(config, tmp_path, enabled=False)  # it writes on rank 0 alone


@pytest.mark.usefixtures("one_trace")
def test_a_run_on_bf16_keeps_master_weights(tmp_path):
    """Weights, moments and gradients stay float32; the loss is near that of float32."""
    from training_runs import small_config, write_text

    from autoparallel.train.prepared_run import Run
    from autoparallel.train.runner import run_training

    write_text(tmp_path)
    losses = {}
    for precision in ("float32", "bf16"):
        config = small_config(
            tmp_path, f"--training.precision={precision}", f"--folder={tmp_path / precision}"
        )
        losses[precision] = run_training(config).losses
    assert losses["bf16"] == pytest.approx(losses["float32"], rel=2e-2)
    assert losses["bf16"] != losses["float32"]
    run = Run(config, RunLog(config.log, tmp_path, enabled=False), torch.device("cpu"))
    run.gradients(0)
    assert {p.grad.dtype for p in run.module.parameters()} == {torch.float32}
    assert {p.dtype for p in run.module.parameters()} == {torch.float32}
