"""The trainer on a small model: it learns, it repeats itself, and it tells what it did."""

import io
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

from autoparallel.train import progress as progress_module
from autoparallel.train.comparison import Comparison
from autoparallel.train.config import TrainConfig, TrainingError
from autoparallel.train.data import Batches, Objective, prepare_corpus
from autoparallel.train.loop import evaluate, make_optimizer, train
from autoparallel.train.metrics import RunRecord, Traffic, largest_difference
from autoparallel.train.models import GPT, Bert, BertConfig, GPTConfig
from autoparallel.train.outputs import loss_of

CONFIG = TrainConfig(
    steps=12, learning_rate=5e-3, warmup_steps=3, evaluate_every=5, evaluation_batches=2
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    file = folder / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    return prepare_corpus(file, vocabulary=290, cache_folder=folder)


def small_gpt(corpus):
    torch.manual_seed(0)
    sizes = GPTConfig(2, 32, 4, corpus.vocabulary, positions=16, dropout=0.0)
    return GPT(sizes)


def small_run(corpus, config=CONFIG):
    return train(small_gpt(corpus), Batches(corpus, 4, 16), config, name="small")


def test_loss_falls_on_held_out_text(corpus):
    record = small_run(corpus)
    assert record.held_out[-1][1] < record.held_out[0][1] - 0.5
    assert record.held_out[0][1] == pytest.approx(math.log(corpus.vocabulary), abs=0.5)
    assert record.losses[-1] < record.losses[0]


def test_record_tells_every_step(corpus):
    record = small_run(corpus)
    assert len(record.losses) == len(record.step_seconds) == 12
    assert [step for step, _ in record.held_out] == [0, 5, 10, 12]
    assert record.world_size == 1
    assert record.forward == record.backward == record.update == Traffic()
    expected = sum(parameter.numel() for parameter in small_gpt(corpus).parameters())
    assert record.local_parameters == expected


def test_a_run_repeats_itself(corpus):
    assert small_run(corpus).losses == small_run(corpus).losses


def test_masked_model_trains_too(corpus):
    torch.manual_seed(0)
    model = Bert(BertConfig(1, 32, 4, corpus.vocabulary, positions=16, dropout=0.0))
    record = train(model, Batches(corpus, 8, 16, Objective.MASKED), CONFIG)
    assert record.held_out[-1][1] < record.held_out[0][1]


def test_gradients_are_clipped_before_the_step(corpus):
    seen = []

    def finish(model, clip_norm):
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        seen.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())

    config = replace(CONFIG, clip_norm=0.01, steps=3)
    own = train(small_gpt(corpus), Batches(corpus, 4, 16), config, finish_gradients=finish)
    assert seen == pytest.approx([0.01] * 3, rel=1e-3)
    assert own.losses == small_run(corpus, config).losses


def test_learning_rate_rises_then_follows_a_cosine():
    config = TrainConfig(steps=100, learning_rate=1.0, warmup_steps=10, final_fraction=0.1)
    rates = [config.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert config.learning_rate_at(55) == pytest.approx(0.55)
    assert config.learning_rate_at(100) == pytest.approx(0.1)
    assert TrainConfig(steps=1, warmup_steps=0).learning_rate_at(0) > 0


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"evaluate_every": 0}, {"warmup_steps": -1}, {"learning_rate": 0.0}]
)
def test_senseless_options_are_refused(options):
    with pytest.raises(TrainingError, match=next(iter(options))):
        TrainConfig(**options)


def test_only_matrices_decay(corpus):
    model = small_gpt(corpus)
    optimizer = make_optimizer(model, CONFIG)
    for group in optimizer.param_groups:
        matrices = {parameter.ndim >= 2 for parameter in group["params"]}
        assert matrices == {group["weight_decay"] > 0}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        list(model.parameters())
    )


def test_evaluation_leaves_the_mode_and_the_gradients_alone(corpus):
    model = small_gpt(corpus)
    batches = Batches(corpus, 4, 16)
    for training in (True, False):
        model.train(training)
        evaluate(model, batches, 1)
        assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_loss_is_found_in_what_models_return():
    loss = torch.tensor(1.5)
    for output in (loss, {"loss": loss}, (loss, None)):
        assert loss_of(output) is loss
    for output in ({"logits": loss}, (torch.ones(3),)):
        with pytest.raises(TrainingError, match="no scalar loss"):
            loss_of(output)


