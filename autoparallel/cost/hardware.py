"""Hardware as data: devices, nodes and links, from presets, from a file, or the machine at hand."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from autoparallel.cost.cluster import Hardware, Matmul
from autoparallel.cost.links import Algorithm, Link, Regime
from autoparallel.errors import PlanError
from autoparallel.placement import Collective
from autoparallel.support.json_text import read_json
from autoparallel.support.written_files import write_file

__all__ = [
    "Algorithm",
    "Hardware",
    "Link",
    "Matmul",
    "Regime",
    "device_planned_for",
    "find_hardware",
    "preset_of",
    "presets",
    "read_hardware",
    "write_hardware",
]

_KINDS = tuple(kind.value for kind in Collective)


@lru_cache(maxsize=1)
def _rows() -> dict[str, Any]:
    """Return the presets' entries by name, read once."""
    text = resources.files("autoparallel.cost").joinpath("hardware.json").read_text()
    rows: dict[str, Any] = json.loads(text)
    return rows


def presets() -> tuple[str, ...]:
    """Return the names that `find_hardware` knows.

    >>> "dgx-a100" in presets()
    True
    """
    return tuple(_rows())


@lru_cache(maxsize=32)
def _preset(name: str) -> Hardware:
    """Return the preset of that name."""
    return _parse({"name": name, **_rows()[name]}, f"preset {name}")


def find_hardware(name: str | Path | Hardware) -> Hardware:
    """Return the preset of that name, or the hardware that the JSON file at that path describes.

    name: a preset, a path, hardware itself (returned as it is), or "auto" for the GPU at hand if
    there is one, else "cpu". Raises PlanError for an unknown name, with the known ones, and for a
    file that does not describe hardware.

    >>> find_hardware("dgx-a100").devices_per_node
    8
    """
    if isinstance(name, Hardware):
        return name
    if not isinstance(name, str | Path):
        raise PlanError(
            f"hardware={name!r}",
            fix=f'choose one of {", ".join(_rows())}, "auto", or give the path of a .json file',
        )
    if isinstance(name, Path) or name.endswith(".json"):
        return read_hardware(name)
    if name == "auto":
        name = _at_hand()
    if name not in _rows():
        raise PlanError(
            f"no hardware preset {name!r}",
            fix=f"choose one of {', '.join(_rows())}, or give the path of a .json file",
        )
    return _preset(name)


def device_planned_for(name: str, asked: str) -> str:
    """Return the kind of device that a plan was made for, "gpu" or "cpu".

    name: of the plan's hardware. asked: what was asked for, a preset, "auto" or the path of a file.
    Of a file that is there no more, a GPU's.

    >>> device_planned_for("cpu", "auto"), device_planned_for("mine", "gone.json")
    ('cpu', 'gpu')
    """
    if name in _rows():
        return _preset(name).device
    try:
        return find_hardware(asked).device
    except PlanError:
        return "gpu"


def read_hardware(path: str | Path) -> Hardware:
    """Return the hardware that a file describes, as `write_hardware` writes it.

    path: of a JSON file; without an entry "name" the hardware is named after it. Raises PlanError
    for a file that is missing, or that has unknown, missing or impossible entries.
    """
    try:
        rows = read_json(Path(path).read_text(), finite=False)
    except (OSError, ValueError) as error:
        raise PlanError(
            f"no hardware description in {path}",
            why=str(error),
            fix=f"give a JSON file, or one of the presets {', '.join(_rows())}",
        ) from error
    if isinstance(rows, dict):
        rows.setdefault("name", Path(path).stem)
    return _parse(rows, str(path))


def write_hardware(hardware: Hardware, path: str | Path) -> None:
    """Write a file that `read_hardware` reads to the same hardware.

    Example: `write_hardware(find_hardware("dgx-a100"), "mine.json")`
    """
    rows = asdict(hardware)
    rows["flops_per_second"] = {str(size): rate for size, rate in hardware.flops_per_second}
    for name in ("inside", "network"):
        rows[name] = [
            {**asdict(regime), "algorithm": regime.algorithm.value}
            for regime in getattr(hardware, name).regimes
        ]
    write_file(path, (json.dumps(rows, indent=2) + "\n").encode())


