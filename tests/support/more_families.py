"""All families beyond the zoo, by name: tiny models with random weights, and inputs for them."""

from __future__ import annotations

import decoder_families
import diffusion_families
import encoder_families
import image_families
import library_families
import listed_families
import scene_families
import sense_families
import series_families
import timm_families
import torch
from family_makers import Family, Scored, is_installed, tensors_in
from torch import nn
from zoo_inputs import Inputs

from autoparallel.support.torch_private import without_function_modes

__all__ = ["FAMILIES", "Family", "build", "build_reference", "inputs_for", "is_installed"]
__all__ += ["tensors_in"]

_ALL = (
    *decoder_families.FAMILIES,
    *encoder_families.FAMILIES,
    *image_families.FAMILIES,
    *scene_families.FAMILIES,
    *sense_families.FAMILIES,
    *series_families.FAMILIES,
    *timm_families.FAMILIES,
    *diffusion_families.FAMILIES,
    *listed_families.FAMILIES,
    *library_families.FAMILIES,
)
FAMILIES = {family.name: family for family in _ALL}


def build(name: str, dropout: float = 0.0) -> nn.Module:
    """Return the model in float64 and train mode, with the same weights at every call.

    No weight stays at the zero, one or 1e-6 that it begins with: that would hide what lies behind.
    """
    torch.manual_seed(7)
    with without_function_modes():  # one that widens types would meet weights of the usual one
        model = FAMILIES[name].make(dropout)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return (Scored(model) if FAMILIES[name].scored else model).double().train()


def build_reference(name: str) -> nn.Module:
    """Return the same model for plain torch, with experts one by one, in products of any type.

    Torch's grouped matrix products, which are Hugging Face's choice, take no float64.
    """
    model = build(name)
    for part in model.modules():
        config = getattr(part, "config", None)
        if getattr(config, "_experts_implementation", None) == "grouped_mm":
            config._experts_implementation = "eager"
    return model


def inputs_for(name: str) -> Inputs:
    """Return the same inputs at every call."""
    inputs = FAMILIES[name].inputs()
    return {"inputs": inputs} if FAMILIES[name].scored else inputs
