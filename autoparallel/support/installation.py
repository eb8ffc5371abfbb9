"""The installation that runs: whose packages are imported, and which versions there are."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
from functools import cache
from pathlib import Path

__all__ = ["OWN_PACKAGES", "device_rows", "installation_rows", "require_own_planners"]

_DISTRIBUTION = "torch-autoparallel"
# The names at the top that the project takes. `planners` is a word that others may take too.
OWN_PACKAGES = ("autoparallel", "planners", "megatron_rules")


def _home(name: str) -> Path | None:
    """Return the folder that a package at the top is, or would be, imported from; None if none."""
    module = sys.modules.get(name)
    spec = module.__spec__ if module is not None else importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]).resolve() if places else None


@cache
def require_own_planners() -> None:
    """Raise ImportError where another package named `planners` hides the project's.

    It lies beside `autoparallel`, wherever that is installed.

    >>> require_own_planners()
    """
    own, found = Path(__file__).resolve().parents[1], _home("planners")
    if found is not None and found == own.parent / "planners":
        return
    raise ImportError(
        f"autoparallel needs its own package `planners`, in {own.parent}, and Python finds "
        + (f"another one in {found}" if found else "none")
        + ": rename yours or import it from within a package of your own, or take its folder off "
        "sys.path (a script's own folder comes first); `python -m autoparallel doctor` shows more"
    )


def installation_rows() -> list[tuple[str, str, bool]]:
    """Return what the project runs on: the thing, what is known of it, whether that is as it
    should be.
    """
    # It takes longer to import than all else that `import autoparallel` imports.
    from importlib import metadata

    rows = [("python", f"{platform.python_version()} in {sys.prefix}", True)]
    claimed = metadata.packages_distributions()
    for name in OWN_PACKAGES:
        home = _home(name)
        owners = sorted(set(claimed.get(name, ())))
        others = [owner for owner in owners if owner.lower() != _DISTRIBUTION]
        text = str(home or "not found")
        if others:
            text += f"; {', '.join(others)} has files in a package of that name too"
        # A program that lies beside one of these would import it in place of the project's.
        elsewhere = _others_on_the_path(name)
        if elsewhere:
            text += f"; another package of that name is in {', '.join(map(str, elsewhere))}"
        rows.append((name, text, home is not None and not others and not elsewhere))
    try:
        require_own_planners()
    except ImportError as error:
        rows.append(("planners", str(error), False))
    try:
        required = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return [*rows, (_DISTRIBUTION, "not installed: its folder is on sys.path", True)]
    for text in required:
        if "extra ==" in text:
            continue
        name = re.split(r"[^A-Za-z0-9_.-]", text, maxsplit=1)[0]
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            rows.append((name, f"missing, {text} is needed", False))
            continue
        low, high = (re.search(rf"{sign}\s*([0-9.]+)", text) for sign in (">=", "<"))
        fits = (low is None or _numbers(version) >= _numbers(low[1])) and (
            high is None or _numbers(version) < _numbers(high[1])
        )
        wanted = text[len(name) :].strip()
        rows.append((name, f"{version}{f' ({wanted})' if wanted else ''}", fits))
    return rows


def _numbers(version: str) -> tuple[int, ...]:
    """Return a version's leading numbers.

    >>> _numbers("2.13.0+cpu") < _numbers("2.16")
    True
    """
    numbers = re.match(r"[0-9]+(?:\.[0-9]+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def device_rows() -> list[tuple[str, str, bool]]:
    """Return what this machine can do, in the form of `installation_rows`: its devices, and the
    backends that processes could talk by. It imports torch.
    """
    try:
        import torch
        import torch.distributed as dist
    except ImportError as error:
        return [("devices", f"unknown: torch cannot be imported ({error})", False)]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    devices = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{devices or 'no GPU that torch can use'}; {cores} CPU cores"
    if not dist.is_available():
        return [("devices", text, True), ("backends", "torch was built without any", False)]
    backends = [
        name
        for name, there in (
            ("gloo", dist.is_gloo_available()),
            ("nccl", dist.is_nccl_available()),
            ("mpi", dist.is_mpi_available()),
            ("ucc", dist.is_ucc_available()),
        )
        if there
    ]
    # GPUs of several processes talk by NCCL, CPUs by gloo.
    missing = [name for name in ("gloo", *["nccl"] * bool(count)) if name not in backends]
    told = ", ".join(backends) or "none"
    if missing:
        told += f"; {' and '.join(missing)} would be needed"
    return [("devices", text, True), ("backends", told, not missing)]


def _others_on_the_path(name: str) -> list[Path]:
    """Return folders on sys.path, besides the one that is used, with a package of that name.

    Another copy of this project is none: it is known by the package that lies beside it.
    """
    used = _home(name)
    others = []
    for entry in dict.fromkeys(sys.path):
        folder = Path(entry or ".").resolve() / name
        file = folder.with_suffix(".py")
        if folder == used or (folder.parent / "planners" / "table_memo.py").is_file():
            continue
        if (folder / "__init__.py").is_file() or file.is_file():
            others.append(folder if folder.is_dir() else file)
    return others
