"""The examples run as a newcomer runs them: three methods agree, and failures end and speak."""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import run_processes
from scripts import run_script
from torch.distributed.tensor import DTensor

import autoparallel
from autoparallel.api import autoparallelize
from autoparallel.train.config import TrainConfig
from autoparallel.train.data import prepare_corpus
from autoparallel.train.loop import clip_gradients
from autoparallel.train.metrics import largest_difference

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import demo  # noqa: E402
import three_ways as trainer  # noqa: E402

CONFIG = TrainConfig(steps=4, warmup_steps=1, evaluation_batches=1)
CLIP_NORM = 0.05  # far below the gradient's, so that a wrong common norm would show


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    words = [f"word{(number * number) % 97}" for number in range(6000)]
    file.write_text("\n".join(words))
    return str(file)


def small(model, sequence_parallel):
    return trainer.Settings(model, 2, 32, 4, 4, 16, sequence_parallel)


PLANS = {}


def remembered(model, world_size, **options):
    """The example's way to plan, and the plan is kept for the same model's gradients."""
    parallel = autoparallelize(model, world_size, **options)
    PLANS[type(model), options["sequence_parallel"]] = parallel.plan
    return parallel


def again(model, world_size, **options):
    return autoparallel.apply_plan(model, PLANS[type(model), options["sequence_parallel"]])


def small_runs(_rank, text):
    """Losses and clipped gradients of both models by both parallel methods, on two processes."""
    results = {}
    for model, split in itertools.product(trainer.MODELS, (True, False)):
        for method in ("automatic", "megatron"):
            settings = small(model, split)
            autoparallel.autoparallelize = remembered
            losses = trainer.run(method, settings, CONFIG, text).losses
            autoparallel.autoparallelize = again
            results[model, split, method] = losses, clipped_gradients(method, settings, text)
    return results


def clipped_gradients(method, settings, text):
    """Whole gradients of the first batch by parameter name, as the optimizer sees them."""
    batches = settings.batches(prepare_corpus(text, vocabulary=trainer.VOCABULARY))
    model = trainer.build_model(method, settings, batches)
    model(**batches.train(0)).loss.backward()
    if method == "megatron":
        trainer.finish_hand_written(model, CLIP_NORM)
        return model.gathered_gradients()
    clip_gradients(model, CLIP_NORM)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        name: gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        for name, gradient in gradients.items()
    }


@pytest.mark.usefixtures("one_trace")
def test_three_methods_train_alike(text, monkeypatch, tmp_path):
    """With sequence parallelism and without it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    threads = torch.get_num_threads()
    results = run_processes(small_runs, 2, text)
    for model in trainer.MODELS:
        settings = small(model, False)
        losses = trainer.run("plain", settings, CONFIG, text).losses
        gradients = clipped_gradients("plain", settings, text)
        for split, method in itertools.product((True, False), ("automatic", "megatron")):
            for result in results:
                parallel_losses, parallel_gradients = result[model, split, method]
                assert largest_difference(parallel_losses, losses) < 1e-5
                torch.testing.assert_close(parallel_gradients, gradients, rtol=1e-3, atol=1e-7)
    torch.set_num_threads(threads)


def test_a_failed_run_says_so_and_shows_the_childs_words(capfd):
    code = "import sys; sys.exit('the child says why')"
    with pytest.raises(demo.RunFailedError, match="exit status 1"):
        demo.run_to_its_end([sys.executable, "-c", code], 60)
    assert "the child says why" in capfd.readouterr().err


def test_a_run_that_lingers_is_ended_with_its_children(tmp_path):
    grandchild = "import time; time.sleep(100)"
    code = (
        f"import subprocess, sys, pathlib, time; child = subprocess.Popen([sys.executable, '-c', "
        f"{grandchild!r}]); pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid)); "
        "time.sleep(100)"
    )
    with pytest.raises(demo.RunFailedError, match="no end after 2 s"):
        demo.run_to_its_end([sys.executable, "-c", code], 2)
    pid = (tmp_path / "pid").read_text()
    for _ in range(100):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the grandchild still runs")


def test_text_that_is_not_there_is_named(tmp_path):
    arguments = ["--data", "absent.txt", "--output", str(tmp_path)]
    result = run_script(ROOT / "examples" / "demo.py", *arguments, folder=tmp_path)
    assert result.returncode == 1
    assert "no such file or folder: absent.txt" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_the_demo_ends_well_and_writes_everything(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--steps", "25"]
    result = subprocess.run(
        [*command, "--bert-steps", "25", "--output", str(tmp_path / "out")],
        env={**demo.os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    written = {path.name for path in (tmp_path / "out").iterdir()}
    files = {f"{model}_{name}" for model in ("gpt", "bert") for name in ("loss.png", "plan.svg")}
    assert files | {"comparison.json", "gpt_plan.json", "bert_plan.json"} <= written
    for comparison in json.loads((tmp_path / "out" / "comparison.json").read_text()):
        assert comparison["complaints"] == []
        assert [record["world_size"] for record in comparison["records"]] == [2, 2, 1]
