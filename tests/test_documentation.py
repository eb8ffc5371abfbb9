"""The documents are true where a program can tell: links, paths, examples and figures."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from scripts import run_script

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = (README, *sorted((ROOT / "docs").glob("*.md")))
LONGEST = {"README.md": 120}  # characters in a line outside of tables; 100 elsewhere
MOST_WORDS = 30  # in a cell
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A path in backticks names a file: it has a folder, or an ending that files here have.
PATH = re.compile(r"`([\w.\-/]+/|[\w.\-/]+\.(?:py|md|json|svg|txt|toml))`")
FOLDERS = ("autoparallel", "planners", "megatron_rules", "examples", "benchmarks", "docs", "tests")
# Files of readers' own, and folders that programs write to.
THEIRS = {"train.py", "my-machine.json", "path.json", "out/"}
documents = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def blocks(path: Path) -> list[tuple[str, str]]:
    """The language and the text of every block of code."""
    return FENCE.findall(path.read_text())


def prose(path: Path) -> str:
    """The document without its blocks of code."""
    return FENCE.sub("", path.read_text())


def anchors(path: Path) -> set[str]:
    """The names under which a page's headings are linked to."""
    titles = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@documents
def test_lines_are_short(path: Path) -> None:
    """A line is read at a glance, also in a terminal. Tables and single words are exempt."""
    longest = LONGEST.get(path.name, 100)
    lines = path.read_text().splitlines()
    assert not [
        line
        for line in lines
        if len(line) > longest and not line.startswith("|") and " " in line.strip()
    ]


@documents
def test_cells_are_short(path: Path) -> None:
    """What needs more words than a cell holds is told in sentences."""
    rows = [line for line in path.read_text().splitlines() if line.startswith("|")]
    cells = [cell for row in rows for cell in re.split(r"(?<!\\)\|", row)]
    assert not [cell for cell in cells if len(cell.split()) > MOST_WORDS]


@documents
def test_links_lead_somewhere(path: Path) -> None:
    """Every relative link is to a file that exists, and to a heading that it has."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        assert page.is_file(), target
        if anchor:
            assert anchor in anchors(page), target


@documents
def test_files_that_are_named_exist(path: Path) -> None:
    """A path is one from the root, or from the package's folder; a bare name is some file's."""
    names = {file.name for folder in FOLDERS for file in (ROOT / folder).rglob("*.*")}
    missing = [
        name
        for name in PATH.findall(prose(path))
        if name not in THEIRS
        and not (ROOT / name).exists()
        and not (ROOT / "autoparallel" / name).exists()
        and not (path.parent / name).exists()
        and name not in names
    ]
    assert not missing


def test_every_page_is_linked_to() -> None:
    """From the first page one gets to all others, and to every picture."""
    reached, waiting = {README}, [README]
    while waiting:
        page = waiting.pop()
        for target in re.findall(r"\]\(([^)#\s]+)", prose(page)):
            file = (page.parent / target).resolve()
            if file.suffix in (".md", ".svg") and file not in reached:
                reached.add(file)
                waiting += [file] if file.suffix == ".md" else []
    assert {*DOCUMENTS, *(ROOT / "docs").glob("*.svg")} <= reached


def test_python_is_python() -> None:
    """Every example can be read by Python."""
    for path in DOCUMENTS:
        for language, text in blocks(path):
            if language == "python":
                ast.parse(text)


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What README's first example prints, run as it is written, and the folder it ran in."""
    folder = tmp_path_factory.mktemp("readme")
    code = next(text for language, text in blocks(README) if language == "python")
    (folder / "see_a_plan.py").write_text(code)
    result = run_script(folder / "see_a_plan.py", folder=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout, folder


def test_the_first_example_runs(printed: tuple[str, Path]) -> None:
    """It prints a plan, and draws it."""
    text, folder = printed
    assert "lower bound" in text
    assert "</svg>" in (folder / "plan.svg").read_text()


def test_the_excerpt_is_what_is_printed(printed: tuple[str, Path]) -> None:
    """Every line of README's excerpt begins a line of the output; the order is the output's."""
    excerpt = next(text for _, text in blocks(README) if "lower bound" in text)
    lines = [" ".join(line.split()) for line in printed[0].splitlines()]
    for shown in excerpt.splitlines():
        wanted = " ".join(shown.split())
        if wanted == "…":
            continue
        places = [place for place, line in enumerate(lines) if line.startswith(wanted)]
        assert places, wanted
        lines = lines[places[0] + 1 :]


def test_getting_started_runs(tmp_path: Path) -> None:
    """Its examples, and those that go on with them, are one program, run as they are written; what
    they write is there.
    """
    pages = [ROOT / "docs" / f"{name}.md" for name in ("getting_started", "reading_a_plan")]
    code = "\n".join(text for page in pages for language, text in blocks(page) if language)
    (tmp_path / "get_started.py").write_text(code)
    result = run_script(tmp_path / "get_started.py", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "proven optimal" in result.stdout
    files = {file.name for file in tmp_path.iterdir()}
    assert {"plan.html", "threads.svg", "step.trace.json"} <= files


GUIDES = ("custom_ops", "clusters", "training", "checkpoints", "troubleshooting")


@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_runs(guide: str, tmp_path: Path) -> None:
    """Its examples are one program, run as they are written."""
    code = [text for language, text in blocks(ROOT / f"docs/{guide}.md") if language == "python"]
    assert code
    (tmp_path / f"{guide}.py").write_text("\n".join(code))
    result = run_script(tmp_path / f"{guide}.py", folder=tmp_path, variables={"WORLD_SIZE": "1"})
    assert result.returncode == 0, result.stderr
    assert "RuleError" not in result.stderr
    assert guide != "troubleshooting" or "would cost" in result.stdout


def test_the_reference_has_every_public_name() -> None:
    """Each once, and no other."""
    import autoparallel

    text = (ROOT / "docs" / "api.md").read_text()
    named = re.findall(r"^\.\. auto(?:class|function):: autoparallel\.(\w+)$", text, re.MULTILINE)
    assert sorted(named) == sorted(autoparallel.__all__)


def test_the_custom_rule_is_the_examples() -> None:
    """README shows the rule that examples/custom_rule.py runs, letter by letter."""
    source = (ROOT / "examples" / "custom_rule.py").read_text()
    (shown,) = [text for _, text in blocks(README) if "register_rule" in text]
    assert shown.strip() in source
