"""Hardware as data: named presets, and the choice for the machine at hand."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

from autoparallel.errors import PlanError

__all__ = ["Hardware", "Link", "find_hardware", "presets"]


@dataclass(frozen=True, slots=True)
class Link:
    """What a mesh axis communicates over.

    bytes_per_second: bus bandwidth of a rank. hop_seconds: latency of one step of a ring.
    floor_seconds: of starting any collective.
    """

    bytes_per_second: float
    hop_seconds: float
    floor_seconds: float


@dataclass(frozen=True, slots=True)
class Hardware:
    """One rank's device and its link.

    flops_per_second: (itemsize, peak) pairs of matrix products. source: where figures come from.
    """

    name: str
    flops_per_second: tuple[tuple[int, float], ...]
    memory_bytes_per_second: float
    link: Link
    source: str

    def peak(self, itemsize: int) -> float:
        """Peak rate of products of elements of `itemsize` bytes, in FLOP/s."""
        rates = dict(self.flops_per_second)
        return rates.get(itemsize, rates[max(rates)])


@lru_cache(maxsize=1)
def _rows() -> dict[str, Any]:
    text = resources.files("autoparallel.cost").joinpath("hardware.json").read_text()
    rows: dict[str, Any] = json.loads(text)
    return rows


def presets() -> tuple[str, ...]:
    """Names that `find_hardware` knows."""
    return tuple(_rows())


def find_hardware(name: str | Hardware) -> Hardware:
    """The preset of that name; "auto" is the GPU at hand if there is one, else "cpu".

    Raises PlanError for an unknown name, with the known ones.
    """
    if isinstance(name, Hardware):
        return name
    if name == "auto":
        name = _at_hand()
    rows = _rows()
    if name not in rows:
        raise PlanError(f"no hardware preset {name!r}", fix=f"choose one of {', '.join(rows)}")
    row = rows[name]
    rates = tuple((int(size), float(rate)) for size, rate in row["flops_per_second"].items())
    return Hardware(
        name, rates, float(row["memory_bytes_per_second"]), Link(**row["link"]), row["source"]
    )


def _at_hand() -> str:
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    device = torch.cuda.get_device_name()
    for part, name in (("H100", "dgx-h100"), ("H200", "dgx-h100"), ("V100", "dgx-2h")):
        if part in device:
            return name
    return "dgx-a100"