def test_parameters_without_gradient_are_left_alone():
    model = nn.Linear(3, 3)
    model.weight.requires_grad_(False)
    groups = make_optimizer(model, CONFIG).param_groups
    assert [parameter for group in groups for parameter in group["params"]] == [model.bias]


def test_progress_off_a_terminal_is_plain_lines_on_stderr(capsys):
    with progress_module.progress("name", 12) as report:
        for done in range(1, 13):
            report(done, f"loss {done}.0")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "\x1b" not in captured.err
    lines = captured.err.splitlines()
    assert len(lines) == 7
    assert lines[-1].split()[:2] == ["name", "12/12"]
    assert lines[-1].endswith("loss 12.0")


def test_progress_of_other_ranks_is_silent(capsys):
    with progress_module.progress("name", 2, enabled=False) as report:
        report(1, "loss")
    assert capsys.readouterr() == ("", "")


def record_of(name, losses, held_out=((0, 8.0), (3, 6.0)), world_size=2):
    all_reduce = Traffic.of({"all_reduce": 4}, {"all_reduce": 1024})
    return RunRecord(
        name=name,
        world_size=world_size,
        local_parameters=10,
        losses=losses,
        held_out=held_out,
        step_seconds=(9.0, 9.0, 0.2, 0.1, 0.3),
        untimed_steps=1,
        counted_step=1,
        forward=all_reduce,
        backward=all_reduce + Traffic.of({"all_gather": 1}, {"all_gather": 8}),
        update=Traffic(),
    )


def test_record_survives_json():
    record = record_of("run", (3.0, 2.0))
    assert RunRecord.from_json(record.to_json()) == record


def test_step_time_is_the_median_without_warm_up_and_counted_step():
    assert record_of("run", (3.0,)).median_step_seconds == 0.2
    short = replace(record_of("run", (3.0,)), step_seconds=(4.0,))
    assert short.median_step_seconds == 4.0


def test_traffic_adds_up_and_reads_well():
    record = record_of("run", (3.0,))
    total = record.forward + record.backward
    assert total.calls == (("all_gather", 1), ("all_reduce", 8))
    assert total.total_nbytes == 2056
    assert str(total) == "1 all_gather, 8 all_reduce"
    assert str(Traffic()) == "none"


def test_largest_difference_looks_at_the_first_steps():
    assert largest_difference((1.0, 2.0, 9.0), (1.5, 2.0, 5.0)) == 4.0
    assert largest_difference((1.0, 2.0, 9.0), (1.5, 2.0, 5.0), 2) == 0.5
    with pytest.raises(ValueError, match="curves of 1 and of 2 points"):
        largest_difference((1.0,), (1.0, 2.0))


def test_comparison_complains_of_curves_that_part_and_losses_that_stay():
    plain = record_of("plain", (8.0, 7.0, 6.0), world_size=1)
    good = record_of("automatic", (8.0, 7.00001, 6.0))
    assert Comparison("GPT", (good, plain)).complaints() == ()
    apart = record_of("megatron", (8.0, 7.01, 6.0))
    (line,) = Comparison("GPT", (apart, plain)).complaints()
    assert line.startswith("megatron: its loss is 1.0e-02 from plain's")
    flat = record_of("plain", (8.0, 7.0, 6.0), held_out=((0, 8.0), (3, 7.9)))
    (line,) = Comparison("GPT", (good, flat)).complaints()
    assert "from 8.000 to 7.900" in line
    broken = record_of("megatron", (8.0, math.nan, 6.0), held_out=((0, 8.0), (3, math.nan)))
    assert len(Comparison("GPT", (broken, plain)).complaints()) == 2


def test_comparison_prints_and_draws(tmp_path):
    plain = record_of("plain", (8.0, 7.0, 6.0), world_size=1)
    comparison = Comparison("GPT", (record_of("automatic", (8.0, 7.5, 6.0)), plain))
    stream = io.StringIO()
    Console(file=stream, width=100).print(comparison.table())
    text = stream.getvalue()
    assert "5.0e-01" in text
    assert "0.00" in text
    assert "\x1b" not in text
    comparison.draw(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert comparison.to_json()["largest_difference"]["automatic"]["all_steps"] == 0.5
