"""The split of one module, in words that other programs have: column, row, rows of a table."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["ModuleSplit", "ModuleSplits", "folded_pattern"]


@dataclass(frozen=True, slots=True)
class ModuleSplit:
    """A ModuleSplit says how one module is split.

    path: of the module. kind: "column" (its result is split along the last dim), "row" (its input
    is, and its result is summed), "table" (rows of an embedding) or "features" (its columns).
    weight_dim, bias_dim: the dims that are split; None for a bias that is whole, or is not there.
    gathered: a column's result is gathered, a row's input is cut in the module: on either side is a
    whole tensor.
    """

    path: str
    kind: str
    weight_dim: int
    bias_dim: int | None = None
    gathered: bool = False

    @property
    def is_transposed(self) -> bool:
        """True if the weight is (in, out), unlike that of nn.Linear."""
        return self.weight_dim == {"column": 1, "row": 0}.get(self.kind)


@dataclass(frozen=True)
class ModuleSplits:
    """ModuleSplits are all modules that are split on one mesh axis, and what cannot be said so.

    axis, world_size: of the mesh axis. modules: in the order of the model. missing: sentences.
    """

    axis: str
    world_size: int
    modules: tuple[ModuleSplit, ...]
    missing: tuple[str, ...]


def folded_pattern(path: str) -> str:
    """Return a path, or a sentence with paths, with * for the indices of repeated blocks.

    >>> folded_pattern("model.layers.3.mlp.down_proj")
    'model.layers.*.mlp.down_proj'
    """
    return re.sub(r"(?<=\w\.)\d+(?=\.\w|$)", "*", path)
