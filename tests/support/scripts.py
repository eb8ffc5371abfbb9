"""Run scripts as programs of their own, without importing torch for each."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

import torch
from processes import start_server

__all__ = ["run_script"]


def run_script(
    path: Path, *arguments: str, folder: Path, variables: Mapping[str, str] | None = None
) -> CompletedProcess[str]:
    """Run a file of Python as the main program of a process, and return what it said.

    The process is a fork of the server of tests/support/processes.py, which has imported torch and
    this project: that takes as long as most examples. folder: where it runs. variables: of the
    environment, besides those of this process.
    """
    start_server()
    environment = {**os.environ, **(variables or {})}
    with TemporaryDirectory() as name:
        said = [Path(name, "out"), Path(name, "errors")]
        process = multiprocessing.get_context("forkserver").Process(
            target=_run, args=(path, arguments, folder, environment, said), daemon=True
        )
        process.start()
        process.join()
        assert process.exitcode is not None
        return CompletedProcess([str(path)], process.exitcode, *(each.read_text() for each in said))


def _run(
    path: Path,
    arguments: tuple[str, ...],
    folder: Path,
    environment: dict[str, str],
    said: list[Path],
) -> None:
    for file, number in zip(said, (1, 2), strict=True):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    # A fork has the variables that the server was started with.
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    code = 0
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the tear-down, see tests/support/processes.py.
    os._exit(code)