def _parse(rows: Any, where: str) -> Hardware:
    """Return the hardware of checked entries.

    where: of the description, for errors. Raises PlanError for unknown, missing or impossible
    entries.
    """
    rows = _checked(rows, Hardware, where)
    for key in ("name", "source"):
        if not isinstance(rows[key], str):
            _refuse(where, key, rows[key], "a text")
    rates = rows["flops_per_second"]
    if not isinstance(rates, Mapping) or not rates:
        _refuse(where, "flops_per_second", rates, "rates by itemsize, such as {'2': 312e12}")
    for size in rates:
        if not str(size).isdecimal() or int(size) < 1:
            _refuse(where, f"flops_per_second[{size}]", rates[size], "it by a number of bytes")
    matmul = _checked(rows["matmul"], Matmul, f"{where}, matmul")
    for key, value in matmul.items():
        if key != "tiles":
            _number(
                f"{where}, matmul",
                key,
                value,
                positive=key in ("processors", "efficiency", "fused"),
            )
    tiles = matmul.get("tiles", [[1, 1]])
    try:
        matmul["tiles"] = tuple((int(rows), int(columns)) for rows, columns in tiles)
    except (TypeError, ValueError, OverflowError):
        matmul["tiles"] = ()
    if not matmul["tiles"] or min(map(min, matmul["tiles"])) < 1:
        _refuse(f"{where}, matmul", "tiles", tiles, "pairs of sizes, such as [[256, 128]]")
    counts = ("devices_per_node", "device_memory_bytes")
    rates_of = ("memory_bytes_per_second", "memory_efficiency")
    for key in (*counts, *rates_of):
        if not _number(where, key, rows[key]).is_integer() and key in counts:
            _refuse(where, key, rows[key], "a whole number")
    for key in ("launch_seconds", "spread", "functions_per_second", "exponentials_per_second"):
        _number(where, key, rows.get(key, 0.0), positive=False)
    by_size = rows.get("memory_by_size", [])
    try:
        pairs = tuple((int(size), float(rate)) for size, rate in by_size)
    except (TypeError, ValueError, OverflowError):
        _refuse(where, "memory_by_size", by_size, "pairs of bytes and rate, such as [[4096, 1e9]]")
    if any(size <= 0 or not 0 < rate < math.inf for size, rate in pairs) or list(pairs) != sorted(
        dict(pairs).items()
    ):
        _refuse(where, "memory_by_size", by_size, "positive pairs of ascending bytes")
    device = rows.get("device", "gpu")
    if device not in ("gpu", "cpu"):
        _refuse(where, "device", device, "'gpu' or 'cpu'")
    return Hardware(
        name=str(rows["name"]),
        source=str(rows["source"]),
        devices_per_node=int(rows["devices_per_node"]),
        device_memory_bytes=int(rows["device_memory_bytes"]),
        flops_per_second=tuple(
            (int(size), _number(where, f"flops_per_second[{size}]", rate))
            for size, rate in rates.items()
        ),
        memory_bytes_per_second=float(rows["memory_bytes_per_second"]),
        memory_efficiency=float(rows["memory_efficiency"]),
        launch_seconds=float(rows["launch_seconds"]),
        spread=float(rows["spread"]),
        matmul=Matmul(**matmul),
        inside=_link(rows["inside"], f"{where}, inside"),
        network=_link(rows["network"], f"{where}, network"),
        memory_by_size=pairs,
        functions_per_second=float(rows.get("functions_per_second", 0.0)),
        exponentials_per_second=float(rows.get("exponentials_per_second", 0.0)),
        device=device,
    )


