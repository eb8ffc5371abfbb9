"""Habits with copies of a model: deep ones, pickles, averages, before and after the first call."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import autoparallel

from .case import Case
from .models import plain, rows
from .registry import in_group
from .weights import adam, other, step

habit = in_group("State dicts, checkpoints and copies")


@habit("copy.deepcopy(model), and both go on by themselves")
def deepcopied(case: Case) -> None:
    def script(model: Any) -> Any:
        step(model, adam(model), 0)
        twin = copy.deepcopy(model)
        step(model, adam(model), 1)
        return twin(*rows(6, 2)), model(*rows(6, 2)), step(twin, adam(twin), 1)

    case.compare(script)


@habit("copy.deepcopy(model) before the first call")
def deepcopied_early(case: Case) -> None:
    def script(model: Any) -> Any:
        twin = copy.deepcopy(model)
        return step(twin, adam(twin), 0), twin(*rows(6, 1)), model(*rows(6, 1))

    case.compare(script)


@habit("pickle.dumps(model) and loads")
def pickled(case: Case) -> None:
    def script(model: Any) -> Any:
        twin = pickle.loads(pickle.dumps(model))
        return twin(*rows(6, 0))

    case.compare(script)


@habit("torch.save(model) and torch.load(weights_only=False)")
def saved_module(case: Case) -> None:
    def script(model: Any) -> Any:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)(*rows(6, 0))

    case.compare(script)


@habit("AveragedModel(model) of torch.optim.swa_utils, an average of steps")
def averaged(case: Case) -> None:
    def script(model: Any) -> Any:
        optimizer, mean = adam(model), AveragedModel(model)
        for seed in range(3):
            step(model, optimizer, seed)
            mean.update_parameters(model)
        return mean(*rows(6, 5)), model(*rows(6, 5))

    case.compare(script)


@habit("AveragedModel with multi_avg_fn=get_ema_multi_avg_fn(0.9)")
def averaged_exponentially(case: Case) -> None:
    def script(model: Any) -> Any:
        optimizer = adam(model)
        mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        for seed in range(3):
            step(model, optimizer, seed)
            mean.update_parameters(model)
        return mean(*rows(6, 5)), model(*rows(6, 5))

    case.compare(script)


@habit("an optimizer, and weights loaded, before the first call of a model without example inputs")
def before_first_call(case: Case) -> None:
    model = autoparallel.autoparallelize(plain(), case.world_size)
    optimizer = adam(model)
    model.load_state_dict(other().state_dict())
    unsplit = other()
    expected = adam(unsplit)
    for seed in range(2):
        case.same(step(model, optimizer, seed), step(unsplit, expected, seed))
    case.same_module(model, unsplit)


@habit("copy.deepcopy(model) before the first call of a model without example inputs")
def copied_before_first_call(case: Case) -> None:
    twin: Any = copy.deepcopy(autoparallel.autoparallelize(plain(), case.world_size))
    case.same(twin(*rows(6, 0)), plain()(*rows(6, 0)))
