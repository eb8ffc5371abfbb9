"""Ops are traced as the simpler ops by which they are defined."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

# Importing the first two fills the registry.
from autoparallel.capture import decompositions, random_decompositions  # noqa: F401
from autoparallel.capture.decomposition_registry import DECOMPOSITIONS, Decomposition, Known
from autoparallel.support.torch_private import (
    OpOverload,
    decompose,
    get_proxy_mode,
    is_composite,
    schema_of,
)

__all__ = ["decomposing"]


class _Table(Mapping[Any, Decomposition]):
    """What to trace in place of an op; only asked whether it has one, and for it."""

    def __init__(self, known: Known) -> None:
        self.known = known

    def __contains__(self, op: object) -> bool:
        return self.find(op) is not None

    def __getitem__(self, op: Any) -> Decomposition:
        found = self.find(op)
        assert found is not None
        return found

    def __len__(self) -> int:
        return len(DECOMPOSITIONS)

    def __iter__(self) -> Iterator[Any]:
        return iter(DECOMPOSITIONS)

    def find(self, op: Any) -> Decomposition | None:
        if not isinstance(op, OpOverload):
            return None
        drawn = torch.Tag.nondeterministic_seeded in op.tags
        if not drawn and any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
            return None  # autocast casts the operands of the op as a whole
        own = DECOMPOSITIONS.get(str(op))
        if own is not None:
            return own
        composite = op.namespace == "aten" and is_composite(op) and schema_of(op).returns
        if not composite or self.known(str(op)) or str(op) in _AS_THEY_ARE:
            return None
        packet, _, overload = str(op).rpartition(".")
        if packet.endswith("_") and self.known(f"{packet[:-1]}.{overload}"):
            return None
        return op.decompose


# What importing makes of these does not follow from their definitions.
_AS_THEY_ARE = {"aten.item.default", "aten.is_nonzero.default"}


@contextlib.contextmanager
def decomposing(known: Known) -> Iterator[None]:
    """While tracing: ops are traced as what they stand for. known: ops that have a rule."""
    if get_proxy_mode() is None:
        yield
        return
    with decompose(_Table(known)):
        yield
