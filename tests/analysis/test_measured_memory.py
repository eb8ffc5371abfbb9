"""The memory of a real step, at its worst moment, is that which is predicted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from broad_cases import broad

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


@pytest.mark.parametrize("ways", ["[true]", *broad("[false]")])
def test_a_step_takes_the_memory_that_is_predicted(ways: str) -> None:
    """Where gradients are cleared before each step and outputs let go, it takes less by these."""
    paths = [ROOT, ROOT / "benchmarks"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(
        [sys.executable, "-c", STEP, ways],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    for total, gradients, (kept, cleared) in json.loads(done.stdout.splitlines()[-1]).values():
        assert kept == pytest.approx(total, rel=0.01)
        logits = 8 * 64 * 512 // 2 * 4
        assert cleared == pytest.approx(total - gradients - logits, rel=0.03)
