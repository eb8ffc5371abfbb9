"""Families of models for time series and for control."""

from __future__ import annotations

import torch
from family_inputs import numbers
from family_makers import Family, hugging_face, scored
from family_options import GPT
from zoo_inputs import BATCH, Inputs
from zoo_layers import HEADS, HIDDEN

__all__ = ["FAMILIES"]

SERIES = {"prediction_length": 6, "context_length": 12, "num_time_features": 2, "d_model": HIDDEN}
SERIES |= {"lags_sequence": [1, 2, 3]}


def series(channels: int = 3, length: int = 32, ahead: int = 8) -> Inputs:
    """Return the past and the future of series of several channels."""
    return {
        "past_values": numbers(BATCH, length, channels),
        "future_values": numbers(BATCH, ahead, channels, seed=4),
    }


def lagged() -> Inputs:
    """Return the past and future of single series, with features of their times."""
    return {
        "past_values": numbers(BATCH, 15),
        "past_time_features": numbers(BATCH, 15, 2),
        "past_observed_mask": torch.ones(BATCH, 15, dtype=torch.float64),
        "future_values": numbers(BATCH, 6, seed=4),
        "future_time_features": numbers(BATCH, 6, 2, seed=5),
    }


def trajectories() -> Inputs:
    """Return states, actions and rewards."""
    return {
        "states": numbers(BATCH, 6, 5),
        "actions": numbers(BATCH, 6, 4, seed=4),
        "rewards": numbers(BATCH, 6, 1, seed=5),
        "returns_to_go": numbers(BATCH, 6, 1, seed=6),
        "timesteps": torch.arange(6).repeat(BATCH, 1),
        "attention_mask": torch.ones(BATCH, 6, dtype=torch.long),
    }


FAMILIES = (
    Family(
        "time-series-transformer",
        "transformers",
        "time series",
        hugging_face("TimeSeriesTransformerForPrediction", "TimeSeriesTransformerConfig", **SERIES),
        lagged,
    ),
    Family(
        "informer",
        "transformers",
        "time series",
        hugging_face("InformerForPrediction", "InformerConfig", **SERIES),
        lagged,
    ),
    Family(
        "autoformer",
        "transformers",
        "time series",
        hugging_face(
            "AutoformerForPrediction",
            "AutoformerConfig",
            **SERIES,
            label_length=4,
            moving_average=5,
        ),
        lagged,
    ),
    Family(
        "patchtst",
        "transformers",
        "time series",
        hugging_face(
            "PatchTSTForPrediction",
            "PatchTSTConfig",
            num_input_channels=3,
            context_length=32,
            patch_length=4,
            patch_stride=4,
            num_hidden_layers=2,
            d_model=HIDDEN,
            num_attention_heads=HEADS,
            ffn_dim=128,
            prediction_length=8,
        ),
        series,
    ),
    Family(
        "patchtsmixer",
        "transformers",
        "time series, mixer",
        hugging_face(
            "PatchTSMixerForPrediction",
            "PatchTSMixerConfig",
            context_length=32,
            patch_length=8,
            patch_stride=8,
            num_input_channels=3,
            d_model=32,
            num_layers=2,
            prediction_length=8,
            mode="mix_channel",
        ),
        series,
    ),
    scored(
        "decision-transformer",
        "control",
        "DecisionTransformerModel",
        "DecisionTransformerConfig",
        trajectories,
        **{**GPT, "n_embd": 24},
        hidden_size=HIDDEN,
        state_dim=5,
        act_dim=4,
        max_ep_len=8,
    ),
)