def _link(rows: Any, where: str) -> Link:
    """Return the link of checked entries."""
    if not isinstance(rows, list) or not rows:
        _refuse(where, "regimes", rows, "a list of at least one")
    algorithms = [each.value for each in Algorithm]
    regimes = []
    for row in rows:
        row = _checked(row, Regime, where)
        if row["algorithm"] not in algorithms:
            _refuse(where, "algorithm", row["algorithm"], f"one of {', '.join(algorithms)}")
        if not isinstance(row.get("protocol", ""), str):
            _refuse(where, "protocol", row["protocol"], "a text")
        # All others are numbers.
        for key in sorted(row.keys() - {"algorithm", "protocol", "collectives"}):
            _number(where, key, row[key], positive=key == "bytes_per_second")
        only = row.get("collectives", [])
        if not isinstance(only, list) or any(kind not in _KINDS for kind in only):
            _refuse(where, "collectives", only, f"a list of {', '.join(_KINDS)}")
        row = {**row, "algorithm": Algorithm(row["algorithm"]), "collectives": tuple(only)}
        regimes.append(Regime(**row))
    link = Link(tuple(regimes))
    # A plan may need any collective, so the link must be able to do all.
    for kind in Collective:
        if not link.lines(kind, 2):
            have = [each.algorithm.value for each in regimes]
            _refuse(where, "regimes", have, f"one that makes {kind.value}")
    return link


def _checked(rows: Any, kind: type[Any], where: str) -> dict[str, Any]:
    """Return the entries, of which none is unknown and none missing."""
    if not isinstance(rows, Mapping):
        _refuse(where, kind.__name__.lower(), rows, "a table of named entries")
    names = {each.name: each for each in fields(kind)}
    optional = {each.name for each in fields(kind) if each.default is not MISSING}
    unknown = [key for key in rows if key not in names]
    missing = [name for name in names if name not in rows and name not in optional]
    if unknown or missing:
        raise PlanError(
            f"{'unknown' if unknown else 'missing'} entry {(unknown or missing)[0]!r}",
            where=where,
            fix=f"the entries are {', '.join(names)}",
        )
    return dict(rows)


def _number(where: str, key: str, value: Any, positive: bool = True) -> float:
    """Return the value as a float. Raises PlanError unless it is a number in range."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < 0 or (positive and value == 0):
        _refuse(where, key, value, f"a {'positive' if positive else 'non-negative'} number")
    return float(value)


def _refuse(where: str, key: str, value: Any, wanted: str) -> None:
    """Raise the error for an impossible entry."""
    raise PlanError(f"{key} is {value!r}", where=where, fix=f"give {wanted}")


def _at_hand() -> str:
    """Return the name of the preset for the device of this machine."""
    # Imported here, because presets and files need no torch.
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    device = torch.cuda.get_device_name()
    known = preset_of(device, torch.cuda.get_device_properties(0).total_memory)
    if known is None:
        warnings.warn(
            f"{device} is no GPU that figures are known of: the plan is made for {_STAND_IN}, and "
            "its predictions are not this machine's. Measure it: autoparallel calibrate --output "
            'mine.json; then pass hardware="mine.json", or one of the presets '
            f"{', '.join(presets())}",
            stacklevel=2,
        )
    return known or _STAND_IN


# What stands in for a GPU of which no figures are known, with a warning.
_STAND_IN = "dgx-a100"
# Parts of the names that drivers give devices, and their presets. The longer names come first.
_DEVICES = (
    ("GB200", "gb200-nvl72"),
    ("B200", "dgx-b200"),
    ("H200", "dgx-h200"),
    ("H100", "dgx-h100"),
    ("L40S", "l40s"),
    ("A100", "dgx-a100"),
    ("MI300X", "mi300x"),
    ("V100", "dgx-2h"),
)
_HALF_OF_80_GB = 60 * 2**30


def preset_of(device: str, memory_nbytes: int) -> str | None:
    """Return the preset of a GPU by the name that its driver gives it; None for an unknown one.

    memory_nbytes: of the device, by which the two A100 are told apart.

    >>> preset_of("NVIDIA A100-SXM4-40GB", 40 * 2**30), preset_of("NVIDIA GeForce RTX 4090", 2**34)
    ('dgx-a100-40gb', None)
    """
    for part, name in _DEVICES:
        if part in device:
            small = name == "dgx-a100" and memory_nbytes < _HALF_OF_80_GB
            return "dgx-a100-40gb" if small else name
    return None
