"""What a plan may and may not do. Everything here changes the plan; nothing else does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autoparallel.errors import PlanError

__all__ = ["Options"]

_KNOWN = {
    "unknown_ops": ("discover", "replicate", "error"),
    "rng": ("counter", "fast"),
    "recompute": ("auto", "none", "selective", "full"),
    "optimizer": ("sgd", "momentum", "adam", "mixed_adam"),
}


@dataclass(frozen=True, slots=True)
class Options:
    """Choices of the user.

    sequence_parallel: activations between the split products may be split along dims whose size
    comes from the inputs (the sequence, the batch), with reduce-scatter and all-gather in place of
    all-reduce. data_parallel: products may be split along such dims too; without it a weight
    matrix is used just as it is stored. hardware: preset name. unknown_ops: what to do with a
    differentiable op that has no rule: "discover" one by running the op on small tensors (an error
    where that fails), "replicate" (keep its tensors whole) or "error". tokens: plan as for inputs
    of at least this many elements, however small the example inputs are. rng: "counter" draws the
    same random numbers under every plan; "fast" draws from torch's generators, one stream per
    shard.
    strict_capture: refuse a model that cannot be traced whole, in place of splitting what can be.
    optimizer: whose state is counted and updated: "sgd", "momentum", "adam", or "mixed_adam"
    (parameters of 16 bits with a master copy and moments in float32). memory_limit: bytes that a
    rank may use. recompute: what repeated blocks run again in the backward pass to keep less:
    "none", "selective", "full", or "auto" for each block's best. constraints: see constraints.py.
    """

    sequence_parallel: bool = True
    data_parallel: bool = False
    hardware: str = "auto"
    unknown_ops: str = "discover"
    tokens: int = 8192
    rng: str = "counter"
    strict_capture: bool = False
    optimizer: str = "adam"
    memory_limit: int | None = None
    recompute: str = "none"
    constraints: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "constraints", _texts(self.constraints))
        for name in ("sequence_parallel", "data_parallel", "strict_capture"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise PlanError(f"{name}={value!r}", fix="choose True or False")
        for name, known in _KNOWN.items():
            value = getattr(self, name)
            if value not in known:
                raise PlanError(f"{name}={value!r}", fix=f"choose one of {', '.join(known)}")


def _texts(constraints: Any) -> tuple[str, ...]:
    if isinstance(constraints, str):
        raise PlanError(f"constraints={constraints!r}", fix=f"give a list: [{constraints!r}]")
    made = tuple(constraints or ())
    for text in made:
        if not isinstance(text, str):
            raise PlanError(
                f"constraint {text!r} is no text", fix='write "blocks.*.weight is whole"'
            )
    return made
