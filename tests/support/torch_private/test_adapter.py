"""Torch's private names are used in one package, each with a test of what it does.

The tests beside this one say how the names behave: one that fails under a new release of torch says
which name changed and what depended on it.
"""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

from autoparallel.support import torch_private

ROOT = Path(__file__).parents[3]


ATTRIBUTES = {
    "_C",
    "_c10d_functional",
    "_can_decompose",
    "_cdata",
    "_codegen",
    "_execution_engine",
    "_local_tensor",
    "_make_wrapper_subclass",
    "_optimized_summation",
    "_schema",
    "_spec",
}


def private_names(path: Path) -> list[str]:
    """Return the private names of torch in a file, with their lines."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "torch"]
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if re.fullmatch(r"torch(\.\w+)+", text):
                names = [text]
            elif node.attr in ATTRIBUTES:
                names = [f"torch.{node.attr}"]
        elif isinstance(node, ast.Constant) and str(node.value).startswith("torch."):
            names = [str(node.value).split("(")[0]]
        parts = [part for name in names for part in name.split(".")[1:]]
        if any(re.match(r"_(?!_)", part) for part in parts):
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {names[0]}")
    return found


def test_private_names_are_used_in_one_package() -> None:
    """So that a new release of torch breaks files of one folder."""
    adapter = Path(torch_private.__file__).parent
    used = []
    for folder in ("autoparallel", "planners", "megatron_rules", "examples", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.parent != adapter:
                used += private_names(path)
    assert not used
    assert all(private_names(path) for path in adapter.glob("*.py"))


def test_every_public_name_of_the_adapter_is_importable_from_it() -> None:
    """Its files are by subject, and nobody needs to know in which one a name is."""
    for path in sorted(Path(torch_private.__file__).parent.glob("*.py")):
        if path.stem != "__init__":
            module = importlib.import_module(f"{torch_private.__name__}.{path.stem}")
            assert set(module.__all__) <= set(torch_private.__all__), path


def test_every_name_of_the_adapter_is_tested_beside_this() -> None:
    """A name that is added comes with a test of what it does."""
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    missing = [name for name in torch_private.__all__ if f"torch_private.{name}" not in text]
    assert not missing
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        torch_private.nothing  # noqa: B018
