"""The device that the kit runs on, and the sizes that go with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Setting", "median_seconds"]


@dataclass(frozen=True)
class Setting:
    """device: "cuda", or "cpu" with tiny sizes where there is no GPU."""

    device: str

    @staticmethod
    def here() -> Setting:
        """Return the setting of this machine."""
        return Setting("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def cuda(self) -> bool:
        """True on a GPU."""
        return self.device == "cuda"

    @property
    def hardware(self) -> str:
        """The name of the device."""
        return torch.cuda.get_device_name() if self.cuda else "cpu"

    def wait(self) -> None:
        """Wait until all work is done."""
        if self.cuda:
            torch.cuda.synchronize()

    def gpt(self, **sizes: Any) -> Any:
        """Return a plain GPT on the device: 8 layers of 1024, or a tiny one."""
        from autoparallel.train.models import GPT, GPTConfig

        large = {"layers": 8, "hidden": 1024, "heads": 16, "vocabulary": 16384, "positions": 1024}
        tiny = {"layers": 2, "hidden": 32, "heads": 4, "vocabulary": 64, "positions": 16}
        chosen = {**(large if self.cuda else tiny), "dropout": 0.0, **sizes}
        torch.manual_seed(1)
        with torch.device(self.device):
            return GPT(GPTConfig(**chosen))

    def batch(self, model: Any, size: int = 8) -> dict[str, torch.Tensor]:
        """Return a batch of full length for a plain GPT."""
        return model.example_inputs(batch=size if self.cuda else 2)


def median_seconds(step: Callable[[], Any], setting: Setting, steps: int = 0) -> float:
    """Return the median seconds of a step, each waited for."""
    count = steps or (20 if setting.cuda else 3)
    seconds = []
    for _ in range(3):
        step()
    for _ in range(count):
        setting.wait()
        start = time.perf_counter()
        step()
        setting.wait()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[count // 2]
