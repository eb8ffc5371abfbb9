"""Ops by the names that nodes of a graph have for them: "aten.mm.default"."""

from __future__ import annotations

from typing import Any

import torch

from autoparallel.support.torch_private import schema_of

__all__ = ["draws", "makes_list", "operator_of", "packet_of"]


def operator_of(target: str) -> Any:
    """The op of a node's target; None where there is none of that name."""
    found: Any = torch.ops
    for part in target.split("."):
        found = getattr(found, part, None)
        if found is None:
            return None
    return found


def packet_of(target: str) -> str:
    """The op's name without namespace and overload."""
    return target.split(".")[1] if "." in target else target


def makes_list(target: str) -> bool:
    """Whether an op returns a list, be it of one tensor."""
    schema: Any = schema_of(operator_of(target))
    returns: Any = schema.returns if schema is not None else ()
    return len(returns) == 1 and str(returns[0].type).startswith("List[")


def draws(target: str) -> bool:
    """Whether an op draws numbers of its own, which every rank would draw differently."""
    return torch.Tag.nondeterministic_seeded in getattr(operator_of(target), "tags", ())
