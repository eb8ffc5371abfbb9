"""Habits with plain attributes, buffers, and parts of a model that are changed later."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import torch
from torch import nn

from .case import Case
from .models import Scores, built, inputs, rows, scores
from .registry import in_group

habit = in_group("What is changed after splitting")


@dataclasses.dataclass
class Settings:
    """A configuration as an object."""

    temperature: float = 1.0
    squared: bool = False


class Configured(Scores):
    """Reads numbers and flags from its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = 1.0
        self.deep = True
        self.config = {"scale": 1.0}
        self.settings = Settings()
        self.weights = [1.0, 2.0]
        self.drop = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.drop(self.up(x)) / self.temperature)
        if self.deep:
            hidden = self.norm(hidden)
        y = self.down(hidden) * self.config["scale"] / self.settings.temperature
        if self.settings.squared:
            y = y.square()
        return (y * self.weights[0]).mean()


def changed(case: Case, change: Any, kind: Any = Configured) -> None:
    """Compare a step before a change with one after it."""

    def script(model: Any) -> Any:
        model(inputs()).backward()
        change(model)
        loss = model(inputs(seed=1))
        loss.backward()
        return loss

    case.compare(script, lambda: built(kind), inputs())


@habit("a number in an attribute: model.temperature = 0.5")
def temperature(case: Case) -> None:
    changed(case, lambda model: setattr(model, "temperature", 0.5))


@habit("a flag that decides which layers run: model.deep = False")
def flag(case: Case) -> None:
    changed(case, lambda model: setattr(model, "deep", False))


@habit("an entry of a dict: model.config['scale'] = 2")
def dict_entry(case: Case) -> None:
    changed(case, lambda model: model.config.update(scale=2.0))


@habit("a field of a dataclass: model.settings.temperature = 2")
def dataclass_field(case: Case) -> None:
    changed(case, lambda model: setattr(model.settings, "temperature", 2.0))


@habit("another object in place of the configuration: model.settings = Settings(...)")
def replaced_settings(case: Case) -> None:
    changed(case, lambda model: setattr(model, "settings", Settings(3.0, True)))


@habit("an item of a list: model.weights[0] = 5")
def list_item(case: Case) -> None:
    changed(case, lambda model: model.weights.__setitem__(0, 5.0))


@habit("dropout switched off by module.p = 0 while in train mode")
def dropout_off(case: Case) -> None:
    def script(model: Any) -> Any:
        if model.drop.p:
            model(inputs())
            model.drop.p = 0.0
        loss = model(inputs(seed=1))
        loss.backward()
        return loss

    case.compare(
        script, lambda: built(Configured), inputs(), before=lambda m: setattr(m.drop, "p", 0.5)
    )


@habit("dropout switched on by module.p = 1 while in train mode")
def dropout_on(case: Case) -> None:
    changed(case, lambda model: setattr(model.drop, "p", 1.0))


class Counting(Scores):
    """Counts its calls, and computes with the count."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return super().forward(x).mean() / self.count


class Leaving(Scores):
    """Leaves a loss beside its output in an attribute."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.up(x))
        self.penalty = hidden.square().mean()
        return self.down(self.norm(hidden)).mean()


class Listing(Scores):
    """Leaves its activations in a list."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.up(x))
        self.seen = [hidden]
        return self.down(self.norm(hidden)).mean()


class Assigning(Scores):
    """Assigns a new tensor to a buffer in forward, as a momentum encoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(5))
        self.center: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        loss = (y - self.center).square().mean()
        if self.training:
            self.center = 0.9 * self.center + 0.1 * y.mean(0).detach()
        return loss


class InPlace(Assigning):
    """Writes to the buffer in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = Scores.forward(self, x)
        loss = (y - self.center).square().mean()
        self.center.mul_(0.9).add_(y.mean(0).detach(), alpha=0.1)
        return loss


class Normed(nn.Module):
    """Has running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.norm(self.up(x)))).square().mean()


def three_calls(model: Any) -> Any:
    """Return the losses of three batches, with their backward passes."""
    losses = [model(inputs(seed=seed)) for seed in range(3)]
    torch.stack(losses).sum().backward()
    return losses


@habit("a counter that forward increases and computes with")
def counter(case: Case) -> None:
    def script(model: Any) -> Any:
        return three_calls(model), model.count

    case.compare(script, lambda: built(Counting), inputs())


@habit("a loss that forward leaves in an attribute: loss + model.penalty")
def side_loss(case: Case) -> None:
    def script(model: Any) -> Any:
        loss = model(inputs())
        (loss + model.penalty).backward()
        return loss, model.penalty

    case.compare(script, lambda: built(Leaving), inputs())


@habit("a list of tensors that forward leaves in an attribute")
def side_list(case: Case) -> None:
    def script(model: Any) -> Any:
        loss = model(inputs())
        loss.backward()
        return loss, [tensor.detach() for tensor in model.seen]

    case.compare(script, lambda: built(Listing), inputs())


@habit("a buffer to which forward assigns a new tensor")
def assigned_buffer(case: Case) -> None:
    case.compare(three_calls, lambda: built(Assigning), inputs())


@habit("a buffer that forward writes to in place")
def buffer_in_place(case: Case) -> None:
    case.compare(three_calls, lambda: built(InPlace), inputs())


