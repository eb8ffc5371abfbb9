"""A parallel module tells its plan, and errors of its parts are the project's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import autoparallel
from autoparallel.errors import PlanError


def test_a_module_inside_of_python_says_that_it_has_no_plan() -> None:
    """The model has one; what it calls is planned for the calls that it gets."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)), torch.randn(2, 4)
    split: Any = autoparallel.autoparallelize(model, 1, example_inputs=x)
    split[1].register_forward_hook(lambda module, args, output: output * 2)
    split(x)  # runs as Python, because of the hook
    assert split.plan.model == "Sequential"
    with pytest.raises(PlanError, match="Linear has no plan of its own") as caught:
        _ = split[0].plan
    assert caught.value.fix
