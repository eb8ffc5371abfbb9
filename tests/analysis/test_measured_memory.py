"""The memory of a real step, at its worst moment, is that which is predicted."""

import json
from pathlib import Path
from typing import Any

import pytest
from broad_cases import broad
from scripts import run_script

ROOT = Path(__file__).parents[2]

# One of two ranks, whose collectives return at once. Gradients that are kept between steps, as for
# accumulation, and a caller that holds what the model returned are what a plan counts.
STEP = """
import gc, json, sys
import torch
from autoparallel.support.torch_private import fake_process_group
fake_process_group(0, 2)
import autoparallel
from autoparallel.analysis.memory import memory_of
from autoparallel.train.models import GPT, GPTConfig
from contenders.measuring import peak_nbytes
torch.manual_seed(0)
config = GPTConfig(layers=2, hidden=64, heads=4, vocabulary=512, positions=64, dropout=0.0)
tokens = torch.randint(512, (8, 64))
inputs = {"input_ids": tokens, "labels": tokens}
found = {}
for sequence_parallel in json.loads(sys.argv[1]):
    model = autoparallel.autoparallelize(
        GPT(config), 2, example_inputs=inputs, sequence_parallel=sequence_parallel, check_inputs=0
    )
    optimizer = torch.optim.AdamW(model.parameters())

    def step(holds):
        output = model(**inputs)
        if not holds:
            output = output.loss
        (output.loss if holds else output).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=not holds)

    peaks = []
    for holds in (True, False):
        step(holds)
        step(holds)
        gc.collect()
        held = list(model.parameters())
        held += [p.grad for p in held if p.grad is not None]
        for state in optimizer.state.values():
            held += [value for value in state.values() if isinstance(value, torch.Tensor)]
        held += [tokens]
        peaks.append(peak_nbytes(lambda: step(holds), held))
    account = memory_of(model.plan)
    found[str(sequence_parallel)] = (account.total, account.gradients, peaks)
print(json.dumps(found))
"""

# What scripts begin with that make `plans` of a GPT of this `config` for these `inputs`, and what
# measures a step of each.
BEFORE = """
import gc, json
from dataclasses import replace
import torch
from autoparallel.support.torch_private import fake_process_group
fake_process_group(0, 2)
import autoparallel
from autoparallel.analysis.memory import memory_of
from autoparallel.train.models import GPT, GPTConfig
from contenders.measuring import peak_nbytes
torch.manual_seed(0)
"""
MEASURED = """
found = []
for each in plans:
    model = autoparallel.apply_plan(GPT(config), each, check_inputs=0)

    def step():
        output = model(**inputs)
        output.loss.backward()
        model.zero_grad(set_to_none=False)

    step()
    step()
    gc.collect()
    held = list(model.parameters())
    held += [p.grad for p in held if p.grad is not None] + [tokens]
    found.append((memory_of(each).total, peak_nbytes(step, held)))
print(json.dumps(found))
"""

# ZeRO-3, with copies that are dropped and gathered again: where they are read, and ahead.
GATHERED = """
from autoparallel.cost.hardware import find_hardware
from autoparallel.planning.gathers_ahead import with_gathers_ahead, without_gathers_ahead
config = GPTConfig(layers=4, hidden=128, heads=4, vocabulary=256, positions=32, dropout=0.0)
tokens = torch.randint(256, (2, 32))
inputs = {"input_ids": tokens, "labels": tokens}
mesh = autoparallel.Mesh(dp=2)
plan = autoparallel.make_plan(
    GPT(config), example_inputs=inputs, mesh=mesh, constraints=["fsdp on dp"], hardware="cpu"
)
rows = [replace(c, again="weight" in c.value and "," in c.shape) for c in plan.conversions]
plan = without_gathers_ahead(replace(plan, conversions=tuple(rows)))
plans = [plan, with_gathers_ahead(plan, find_hardware("cpu"))]
"""

# Blocks that are run again: the most memory is taken while one of them goes back.
FILLED = """
config = GPTConfig(layers=2, hidden=64, heads=4, vocabulary=64, positions=64, dropout=0.0)
tokens = torch.randint(64, (32, 64))
inputs = {"input_ids": tokens, "labels": tokens}
plan = autoparallel.make_plan(
    GPT(config), 2, example_inputs=inputs, constraints=["megatron on tp"], recompute="full",
    sequence_parallel=False,
)
plans = [replace(plan, fills_gaps=fills_gaps) for fills_gaps in (True, False)]
"""


def ran(folder: Path, script: str, *arguments: str) -> Any:
    """Return the last line that a script prints, which is JSON."""
    path = folder / "script.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n{script}")
    done = run_script(path, *arguments, folder=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.broad
def test_what_is_gathered_ahead_takes_what_is_predicted(tmp_path: Path) -> None:
    """More than what is gathered where it is read, by as much as is in flight."""
    (total, peak), (ahead_total, ahead_peak) = ran(tmp_path, BEFORE + GATHERED + MEASURED)
    assert ahead_total > total
    assert ahead_peak - peak == pytest.approx(ahead_total - total, rel=0.01)


def test_a_gap_keeps_what_its_gradients_are_computed_of(tmp_path: Path) -> None:
    """The operand of a product and the gradient of its result, until the collective begins which
    the gradient of the weight hides.
    """
    (total, peak), (least, lower) = ran(tmp_path, BEFORE + FILLED + MEASURED)
    assert peak - lower == pytest.approx(total - least, rel=0.05)
    assert peak > lower


@pytest.mark.parametrize("ways", ["[true]", *broad("[false]")])
def test_a_step_takes_the_memory_that_is_predicted(ways: str, tmp_path: Path) -> None:
    """Where gradients are cleared before each step and outputs let go, it takes less by these."""
    for total, gradients, (kept, cleared) in ran(tmp_path, STEP, ways).values():
        assert kept == pytest.approx(total, rel=0.01)
        logits = 8 * 64 * 512 // 2 * 4
        assert cleared == pytest.approx(total - gradients - logits, rel=0.03)
