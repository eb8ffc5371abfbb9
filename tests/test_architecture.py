"""Imports run one way: a file imports only what docs/architecture.md lists above it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("planners", "autoparallel", "megatron_rules")


def listed() -> list[str]:
    """The files in the order of the document, bottom-up, as module names."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.partition("<!-- files -->")[2].partition("<!-- end of files -->")[0]
    return re.findall(r"^\| `([\w./]+)\.py`", table, flags=re.MULTILINE)


def files() -> dict[str, Path]:
    """Every source file of the packages, by the name that the document gives it."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = str(path.relative_to(ROOT).with_suffix(""))
            if path.name != "__init__.py":
                found[name] = path
    return found


def imports_of(path: Path) -> set[str]:
    """Files of ours that a file imports when it is loaded or run; not those for types alone."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found.update(name.replace(".", "/") for name in names if name.split(".")[0] in PACKAGES)
    return found


def test_every_file_is_listed_once() -> None:
    """The document is complete and names nothing that is gone."""
    assert sorted(listed()) == sorted(files())


def test_imports_point_up_the_list() -> None:
    """So there is no cycle, and types live low enough."""
    order = {name: index for index, name in enumerate(listed())}
    wrong = [
        f"{name} imports {other}"
        for name, path in files().items()
        for other in imports_of(path)
        if other in order and order[other] >= order[name]
    ]
    assert not wrong


def test_planners_know_numbers_only() -> None:
    """No torch, nothing of ours."""
    for name, path in files().items():
        if name.startswith("planners/"):
            text = path.read_text()
            assert not re.search(r"^\s*(import|from) (torch|autoparallel)", text, re.MULTILINE), (
                name
            )


def test_the_oracle_shares_no_code_with_what_it_judges() -> None:
    """Hand-written layers import torch and each other."""
    for name in ("megatron_rules/regions", "megatron_rules/layers"):
        assert all(other.startswith("megatron_rules") for other in imports_of(files()[name]))


def test_only_capture_exports() -> None:
    """torch.export is used in one place."""
    users = [name for name, path in files().items() if "torch.export.export(" in path.read_text()]
    assert users == ["autoparallel/capture/export"]


def test_nothing_of_the_package_is_loaded_before_it_is_used() -> None:
    """`import autoparallel` does not import torch."""
    import subprocess
    import sys

    code = "import autoparallel, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def frozen_classes(path: Path) -> list[ast.ClassDef]:
    """Dataclasses whose values are not to change."""
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        and any("frozen=True" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]


def writes_into_itself(function: ast.AST) -> bool:
    """Whether a method sets or deletes items of what its value holds: `self.known[key] = ...`."""
    return any(
        isinstance(node, ast.Subscript)
        and isinstance(node.ctx, ast.Store | ast.Del)
        and ast.unparse(node.value).startswith("self.")
        for node in ast.walk(function)
    )


def test_frozen_values_hold_no_caches_that_grow() -> None:
    """What is found out about a value belongs to the object that works with it."""
    wrong = [
        f"{name}: {kind.name}.{function.name}"
        for name, path in files().items()
        for kind in frozen_classes(path)
        for function in kind.body
        if isinstance(function, ast.FunctionDef) and function.name != "__post_init__"
        if writes_into_itself(function)
        or {ast.unparse(decorator) for decorator in function.decorator_list}
        & {"cache", "functools.cache", "lru_cache", "functools.lru_cache"}
    ]
    assert not wrong
