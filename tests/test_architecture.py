"""Imports run one way: a file imports only what docs/architecture.md lists above it."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("planners", "autoparallel", "megatron_rules")

# The order of packages, and of the files at autoparallel's root: each imports from the rows before
# its own. Packages of one row do not import each other, but for those that raise errors.
ROWS = (
    ("planners",),
    ("errors", "placement", "mesh", "options", "support"),
    ("graph",),
    ("rules", "runtime"),
    ("threads",),
    ("plan",),
    ("rewrite", "cost", "capture"),
    ("discovery", "parallel"),
    ("strategy", "analysis"),
    ("planning",),
    ("view",),
    ("questions", "exports"),
    ("api",),
    ("train",),
    ("commands",),
    ("cli",),
    ("__init__", "__main__"),
)
RAISE_ERRORS = ("mesh", "options", "support")
AT_THE_ROOT = {
    "__init__.py", "__main__.py", "api.py", "cli.py", "errors.py", "mesh.py", "options.py",
    "py.typed",
}  # fmt: skip


def listed() -> list[str]:
    """The files in the order of the document, bottom-up, as module names."""
    text = (ROOT / "docs" / "files.md").read_text()
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


def roots() -> dict[str, Path]:
    """The packages' own files, which may import what is to be had from the package."""
    return {
        str(path.relative_to(ROOT).with_suffix("")): path
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("__init__.py"))
    }


# Files with a table `_HOMES`, from a name to the module that it is imported from when it is first
# asked for; and what comes before the modules' names there.
LAZY_TABLES = {
    "autoparallel/__init__": "autoparallel.",
    "autoparallel/support/torch_private/__init__": "",
}


def named_modules(path: Path) -> frozenset[str]:
    """The modules that a file imports, in every way: those for types alone, those inside of
    functions, those by import_module, and those of a lazy table.

    Of `from a import b` these are a and a.b, which may be a module. Raises ValueError for what
    hides which module is imported.
    """
    return modules_in(path, path.read_text())


@cache
def modules_in(path: Path, text: str) -> frozenset[str]:
    """The same of a file with this text, which several tests ask for."""
    tree = ast.parse(text)
    name = str(path.relative_to(ROOT).with_suffix("")) if path.is_relative_to(ROOT) else path.stem
    modules: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if node.level or node.module is None:
                raise ValueError(f"{name}:{node.lineno} imports relative to its folder")
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and re.search(
            r"\b(import_module|__import__)$", ast.unparse(node.func)
        ):
            match node.args[0]:
                case ast.Constant(value=str(module)):
                    modules.add(module)
                case _ if name not in LAZY_TABLES:
                    raise ValueError(f"{name}:{node.lineno} imports a module by a computed name")
        elif (
            isinstance(node, ast.Assign)
            and name in LAZY_TABLES
            and ast.unparse(node.targets[0]) == "_HOMES"
        ):
            modules |= {LAZY_TABLES[name] + home for home in ast.literal_eval(node.value).values()}
    return frozenset(modules)


def imports_of(path: Path) -> set[str]:
    """Files of ours that a file imports, as `files` names them; packages are among them, with the
    files that they import themselves, but for the root, which imports nothing before it is asked.
    """
    imports = {
        module.replace(".", "/")
        for module in named_modules(path)
        if module.split(".")[0] in PACKAGES
    }
    for name in sorted(imports):
        package = ROOT / name / "__init__.py"
        if "/" in name and package.exists() and package != path:
            imports |= imports_of(package)
    return imports


def rank_of_rows() -> dict[str, int]:
    """The number of its row in ROWS, for every package and every file at the root."""
    return {package: row for row, packages in enumerate(ROWS) for package in packages}


def package_of(name: str) -> str | None:
    """The package in ROWS to which a file belongs, None where it is not of ROWS."""
    first, _, rest = name.partition("/")
    if first == "planners":
        return "planners"
    return (rest.split("/")[0] or "__init__") if first == "autoparallel" else None


def package_imports() -> dict[tuple[str, str], list[str]]:
    """Imports from one package of ROWS to another, by both, each as "file imports file"."""
    row = rank_of_rows()
    between: dict[tuple[str, str], list[str]] = {}
    for name, path in {**files(), **roots()}.items():
        package = package_of(name)
        for other in sorted(imports_of(path)):
            target = package_of(other)
            # What has no row is a name that is taken from the root, which is listed beside it.
            if package and target in row and target != package:
                between.setdefault((package, target), []).append(f"{name} imports {other}")
    return between


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


def test_packages_import_from_rows_before_their_own() -> None:
    """ROWS is the order; imports for types alone, inside of functions and by name count as well."""
    row = rank_of_rows()
    wrong = [
        line
        for (package, other), lines in package_imports().items()
        if row[other] >= row[package] and not (other == "errors" and package in RAISE_ERRORS)
        for line in lines
    ]
    assert not wrong


def test_no_package_imports_another_in_both_directions() -> None:
    """Whatever their rows are."""
    between = package_imports()
    assert not [pair for pair in between if pair[::-1] in between]


def test_every_package_has_a_row() -> None:
    """And every row names packages that there are."""
    there = {package_of(name) for name in files()} | {"__init__"}
    assert there - {None} == set(rank_of_rows())


def test_every_way_to_import_is_counted(tmp_path: Path) -> None:
    """None of them is a way around the order."""
    import pytest

    file = tmp_path / "some.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "from importlib import import_module\n"
        "import autoparallel.a\n"
        "if TYPE_CHECKING:\n    from autoparallel.b import c\n"
        "def inside():\n    from autoparallel import d\n"
        "    return import_module('autoparallel.e'), __import__('autoparallel.f')\n"
    )
    assert imports_of(file) == {
        "autoparallel", "autoparallel/a", "autoparallel/b", "autoparallel/b/c", "autoparallel/d",
        "autoparallel/e", "autoparallel/f",
    }  # fmt: skip
    for hidden in ("from . import a", "import_module(f'autoparallel.{x}')"):
        file.write_text(hidden)
        with pytest.raises(ValueError, match="some:1 imports"):
            imports_of(file)


def test_lazy_tables_count_as_imports() -> None:
    """The root of the package imports the home of each public name, when it is asked for."""
    assert "autoparallel/view/report" in imports_of(ROOT / "autoparallel" / "__init__.py")
    private = named_modules(ROOT / "autoparallel" / "support" / "torch_private" / "__init__.py")
    assert "torch.utils._pytree" in private


def test_no_two_files_have_one_name() -> None:
    """A file is found by its name alone, and named by it in conversation."""
    stems = [name.rpartition("/")[2] for name in files() if name.startswith("autoparallel/")]
    assert not {stem for stem in stems if stems.count(stem) > 1}


def test_only_what_everyone_needs_lies_at_the_root() -> None:
    """Everything else belongs to a package."""
    root = ROOT / "autoparallel"
    assert {path.name for path in root.iterdir() if path.is_file()} == AT_THE_ROOT


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
