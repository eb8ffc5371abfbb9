"""Another package named `planners` is told, and the doctor says what is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autoparallel.cli import main
from autoparallel.support.installation import OWN_PACKAGES

ROOT = Path(__file__).resolve().parents[2]


def run(code: list[str], first: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with a folder that comes before all others where packages are looked for."""
    path = os.pathsep.join([str(first), str(ROOT)])
    return subprocess.run(
        [sys.executable, *code],
        capture_output=True,
        text=True,
        cwd=first,
        env={**os.environ, "PYTHONPATH": path},
    )


def test_another_planners_is_told(tmp_path: Path) -> None:
    """And not run: what it does is not known."""
    (tmp_path / "planners").mkdir()
    (tmp_path / "planners" / "__init__.py").write_text("print('theirs')")
    result = run(["-c", "import autoparallel; autoparallel.make_plan"], tmp_path)
    assert result.returncode
    assert f"ImportError: autoparallel needs its own package `planners`, in {ROOT}" in result.stderr
    assert f"another one in {tmp_path / 'planners'}" in result.stderr
    assert "theirs" not in result.stdout
    doctor = run(["-m", "autoparallel", "doctor"], tmp_path)
    assert doctor.returncode == 1
    (line,) = [line for line in doctor.stdout.splitlines() if line.startswith("! ")]
    assert str(tmp_path / "planners") in line


def test_the_doctor_says_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--json"])
    rows = json.loads(capsys.readouterr().out)
    homes = {row["what"]: row["text"] for row in rows}
    assert all(homes[name].startswith(str(ROOT / name)) for name in OWN_PACKAGES)
    assert status == (0 if all(row["good"] for row in rows) else 1)


def test_another_autoparallel_is_told(tmp_path: Path) -> None:
    """A program that lies beside it would import it in place of the project's."""
    (tmp_path / "autoparallel").mkdir()
    (tmp_path / "autoparallel" / "__init__.py").write_text("")
    code = "import sys; from autoparallel.cli import main; sys.exit(main(['doctor']))"
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    doctor = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert doctor.returncode == 1
    (line,) = [line for line in doctor.stdout.splitlines() if line.startswith("! autoparallel")]
    assert f"another package of that name is in {tmp_path / 'autoparallel'}" in line
    told = {line[2:].split()[0] for line in doctor.stdout.splitlines()}
    assert {"devices", "backends"} <= told
