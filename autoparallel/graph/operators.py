"""Facts about ops by the names that a graph's nodes have for them: "aten.mm.default"."""

from __future__ import annotations

from typing import Any

import torch

from autoparallel.support.torch_private import schema_of

__all__ = ["BRANCH_TAKEN", "draws", "makes_list", "operator_of", "packet_of"]

# The op that ends a program where a branch on values goes another way than the program does.
BRANCH_TAKEN = "autoparallel.branch_taken.default"


def operator_of(target: str) -> Any:
    """Return the op of a node's target as torch has it; None where there is none of that name.

    >>> operator_of("aten.mm.default") is torch.ops.aten.mm.default
    True
    >>> operator_of("aten.no_such_op.default") is None
    True
    """
    operator: Any = torch.ops
    for part in target.split("."):
        operator = getattr(operator, part, None)
        if operator is None:
            return None
    return operator


def packet_of(target: str) -> str:
    """Return the op's name without namespace and overload.

    >>> packet_of("aten.mm.default")
    'mm'
    """
    return target.split(".")[1] if "." in target else target


def makes_list(target: str) -> bool:
    """Return whether an op returns a list of tensors, be it of one:
    its result must then be unpacked.

    >>> makes_list("aten.split.Tensor"), makes_list("aten.mm.default")
    (True, False)
    """
    schema: Any = schema_of(operator_of(target))
    returns: Any = schema.returns if schema is not None else ()
    return len(returns) == 1 and str(returns[0].type).startswith("List[")


def draws(target: str) -> bool:
    """Return whether an op draws random numbers of its own,
    which every rank would draw differently.

    Torch tags such ops as nondeterministic_seeded; ops of other libraries may lack the tag.

    >>> draws("aten.bernoulli.default"), draws("aten.mm.default")
    (True, False)
    """
    return torch.Tag.nondeterministic_seeded in getattr(operator_of(target), "tags", ())
