"""From the name of a model on the command line to the model, and inputs to plan it for.

A name is one of bundled_models.py, "hf:FOLDER_OR_CONFIG.json" for the sizes in a Hugging Face
configuration, or "my_module:build" for a function of the user's.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from autoparallel.commands.bundled_models import BUNDLED, BundledModel
from autoparallel.commands.empty_parameters import buffers_alone
from autoparallel.errors import AutoParallelError, PlanError
from autoparallel.support.json_text import read_other_json

if TYPE_CHECKING:
    from torch import nn

__all__ = ["FORMS", "NamedModel", "named_model"]

FORMS = (
    f"a bundled model ({', '.join(BUNDLED)}), hf:FOLDER or hf:CONFIG.json for a Hugging Face "
    "configuration, or my_module:build for a function that returns a model, or (model, "
    "example_inputs)"
)
_BATCH = 8


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request for a named model: the sizes that are asked of it, see `named_model`."""

    name: str
    batch: int | None
    sequence: int | None
    layers: int | None
    dtype: Any
    weights: str

    def places(self) -> AbstractContextManager[Any]:
        """Return the context in which the model is built, for the memory that it is to take."""
        import torch

        if self.weights == "buffers":
            return buffers_alone()
        return torch.device("cpu" if self.weights == "all" else "meta")


_Built = tuple["nn.Module", Any, int, int]


@dataclass(frozen=True)
class NamedModel:
    """A NamedModel is a model that was built from its name, and the inputs to plan it for.

    name: as it was given. model: on the meta device, but for a function's, which is as it returned
    it. inputs: a tuple of positional or a dict of keyword arguments; None for those that the model
    itself offers. batch, sequence: what the inputs were made for; 0 where the function decides.
    """

    name: str
    model: nn.Module
    inputs: Any
    batch: int
    sequence: int


def named_model(
    name: str,
    *,
    batch: int | None = None,
    sequence: int | None = None,
    layers: int | None = None,
    dtype: str | None = None,
    weights: Literal["none", "buffers", "all"] = "none",
) -> NamedModel:
    """Return the model of that name.

    batch, sequence: of the inputs; by default 8, and the model's longest. layers: fewer of them
    than the sizes say. dtype: of the parameters, such as "bfloat16"; by default that of a function
    as it is, and float32 for all others. weights: "all" for weights drawn at random, to compute
    with, "buffers" for values of buffers alone, "none" for the meta device. Raises PlanError for a
    name that is none, and for options that the model has no use for.

    >>> named_model("gpt2", layers=1, batch=2, sequence=16).inputs["input_ids"].shape
    torch.Size([2, 16])
    """
    import torch

    kind = getattr(torch, dtype, None) if dtype else None
    if dtype and not isinstance(kind, torch.dtype):
        raise PlanError(f"there is no dtype {dtype!r}", fix="give bfloat16, float16 or float32")
    asked = _Asked(name, batch, sequence, layers, kind, weights)
    if name in BUNDLED:
        bundled = BUNDLED[name]
        if bundled.kind in ("GPT", "Bert"):
            built = _plain(asked, bundled)
        else:
            built = _hugging_face(asked, bundled.kind, bundled.sizes, bundled.sequence)
    elif name.startswith("hf:"):
        built = _hugging_face(asked, *_configuration(name.removeprefix("hf:")))
    elif ":" in name:
        built = _of_function(asked)
    else:
        near = get_close_matches(name, BUNDLED, 3)
        raise PlanError(
            f"no model is called {name!r}",
            why=f"a model is {FORMS}",
            fix=f"did you mean {' or '.join(near)}?" if near else "give one of these",
        )
    return NamedModel(name, *built)


def _plain(asked: _Asked, bundled: BundledModel) -> _Built:
    """Build one of the project's plain models."""

    from autoparallel.train.models import GPT, Bert, BertConfig, GPTConfig

    sizes: dict[str, Any] = dict(bundled.sizes)
    sizes["layers"] = asked.layers or sizes["layers"]
    model: GPT | Bert
    with asked.places():
        model = GPT(GPTConfig(**sizes)) if bundled.kind == "GPT" else Bert(BertConfig(**sizes))
    _cast(model, asked.dtype)
    batch, sequence = asked.batch or _BATCH, asked.sequence or bundled.sequence
    if sequence > model.config.positions:
        raise PlanError(
            f"a sequence of {sequence} for {asked.name}",
            why=f"it has {model.config.positions} positions",
            fix=f"give at most {model.config.positions}",
        )
    return model, model.example_inputs(batch, sequence), batch, sequence


def _hugging_face(asked: _Asked, kind: str, sizes: Mapping[str, Any], longest: int = 0) -> _Built:
    """Build a model of transformers from its class's name and its configuration's entries.

    longest: the sequence to plan for; by default the configuration's positions, at most 4096.
    """

    transformers = _transformers(asked.name)
    cls: Any = getattr(transformers, kind, None)
    if getattr(cls, "config_class", None) is None:
        raise PlanError(
            f"{asked.name}: transformers {transformers.__version__} has no class {kind!r}",
            fix="name one of its classes under architectures in the config.json",
        )
    config = cls.config_class(**sizes)
    if asked.layers is not None:
        config.num_hidden_layers = asked.layers
    # What a step of training returns has no cache in it.
    config.use_cache = False
    with asked.places():
        model = cls(config)
        _cast(model, asked.dtype)
        positions = getattr(config, "max_position_embeddings", 0) or 1024
        batch, sequence = asked.batch or _BATCH, asked.sequence or longest or min(positions, 4096)
        inputs = _inputs(asked.name, model, config, batch, sequence)
    return model, inputs, batch, sequence


