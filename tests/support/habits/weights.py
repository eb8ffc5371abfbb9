"""Habits with state dicts and checkpoints of a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import autoparallel

from .case import Case
from .models import inputs, plain, rows, scores
from .registry import in_group

habit = in_group("State dicts, checkpoints and copies")

Optimizer = torch.optim.Optimizer


def other() -> nn.Module:
    """Return the usual module with other weights."""
    model = plain()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.5).add_(0.01)
    return model


def adam(model: nn.Module) -> Optimizer:
    """Return the optimizer of the rows here."""
    return torch.optim.AdamW(model.parameters(), lr=0.05)


def step(model: Any, optimizer: Optimizer, seed: int) -> torch.Tensor:
    """Return the loss of one training step."""
    loss = model(*rows(6, seed))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def loaded(case: Case, load: Callable[[Any], Any]) -> None:
    """Compare a step before weights are loaded with two after."""

    def script(model: Any) -> Any:
        optimizer = adam(model)
        first = step(model, optimizer, 0)
        load(model)
        return [first, step(model, optimizer, 1), step(model, optimizer, 2)]

    case.compare(script)


@habit("load_state_dict of the unsplit model's state dict")
def load_whole(case: Case) -> None:
    loaded(case, lambda model: model.load_state_dict(other().state_dict()))


@habit("load_state_dict(model.state_dict()): its own state dict, cloned and changed")
def load_own(case: Case) -> None:
    def load(model: Any) -> None:
        values = {name: value.clone() * 2 for name, value in model.state_dict().items()}
        model.load_state_dict(values)

    loaded(case, load)


@habit("load_state_dict(strict=False) of a part, with names that it lacks")
def load_part(case: Case) -> None:
    def script(model: Any) -> Any:
        values = {"up.weight": other().state_dict()["up.weight"], "strange": torch.ones(2)}
        result = model.load_state_dict(values, strict=False)
        return list(result.missing_keys), list(result.unexpected_keys), model(*rows(6, 0))

    case.compare(script)


@habit("load_state_dict with missing keys")
def load_missing(case: Case) -> None:
    case.compare(lambda model: model.load_state_dict({}), fails=True)


@habit("load_state_dict of tensors of another shape")
def load_wrong_shape(case: Case) -> None:
    def script(model: Any) -> Any:
        values = {**other().state_dict(), "down.weight": torch.ones(7, 12)}
        model.load_state_dict(values)

    case.compare(script, fails=True)


@habit("load_state_dict(assign=True)")
def load_assign(case: Case) -> None:
    def script(model: Any) -> Any:
        model(*rows(6, 0))
        model.load_state_dict(other().state_dict(), assign=True)
        optimizer = adam(model)
        return [step(model, optimizer, seed) for seed in range(2)]

    case.compare(script)


@habit("load_state_dict of float32 weights into a float64 model")
def load_other_type(case: Case) -> None:
    loaded(case, lambda model: model.load_state_dict(other().float().state_dict()))


@habit("load_state_dict of a submodule: model.up.load_state_dict(...)")
def load_submodule(case: Case) -> None:
    loaded(case, lambda model: model.up.load_state_dict(other().up.state_dict()))


@habit("the split module inside of another module: its state dict with a prefix, and loading it")
def prefixed(case: Case) -> None:
    def script(model: Any) -> Any:
        around = nn.ModuleDict({"inner": model})
        around.load_state_dict({f"inner.{k}": v for k, v in other().state_dict().items()})
        return list(around.state_dict()), model(*rows(6, 0))

    case.compare(script)


@habit("autoparallel.full_state_dict(model): the unsplit state dict")
def full(case: Case) -> None:
    def script(model: Any) -> Any:
        optimizer = adam(model)
        step(model, optimizer, 0)
        own = "_autoparallel" in vars(model)
        return dict(autoparallel.full_state_dict(model) if own else model.state_dict())

    case.compare(script)


@habit("torch.save(model.state_dict()) and torch.load of it, on each rank")
def saved_state_dict(case: Case) -> None:
    def script(model: Any) -> Any:
        optimizer = adam(model)
        step(model, optimizer, 0)
        path = case.folder / f"rank_{case.rank}.pt"
        torch.save(model.state_dict(), path)
        step(model, optimizer, 1)
        model.load_state_dict(torch.load(path))
        return model(*rows(6, 2))

    case.compare(script)


@habit("an optimizer's state_dict() loaded again, with training going on as before")
def optimizer_state(case: Case) -> None:
    def script(model: Any) -> Any:
        optimizer = adam(model)
        step(model, optimizer, 0)
        weights = copy.deepcopy(dict(model.state_dict()))
        state = copy.deepcopy(optimizer.state_dict())
        losses = [step(model, optimizer, 1), step(model, optimizer, 2)]
        model.load_state_dict(weights)
        again = adam(model)
        again.load_state_dict(state)
        losses += [step(model, again, 1), step(model, again, 2)]
        return losses

    case.compare(script)


@habit("the unsplit run's optimizer.state_dict() loaded into the split model's optimizer")
def plain_optimizer_state(case: Case) -> None:
    before = plain()
    optimizer = adam(before)
    step(before, optimizer, 0)
    state = copy.deepcopy(optimizer.state_dict())

    def script(model: Any) -> Any:
        mine = adam(model)
        model.load_state_dict(before.state_dict())
        mine.load_state_dict(copy.deepcopy(state))
        return [step(model, mine, 1), step(model, mine, 2)]

    case.compare(script)


@habit("autoparallel.save_checkpoint and load_checkpoint, with the optimizer")
def checkpoint(case: Case) -> None:
    def script(model: Any) -> Any:
        optimizer = adam(model)
        step(model, optimizer, 0)
        folder = case.folder / f"checkpoint_{'_autoparallel' in vars(model)}"
        if "_autoparallel" not in vars(model) and case.world_size > 1:
            values = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            losses = [step(model, optimizer, 1)]
            model.load_state_dict(values[0])
            optimizer.load_state_dict(values[1])
            return [*losses, step(model, optimizer, 1), {"step": 3}]
        autoparallel.save_checkpoint(folder, model, optimizer, {"step": 3})
        losses = [step(model, optimizer, 1)]
        extra = autoparallel.load_checkpoint(folder, model, optimizer)
        return [*losses, step(model, optimizer, 1), extra]

    case.compare(script)


@habit("load_checkpoint with another kind of optimizer than saved", refused=True)
def other_optimizer(case: Case) -> None:
    model = case.split(plain(), rows(6, 0))
    optimizer: Optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer, 0)
    autoparallel.save_checkpoint(case.folder / "checkpoint", model, optimizer)
    autoparallel.load_checkpoint(case.folder / "checkpoint", model, adam(model))


@habit("load_checkpoint of a folder with a damaged file", refused=True)
def damaged(case: Case) -> None:
    model = case.split(plain(), rows(6, 0))
    autoparallel.save_checkpoint(case.folder / "checkpoint", model)
    case.meet()
    if case.rank == 0:
        for path in (case.folder / "checkpoint").glob("*.distcp"):
            path.write_bytes(path.read_bytes()[:100])
    case.meet()
    autoparallel.load_checkpoint(case.folder / "checkpoint", model)


@habit("load_checkpoint of a folder that is not there", refused=True)
def not_there(case: Case) -> None:
    model = case.split(plain(), rows(6, 0))
    autoparallel.load_checkpoint(case.folder / "nowhere", model)


@habit("dcp.save and dcp.load of model.state_dict()")
def distributed_checkpoint(case: Case) -> None:
    def script(model: Any) -> Any:
        optimizer = adam(model)
        step(model, optimizer, 0)
        folder = case.folder / f"dcp_{'_autoparallel' in vars(model)}"
        state = {"model": model.state_dict()}
        dcp.save(state, checkpoint_id=folder)
        step(model, optimizer, 1)
        state = {"model": model.state_dict()}
        dcp.load(state, checkpoint_id=folder)
        model.load_state_dict(state["model"])
        return model(*rows(6, 2))

    case.compare(script)


@habit("dcp.save and dcp.load of get_state_dict(model, optimizer), set_state_dict")
def distributed_checkpoint_all(case: Case) -> None:
    def script(model: Any) -> Any:
        optimizer = adam(model)
        step(model, optimizer, 0)
        folder = case.folder / f"all_{'_autoparallel' in vars(model)}"
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
        losses = [step(model, optimizer, 1), step(model, optimizer, 2)]
        weights, state = get_state_dict(model, optimizer)
        values = {"model": weights, "optimizer": state}
        dcp.load(values, checkpoint_id=folder)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=values["model"],
            optim_state_dict=values["optimizer"],
        )
        return [*losses, step(model, optimizer, 1), step(model, optimizer, 2)]

    case.compare(script)


@habit("a dcp checkpoint of the split model, read by the unsplit one")
def read_unsplit(case: Case) -> None:
    model = case.split(plain(), rows(6, 0))
    optimizer = adam(model)
    step(model, optimizer, 0)
    dcp.save({"model": model.state_dict()}, checkpoint_id=case.folder / "dcp")
    unsplit = other()
    state = {"model": unsplit.state_dict()}
    dcp.load(state, checkpoint_id=case.folder / "dcp")
    unsplit.load_state_dict(state["model"])
    case.same(unsplit(*rows(6, 1)), model(*rows(6, 1)))


@habit("get_model_state_dict(full_state_dict=True)")
def gotten(case: Case) -> None:
    def script(model: Any) -> Any:
        options = StateDictOptions(full_state_dict=True)
        return dict(get_model_state_dict(model, options=options))

    case.compare(script)


@habit("get_state_dict(model, optimizer, full_state_dict=True, cpu_offload=True)")
def gotten_all(case: Case) -> None:
    def script(model: Any) -> Any:
        optimizer = adam(model)
        step(model, optimizer, 0)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, state = get_state_dict(model, optimizer, options=options)
        # Rank 0 alone has them, by the options.
        if not weights:
            return None
        found = state["state"]["up.weight"]
        return dict(weights), found["exp_avg"], found["exp_avg_sq"]

    case.compare(script)


@habit("set_model_state_dict(full_state_dict=True) of the unsplit weights on every rank")
def set_whole(case: Case) -> None:
    options = StateDictOptions(full_state_dict=True)
    loaded(case, lambda m: set_model_state_dict(m, other().state_dict(), options=options))


@habit("set_model_state_dict(broadcast_from_rank0=True): only rank 0 has the weights")
def set_broadcast(case: Case) -> None:
    def load(model: Any) -> None:
        if "_autoparallel" not in vars(model):
            model.load_state_dict(other().state_dict())
            return
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        with case.group():
            values = other().state_dict() if case.rank == 0 else {}
            set_model_state_dict(model, values, options=options)

    loaded(case, load)


@habit("get_ and set_optimizer_state_dict, with training going on as before")
def optimizer_by_names(case: Case) -> None:
    def script(model: Any) -> Any:
        optimizer = adam(model)
        step(model, optimizer, 0)
        weights = copy.deepcopy(dict(model.state_dict()))
        state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
        losses = [step(model, optimizer, 1)]
        model.load_state_dict(weights)
        again = adam(model)
        set_optimizer_state_dict(model, again, optim_state_dict=state)
        return [*losses, step(model, again, 1)]

    case.compare(script)


@habit("set_state_dict of the unsplit run's model and optimizer (full_state_dict=True)")
def set_all(case: Case) -> None:
    source = plain()
    trained = adam(source)
    step(source, trained, 0)
    options = StateDictOptions(full_state_dict=True)
    weights, state = copy.deepcopy(get_state_dict(source, trained, options=options))

    def script(model: Any) -> Any:
        optimizer = adam(model)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=copy.deepcopy(weights),
            optim_state_dict=copy.deepcopy(state),
            options=options,
        )
        return [step(model, optimizer, 1), step(model, optimizer, 2)]

    case.compare(script)


@habit("state_dict() of the split module: names, whole shapes and types")
def shapes(case: Case) -> None:
    def script(model: Any) -> Any:
        return [(name, tuple(v.shape), v.dtype) for name, v in model.state_dict().items()]

    case.compare(script, scores, inputs())


@habit("a broadcast of weights by hand: dist.broadcast(parameter.data, 0)")
def broadcast(case: Case) -> None:
    def script(model: Any) -> Any:
        with case.group():
            for parameter in model.parameters():
                dist.broadcast(parameter.data, 0)
        return model(*rows(6, 0))

    case.compare(script)
