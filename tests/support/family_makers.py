"""Makers of tiny models of a library's families, and a loss for those that have none of their own.

Rates of dropout are not named family by family: all that a configuration has are set to the rate
that is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from zoo_inputs import Inputs

__all__ = ["Family", "Make", "Scored", "diffusion", "hugging_face", "image_model", "is_installed"]
__all__ += ["scored", "tensors_in", "with_rate"]

Make = Callable[[float], nn.Module]


@dataclass(frozen=True, slots=True)
class Family:
    """A Family makes a model of two layers or of four by make(dropout), and inputs() for it.

    library: the name of the package that it comes from. kind: the sort of model, for the reader.
    scored: the model returns no loss of its own, so that one is computed from its outputs. random:
    it draws numbers without dropout too, so that it is compared with our own model on one rank.
    """

    name: str
    library: str
    kind: str
    make: Make
    inputs: Callable[[], Inputs]
    scored: bool = False
    random: bool = False


def is_installed(library: str) -> bool:
    """Return whether the library can be imported, and what it needs itself."""
    if importlib.util.find_spec(library) is None:
        return False
    try:
        importlib.import_module(library)
    except (ImportError, RuntimeError):  # a library may ask for one that is not installed
        return False
    return True


class Scored(nn.Module):
    """A Scored model returns a fixed scalar of all outputs of the model inside, and the outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """inputs: the keyword arguments of the model inside."""
        outputs = tuple(tensors_in(self.model(**inputs)))
        return {"loss": sum(map(_score, outputs)), "outputs": outputs}


def _score(tensor: torch.Tensor) -> torch.Tensor | float:
    """Return a mean in which no two elements weigh the same; numbers without gradients count 0."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point():
        return 0.0
    places = torch.arange(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    weights = torch.cos(places).view(tensor.shape)
    # Masked scores are as low as numbers go, and would hide all else.
    return (tensor.clamp(-1e4, 1e4) * weights).mean()


def tensors_in(output: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of what a model returns, in order."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors_in(value)


def hugging_face(model: str, config: str, **options: Any) -> Make:
    """Return the maker of a model of transformers.

    options: of the configuration. One that is a callable is called, as those that hold another
    configuration are.
    """

    def make(dropout: float) -> nn.Module:
        import transformers

        transformers.logging.set_verbosity_error()
        chosen = {key: value() if callable(value) else value for key, value in options.items()}
        configuration = getattr(transformers, config)(**chosen)
        _set_rates(configuration, dropout)
        made: nn.Module = getattr(transformers, model)(configuration)
        return made

    return make


def scored(
    name: str, kind: str, model: str, config: str, inputs: Callable[[], Inputs], **options: Any
) -> Family:
    """Return the family of a model of transformers that has no loss of its own."""
    made = hugging_face(model, config, **options)
    return Family(name, "transformers", kind, made, inputs, scored=True)


def _set_rates(configuration: Any, dropout: float) -> None:
    """Set all rates of dropout in a configuration, and in those that it holds.

    Layers that are left out by chance stay: Python draws those numbers.
    """
    import transformers

    for key, value in list(vars(configuration).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            _set_rates(value, dropout)
        elif "drop" in key and isinstance(value, (int, float)) and not isinstance(value, bool):
            rate = 0.0 if "layerdrop" in key or "path" in key else dropout
            if value != rate:
                setattr(configuration, key, rate)


def image_model(kind: str, module: str, **options: Any) -> Make:
    """Return the maker of a model of timm, by the name of its class and of its module there."""

    def make(dropout: float) -> nn.Module:
        loaded = importlib.import_module(f"timm.models.{module}")
        made: nn.Module = getattr(loaded, kind)(**options)
        return with_rate(made, dropout)

    return make


def diffusion(kind: str, **options: Any) -> Make:
    """Return the maker of a model of diffusers."""

    def make(dropout: float) -> nn.Module:
        logging.getLogger("diffusers").setLevel(logging.ERROR)
        made: nn.Module = getattr(importlib.import_module("diffusers"), kind)(**options)
        return with_rate(made, dropout)

    return make


def with_rate(model: nn.Module, dropout: float) -> nn.Module:
    """Set all rates of dropout in a model that is made."""
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = dropout
        # Diffusion models leave out what they are told, such as a class, at such a rate.
        if isinstance(getattr(part, "dropout_prob", None), float):
            part.dropout_prob = dropout
    return model
