"""Tests of what a release of torch cannot do are left out on it, with the reason."""

from __future__ import annotations

import pytest

from autoparallel.support.torch_versions import ATTENTION_NEEDS_HEADS, RELEASE

__all__ = [
    "applied_by_keyword",
    "attention_in_float64_without_data",
    "attention_without_heads",
    "float_indices_are_refused",
    "lstm_states",
    "places_of_no_dims",
    "tried_under_autocast",
    "whole_tensors_differentiated_twice",
]

attention_without_heads = pytest.mark.skipif(
    ATTENTION_NEEDS_HEADS, reason="fused attention of this torch cannot run without heads"
)
attention_in_float64_without_data = pytest.mark.skipif(
    RELEASE < (2, 13), reason="without data, this torch takes statistics of float64 for float32"
)
places_of_no_dims = pytest.mark.skipif(
    RELEASE < (2, 13),
    reason="a trace by this torch has no place in x[tensor of no dims]",
)
lstm_states = pytest.mark.skipif(
    RELEASE < (2, 13), reason="this torch gives the last state of an LSTM a dim too many"
)
float_indices_are_refused = pytest.mark.skipif(
    RELEASE < (2, 13), reason="embedding of this torch takes indices of floats for a trace"
)
applied_by_keyword = pytest.mark.skipif(
    RELEASE < (2, 13), reason="Function.apply of this torch takes no keywords"
)
tried_under_autocast = pytest.mark.skipif(
    RELEASE < (2, 13), reason="this torch cannot try products of symbolic sizes under autocast"
)
whole_tensors_differentiated_twice = pytest.mark.skipif(
    RELEASE < (2, 13),
    reason="second derivatives of a DTensor's full_tensor() are wrong in this torch",
)
