"""The line that is told of an op is one of the model's own code, whatever library runs the op."""

from __future__ import annotations

import sys
from importlib import import_module, invalidate_caches
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import autoparallel
from autoparallel.capture.graph_breaks import trace
from autoparallel.errors import CaptureError
from autoparallel.plan import Plan
from autoparallel.rules.lookup import find_rule

# A library as pip installs one: a layer and a function, and a model that uses both.
LIBRARY = {
    "__init__": "",
    "layers": """
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

class Scaled(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 2)  # the layer

def doubled(x):
    return x + x  # the function
""",
    "modelling": """
from torch import nn
from some_library.layers import Scaled, doubled

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.scaled = Scaled(8, 8)

    def forward(self, x):
        x = self.scaled(x)  # the modelling file calls the layer
        return doubled(x).relu()  # the modelling file calls the function
""",
}


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library, installed."""
    folder = tmp_path / "lib" / "site-packages" / "some_library"
    folder.mkdir(parents=True)
    for name, text in LIBRARY.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder.parent)
    invalidate_caches()
    yield import_module("some_library.modelling")
    for name in [name for name in sys.modules if name.startswith("some_library")]:
        del sys.modules[name]


class Uses(nn.Module):
    """A Uses model calls layers and functions of libraries, and functions of its own."""

    def __init__(self, library: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.list = nn.Sequential(nn.LayerNorm(8), nn.GELU())
        self.scaled = library.Scaled(8, 8)
        self.doubled = library.doubled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)  # torch's layer
        x = self.list(x)  # torch's list of layers
        x = self.scaled(x)  # the library's layer
        x = self.doubled(x)  # the library's function
        x = F.softmax(x, -1)  # torch's function
        return self.finish(x)

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        return own_function(x)


def own_function(x: torch.Tensor) -> torch.Tensor:
    return x.sin()  # the model's own function


def line_of(file: str, comment: str) -> str:
    """The name of a file and the number of its line with a comment."""
    rows = Path(file).read_text().splitlines()
    (number,) = [at for at, row in enumerate(rows, 1) if row.endswith(f"  # {comment}")]
    return f"{Path(file).name}:{number}"


def lines_of(plan: Plan) -> dict[str, set[str]]:
    """The lines of the ops of each name."""
    told: dict[str, set[str]] = {}
    for op in plan.ops:
        told.setdefault(op.target.split(".")[1], set()).add(op.line)
    return told


INPUTS = torch.ones(4, 8)


def test_the_line_is_where_the_model_uses_a_library(library: Any) -> None:
    """Of torch's layers, of lists of them and of functions, and of another library's; of the
    model's own functions it is the line inside of them.
    """
    told = lines_of(autoparallel.make_plan(Uses(library), 2, example_inputs=INPUTS))
    expected = {
        "linear": {"torch's layer", "the library's layer"},
        "layer_norm": {"torch's list of layers"},
        "gelu": {"torch's list of layers"},
        "softmax": {"torch's function"},
        "sin": {"the model's own function"},
    }
    for name, comments in expected.items():
        wanted = {line_of(__file__, comment) for comment in comments}
        assert wanted <= told[name], name
    others = {line_of(__file__, one) for one in ("the library's layer", "the library's function")}
    assert set().union(*told.values()) == others | {
        line_of(__file__, comment) for comments in expected.values() for comment in comments
    }


def test_the_line_is_in_the_file_that_a_librarys_model_is_written_in(library: Any) -> None:
    """Also where the user's model has it inside."""
    for model in (library.Model(), nn.Sequential(library.Model(), nn.Linear(8, 8))):
        told = lines_of(autoparallel.make_plan(model, 2, example_inputs=INPUTS))
        calls = [line_of(library.__file__, f"the modelling file calls the {what}")
                 for what in ("layer", "function")]  # fmt: skip
        assert calls[0] in told["linear" if "linear" in told else "mm"]
        assert told["relu"] == {calls[1]}


def test_a_model_without_code_of_its_own_has_the_librarys_lines() -> None:
    """Which are told by their folders, too, so that nobody looks for them at home."""
    model = nn.Sequential(nn.Linear(8, 8))
    told = lines_of(autoparallel.make_plan(model, 2, example_inputs=INPUTS))
    (line,) = told["linear"]
    assert line.startswith("torch/nn/modules/linear.py:")


class Outer(nn.Module):
    """An Outer model stays as it is, and calls one that is split when it is first called."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x)
        return y


def test_the_caller_of_a_split_model_is_no_part_of_it() -> None:
    """No line of it is told where the split model has none of its own."""
    inner = autoparallel.autoparallelize(nn.Sequential(nn.Linear(8, 8)), 1)
    Outer(inner)(INPUTS)
    assert {op.line.partition(":")[0] for op in inner.plan.ops} == {"torch/nn/modules/linear.py"}


MODEL = """
from torch import nn

class Edited(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.first(x)  # the first
        {between}  # between
        return self.second(y)  # the second
"""


@pytest.mark.parametrize("between", ["pass", "y = y.new_tensor(y.detach().numpy()) + y"])
def test_a_comment_makes_no_other_program(
    between: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that was kept is followed, and has the lines of the code as it is now; so it is of a
    model in parts, with what stays Python.
    """
    monkeypatch.syspath_prepend(tmp_path)
    plans = []
    for name, above in (("before_edit", ""), ("after_edit", "# A comment.\n\n")):
        (tmp_path / f"{name}.py").write_text(above + MODEL.format(between=between))
        invalidate_caches()
        model = import_module(name).Edited()
        del sys.modules[name]
        if not plans:
            plans.append(autoparallel.make_plan(model, 2, example_inputs=INPUTS))
        kept = Plan.from_json(plans[0].to_json())
        plans.append(autoparallel.traced_plan(model, kept, example_inputs=INPUTS))
        told = {one.line.split()[0] for one in (*plans[-1].ops, *plans[-1].breaks)}
        file = str(tmp_path / f"{name}.py")
        assert told & {line_of(file, "the first"), line_of(file, "between")}
    before, after = plans[1:]
    assert before == plans[0]
    assert before != after
    simulated = autoparallel.simulate(model, plan=after, example_inputs=INPUTS)
    torch.testing.assert_close(simulated.output, model(INPUTS))


class Handing(TorchFunctionMode):
    """A mode of the user's own."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*args, **(kwargs or {}))  # the mode


class Asking(nn.Module):
    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.layer, self.reads = nn.Linear(8, 8), reads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.layer(x))
        if self.reads:
            y = y[: int(y.sum())]  # it asks
        return torch.tanh(y)  # it computes


def test_a_mode_hands_on_what_the_model_asks_for() -> None:
    with Handing():
        plan = autoparallel.make_plan(Asking(False), 2, example_inputs=INPUTS)
        with pytest.raises(CaptureError) as error:
            trace(Asking(True), (INPUTS,), {}, known=find_rule)
    assert line_of(__file__, "it computes") in {op.line for op in plan.ops}
    assert line_of(__file__, "it asks") in error.value.where