def _cast(model: nn.Module, dtype: Any) -> None:
    """Give parameters of floating point a dtype, if there is one. Buffers keep theirs: tables of
    frequencies and the like lose too much.
    """
    for parameter in model.parameters():
        if dtype is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _inputs(name: str, model: nn.Module, config: Any, batch: int, sequence: int) -> dict[str, Any]:
    """Return inputs of a model of transformers, with labels where it takes them for a loss."""
    import torch

    takes = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        dtype = next(model.parameters()).dtype
        images = torch.zeros(batch, getattr(config, "num_channels", 3), height, width, dtype=dtype)
        labels = torch.zeros(batch, dtype=torch.long)
        return {main: images, **({"labels": labels} if "labels" in takes else {})}
    if main != "input_ids":
        raise PlanError(
            f"{name} takes {main}, for which the command line makes no inputs",
            fix="write a function that returns (model, example_inputs): my_module:build",
        )
    tokens = torch.zeros(batch, sequence, dtype=torch.long)
    return {"input_ids": tokens, **({"labels": tokens.clone()} if "labels" in takes else {})}


def _transformers(name: str) -> Any:
    """Return the package transformers. Raises PlanError where it is not installed."""
    try:
        import transformers
    except ImportError:
        raise PlanError(
            f"{name} is a model of transformers, which is not installed",
            fix='pip install "torch-autoparallel[huggingface]"',
        ) from None
    transformers.logging.set_verbosity_error()
    return transformers


def _configuration(place: str) -> tuple[str, dict[str, Any]]:
    """Return the class and the entries of a config.json, or of the one in a folder.

    Nothing is fetched. Raises PlanError where there is no such file, and for one without a class.
    """
    path = Path(place).expanduser()
    path = path / "config.json" if path.is_dir() else path
    try:
        entries = read_other_json(path.read_text())
    except FileNotFoundError:
        raise PlanError(
            f"there is no file {path}",
            why="hf: is followed by a folder with a config.json, or by such a file; nothing is "
            "fetched",
            fix="download the configuration, and give its path",
        ) from None
    except (OSError, ValueError) as error:
        raise PlanError(f"{path} cannot be read: {error}", fix="give a config.json") from None
    architectures = entries.get("architectures") if isinstance(entries, dict) else None
    if not architectures:
        raise PlanError(
            f"{path} does not say which class of transformers the model is of",
            fix='add "architectures": ["LlamaForCausalLM"]',
        )
    return str(architectures[0]), {k: v for k, v in entries.items() if k != "architectures"}


def _of_function(asked: _Asked) -> _Built:
    """Return what the user's function returns. The current folder is looked in first."""
    from torch import nn

    name = asked.name
    if asked.layers is not None:
        raise PlanError(
            f"layers={asked.layers} for {name}",
            why="only the sizes of bundled models and of configurations are known",
            fix="let the function return a model with fewer layers",
        )
    # A console script has its own folder in the first place, where `python -m` has this one.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        build = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        if _theirs(error):
            raise _failed(name, error) from error
        raise PlanError(
            f"{name} is no function: {error}",
            why="the part before the colon is a module that Python finds, the one behind it a name "
            "in that module",
            fix="run the command in the folder of my_module.py, or set PYTHONPATH",
        ) from None
    except Exception as error:
        raise _failed(name, error) from error
    try:
        built = build() if callable(build) and not isinstance(build, nn.Module) else build
    except AutoParallelError:
        raise
    except Exception as error:
        raise _failed(name, error) from error
    model, inputs = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(model, nn.Module):
        raise PlanError(
            f"{name} gives no model, but an object of type {type(model).__name__}",
            fix="let it return a torch.nn.Module, or (module, example_inputs)",
        )
    wanted = {"batch": asked.batch, "sequence": asked.sequence}
    wanted = {key: value for key, value in wanted.items() if value}
    if wanted:
        offers = getattr(model, "example_inputs", None)
        takes = inspect.signature(offers).parameters if callable(offers) else {}
        if inputs is not None or not callable(offers) or not set(wanted) <= set(takes):
            raise PlanError(
                f"{' and '.join(wanted)} for {asked.name}",
                why="its function decides on the inputs",
                fix="give the model a method example_inputs(batch, sequence), or leave it out",
            )
        inputs = offers(**wanted)
    _cast(model, asked.dtype)
    return model, inputs, asked.batch or 0, asked.sequence or 0


def _failed(name: str, error: Exception) -> PlanError:
    """Return the error for a function of the user's that has raised one, or whose module has."""
    return PlanError(
        f"{name} failed: {type(error).__name__}: {error}",
        where=_theirs(error),
        why="the model is what this function returns when it is called without arguments",
        fix="call it in Python, and mend what it says",
    )


def _theirs(error: Exception) -> str:
    """Return the line of the user's code in which an error came up, or in whose call it did; "" for
    an error of the look-up itself.
    """
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    ours = str(Path(__file__).parent)
    lines = [
        f"{frame.filename}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((ours, "<frozen"))
        and frame.filename not in (pkgutil.__file__, importlib.__file__)
    ]
    return lines[-1] if lines else ""