@habit("a buffer that is set between calls: model.center = tensor, model.center.fill_(1)")
def set_buffer(case: Case) -> None:
    def script(model: Any) -> Any:
        first = model(inputs())
        model.center = torch.ones(5, dtype=torch.float64)
        second = model(inputs())
        model.center.fill_(2.0)
        return first, second, model(inputs())

    case.compare(script, lambda: built(InPlace), inputs())


@habit("running statistics of batch norm, in train and eval mode")
def running_statistics(case: Case) -> None:
    def script(model: Any) -> Any:
        losses = three_calls(model)
        model.eval()
        return losses, model(inputs())

    case.compare(script, lambda: built(Normed), inputs())


@habit("a submodule replaced by another one: model.norm = nn.Identity()")
def replaced(case: Case) -> None:
    def replace(model: Any) -> None:
        model.norm = nn.Identity()
        model.zero_grad()

    def script(model: Any) -> Any:
        model(inputs()).mean().backward()
        replace(model)
        y = model(inputs())
        y.square().mean().backward()
        return y

    case.compare(script, scores, inputs())


def linear(out: int) -> nn.Linear:
    """Return a new layer with weights of its own."""
    torch.manual_seed(5)
    return nn.Linear(12, out).double()


@habit("a new head for another task: model.down = nn.Linear(12, 3)")
def new_head(case: Case) -> None:
    def script(model: Any) -> Any:
        model(inputs())
        model.down = linear(3)
        y = model(inputs())
        y.square().mean().backward()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.step()
        return y, model(inputs())

    case.compare(script, scores, inputs())


@habit("weight.data = tensor")
def data(case: Case) -> None:
    def script(model: Any) -> Any:
        model(inputs())
        model.down.weight.data = linear(5).weight.data
        y = model(inputs())
        y.square().mean().backward()
        return y

    case.compare(script, scores, inputs())


@habit("module.weight = nn.Parameter(tensor)")
def new_parameter(case: Case) -> None:
    def script(model: Any) -> Any:
        model(inputs())
        model.down.weight = nn.Parameter(linear(5).weight.detach())
        y = model(inputs())
        y.square().mean().backward()
        return y

    case.compare(script, scores, inputs())


@habit("weights written in place under no_grad by numbers: mul_, fill_, nn.init.constant_")
def in_place(case: Case) -> None:
    def script(model: Any) -> Any:
        model(inputs())
        with torch.no_grad():
            model.up.weight.mul_(2.0)
            model.down.bias.fill_(0.5)
        nn.init.constant_(model.up.bias, 0.1)
        y = model(inputs())
        y.square().mean().backward()
        return y

    case.compare(script, scores, inputs())


@habit("a whole tensor copied into a weight under no_grad: weight.copy_(tensor)")
def copied(case: Case) -> None:
    def script(model: Any) -> Any:
        model(inputs())
        with torch.no_grad():
            model.down.weight.copy_(linear(5).weight)
        y = model(inputs())
        y.square().mean().backward()
        return y

    case.compare(script, scores, inputs())


@habit("nn.init.xavier_uniform_ on the parameters after splitting, from one seed")
def initialized(case: Case) -> None:
    def script(model: Any) -> Any:
        torch.manual_seed(11)
        nn.init.xavier_uniform_(model.up.weight)
        return model(inputs())

    case.compare(script, scores, inputs())


@habit("tying two weights after splitting: model.a.weight = model.b.weight")
def tied_late(case: Case) -> None:
    def script(model: Any) -> Any:
        model(inputs())
        model.back.weight = model.there.weight
        y = model(inputs())
        y.square().mean().backward()
        return y, len(list(model.parameters()))

    case.compare(script, lambda: built(Square), inputs())


class Square(nn.Module):
    """Two layers of the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.there, self.back = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.back(torch.tanh(self.there(x)))


class Optional(Scores):
    """Uses a layer where it is there."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.up(x))
        norm = getattr(self, "norm", None)
        return self.down(hidden if norm is None else norm(hidden)).mean()


@habit("a submodule deleted: del model.norm, in a forward that looks for it")
def deleted(case: Case) -> None:
    changed(case, lambda model: delattr(model, "norm"), Optional)


@habit("forward replaced on the object: model.forward = types.MethodType(...), after splitting")
def patched(case: Case) -> None:
    def twice(self: Any, x: torch.Tensor) -> torch.Tensor:
        return type(self).forward(self, x) * 2

    def script(model: Any) -> Any:
        model(inputs())
        model.forward = types.MethodType(twice, model)
        y = model(inputs())
        y.square().mean().backward()
        return y

    case.compare(script, scores, inputs())


@habit("forward of a submodule replaced: model.up.forward = function, after splitting")
def patched_inside(case: Case) -> None:
    def script(model: Any) -> Any:
        model(inputs())
        before = model.up.forward
        model.up.forward = lambda x: before(x) * 2
        y = model(inputs())
        y.square().mean().backward()
        return y

    case.compare(script, scores, inputs())


@habit("a child appended to a ModuleList or Sequential after splitting")
def appended(case: Case) -> None:
    def build() -> nn.Module:
        return built(lambda: nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12)))

    def script(model: Any) -> Any:
        model(inputs())
        model.append(linear(5))
        y = model(inputs())
        y.square().mean().backward()
        return y

    case.compare(script, build, inputs())


@habit("a fresh attribute put on the model: model.step = 3")
def fresh_attribute(case: Case) -> None:
    def script(model: Any) -> Any:
        model.step = 3
        loss = model(*rows(6, 0))
        loss.backward()
        return loss, model.step

    case.compare(script)
