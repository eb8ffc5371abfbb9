"""Habits with number types: autocast, scaled gradients, modules moved to other types."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .case import Case
from .models import inputs, plain, rows, scores
from .registry import in_group

habit = in_group("Number types")


def single() -> nn.Module:
    """Return the usual module in float32."""
    return plain().float()


def batch(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch of a type."""
    x, labels = rows(6, seed)
    return x.to(dtype), labels


@habit("torch.autocast('cpu', torch.bfloat16) around the call")
def autocast(case: Case) -> None:
    case.computed = torch.bfloat16

    def script(model: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(*batch())
        loss.backward()
        return loss, loss.dtype

    case.compare(script, single, batch())


@habit("torch.autocast around some calls, and none around others")
def autocast_by_turns(case: Case) -> None:
    case.computed = torch.bfloat16

    def script(model: Any) -> Any:
        y = [model(inputs().float())]
        with torch.autocast("cpu", torch.bfloat16):
            y.append(model(inputs().float()))
        y.append(model(inputs().float()))
        return y

    case.compare(script, lambda: scores().float(), inputs().float())


@habit("torch.autocast inside of forward (a decorated forward)")
def autocast_inside(case: Case) -> None:
    case.computed = torch.bfloat16

    class Cast(type(scores())):  # type: ignore[misc]
        @torch.autocast("cpu", torch.bfloat16)
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    def build() -> Any:
        torch.manual_seed(3)
        return Cast()

    def script(model: Any) -> Any:
        y = model(inputs().float())
        y.float().square().mean().backward()
        return y

    case.compare(script, build, inputs().float())


@habit("torch.amp.GradScaler: scale, unscale_, clip, step, update")
def scaler(case: Case) -> None:
    def script(model: Any) -> Any:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for seed in range(3):
            optimizer.zero_grad()
            loss = model(*rows(6, seed))
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss)
        return losses, scaler.get_scale()

    case.compare(script)


@habit("GradScaler skips a step whose gradients are infinite on one part")
def scaler_skips(case: Case) -> None:
    def script(model: Any) -> Any:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler.scale(model(*rows(6, 0))).backward()
        # One element of one weight: it lies on one rank.
        weight = dict(model.named_parameters())["up.weight"]
        spoiled = torch.zeros(12, 6, dtype=torch.float64)
        spoiled[-1, -1] = float("inf")
        gradient = weight.grad
        if type(gradient) is torch.Tensor:
            gradient.add_(spoiled)
        else:
            from torch.distributed.tensor import distribute_tensor

            gradient.add_(distribute_tensor(spoiled, gradient.device_mesh, gradient.placements))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return scaler.get_scale()

    case.compare(script)


def moved(case: Case, move: Any, dtype: torch.dtype) -> None:
    """Compare models moved to a type, after splitting."""

    def script(model: Any) -> Any:
        model(*batch())
        same = move(model)
        loss = model(*batch(dtype))
        loss.backward()
        return loss, same is model

    case.compare(script, single, batch())


@habit("model.bfloat16() before splitting")
def bfloat16_before(case: Case) -> None:
    def script(model: Any) -> Any:
        loss = model(*batch(torch.bfloat16))
        loss.backward()
        return loss

    case.compare(script, lambda: plain().bfloat16(), batch(torch.bfloat16))


@habit("model.half() before splitting")
def half_before(case: Case) -> None:
    def script(model: Any) -> Any:
        loss = model(*batch(torch.float16))
        loss.backward()
        return loss

    case.compare(script, lambda: plain().half(), batch(torch.float16))


@habit("model.bfloat16() after splitting")
def bfloat16_after(case: Case) -> None:
    moved(case, lambda model: model.bfloat16(), torch.bfloat16)


@habit("model.double() after splitting")
def double_after(case: Case) -> None:
    moved(case, lambda model: model.double(), torch.float64)


@habit("model.to(torch.float64) and model.to('cpu') after splitting")
def to_dtype(case: Case) -> None:
    moved(case, lambda model: model.to(torch.float64).to("cpu"), torch.float64)


@habit("some layers kept in float32: model.bfloat16(), model.norm.float()")
def mixed(case: Case) -> None:
    case.computed = torch.bfloat16

    def build() -> Any:
        model = scores().bfloat16()
        model.norm.float()
        model.norm.register_forward_pre_hook(lambda m, args: tuple(a.float() for a in args))
        model.norm.register_forward_hook(lambda m, args, y: y.bfloat16())
        return model

    def script(model: Any) -> Any:
        y = model(inputs().bfloat16())
        y.float().square().mean().backward()
        return y

    case.compare(script, build, inputs().bfloat16())


@habit("torch.set_float32_matmul_precision('medium')")
def matmul_precision(case: Case) -> None:
    def script(model: Any) -> Any:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            loss = model(*batch())
            loss.backward()
            return loss, torch.get_float32_matmul_precision()
        finally:
            torch.set_float32_matmul_precision(before)

    case.compare(script, single, batch())


@habit("torch.set_default_dtype(torch.float64) around splitting and training")
def default_dtype(case: Case) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        case.compare(lambda model: model(*rows(6, 0)))
    finally:
        torch.set_default_dtype(before)


@habit("complex numbers: parameters and inputs")
def complex_numbers(case: Case) -> None:
    def build() -> Any:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 5)).to(torch.complex128)

    def script(model: Any) -> Any:
        y = model(torch.complex(inputs(), inputs(seed=1)))
        y.abs().square().mean().backward()
        return y

    case.compare(script, build, torch.complex(inputs(), inputs(seed=1)))
