"""A plan as transformers' own tensor parallelism takes it: a DistributedConfig with its tp_plan."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from autoparallel.errors import PlanError
from autoparallel.exports.export_text import Export
from autoparallel.exports.module_split import ModuleSplit, folded_pattern
from autoparallel.exports.module_splits import module_splits
from autoparallel.exports.parallelize_module import patterns
from autoparallel.plan import Plan

__all__ = ["transformers_plan"]

# (kind, gathered) to transformers' names of styles, of which the installed version must know those
# that are used.
_STYLES = {
    ("column", False): "colwise",
    ("column", True): "colwise_gather_output",
    ("row", False): "rowwise",
    ("row", True): "rowwise_split_input",
    ("table", False): "embedding_rowwise",
    ("features", False): "embedding_colwise",
}
_WHOLE = "replicate"


def transformers_plan(
    plan: Plan, model: nn.Module, *, axis: str | None = None, example_inputs: Any = None
) -> Export:
    """Return the entries of transformers' DistributedConfig that split a model as a plan says.

    plan, model, axis, example_inputs: as of parallelize_module_source. The text is JSON with
    tp_size and tp_plan, for the installed version of transformers:

        DistributedConfig(**json.loads(text))

    What the model's authors split and the plan does not is said to be whole, because transformers
    adds its own entries to those that it is given. Raises PlanError for a plan in parts, and where
    transformers is missing or too old.

    Example: `json.loads(transformers_plan(plan, model).text)["tp_plan"]`
    """
    known = _known_styles()
    splits = module_splits(plan, model, axis=axis, example_inputs=example_inputs)
    missing = list(splits.missing)
    entries: dict[str, str] = {}
    for pattern, split in patterns(splits, model).items():
        why = _why_not(split, model, known)
        if why:
            missing.append(f"{pattern}: {why}, and it stays whole")
        else:
            entries[pattern] = _style(split)
    for pattern in _their_own(model):
        modules = [n for n, _ in model.named_modules() if fnmatchcase(folded_pattern(n), pattern)]
        if modules and not any(fnmatchcase(m, p) for m in modules for p in entries):
            entries[pattern] = _WHOLE
    text = json.dumps({"tp_size": splits.world_size, "tp_plan": entries}, indent=2) + "\n"
    return Export("transformers", text, ".json", tuple(missing))


def _style(split: ModuleSplit) -> str:
    """Return transformers' name of a split."""
    gathered = split.gathered and split.kind in ("column", "row")
    return _STYLES[split.kind, gathered]


def _why_not(split: ModuleSplit, model: nn.Module, known: frozenset[str]) -> str:
    """Return why transformers cannot split a module so, "" where it can."""
    module = model.get_submodule(split.path)
    if split.is_transposed or not isinstance(module, nn.Linear | nn.Embedding):
        return f"a {type(module).__name__} has its weight the other way around than transformers"
    if _style(split) not in known:
        return f"this version of transformers has no {_style(split)!r}"
    return ""


def _their_own(model: nn.Module) -> tuple[str, ...]:
    """Return the patterns of modules that the model's authors split."""
    own = getattr(model, "_tp_plan", None) or {}
    return tuple(own)


def _known_styles() -> frozenset[str]:
    """Return the names of styles of the installed transformers. Raises PlanError without it."""
    try:
        from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES
    except ImportError:
        raise PlanError(
            "transformers is missing, or too old to split models by DTensors",
            fix='pip install "transformers>=5.20"',
        ) from None
    return frozenset(ALL_PARALLEL_STYLES.keys())
