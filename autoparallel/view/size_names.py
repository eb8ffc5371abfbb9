"""Names that a reader knows for symbolic sizes: "batch", "sequence", "pixel_values.1"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from autoparallel.plan import Plan, PlannedInput

__all__ = ["assumed_text", "returned_text", "shape_text", "size_names"]

# A symbolic size as torch.export names it: "s95".
_SYMBOL = re.compile(r"[a-z]\d+")


def size_names(inputs: Sequence[PlannedInput]) -> dict[str, str]:
    """Return a name for each symbolic size, in the order in which the inputs show them.

    The first dim of the first input is the batch. The second dim of an input of whole numbers and
    two dims is the sequence. All others are called by the input and the number of the dim.

    >>> tokens = PlannedInput("t", "input_ids", ("s0", "s1"), (2, 8), (2, 8), is_integer=True)
    >>> size_names([tokens])
    {'s0': 'batch', 's1': 'sequence'}
    """
    names: dict[str, str] = {}
    for at, item in enumerate(inputs):
        for place, dim in enumerate(item.dims):
            if dim in names or not _SYMBOL.fullmatch(dim):
                continue
            name = f"{item.path}.{place}" if item.path else f"input.{place}"
            if at == place == 0:
                name = "batch"
            elif place == 1 and item.is_integer and len(item.dims) == 2:
                name = name if "sequence" in names.values() else "sequence"
            names[dim] = name
    return names


def shape_text(shape: str, names: Mapping[str, str]) -> str:
    """Write a conversion's shape with names in place of symbols.

    >>> shape_text("2*s1*s0, 64", {"s0": "batch", "s1": "sequence"})
    '2*sequence*batch, 64'
    """
    return _SYMBOL.sub(lambda match: names.get(match[0], match[0]), shape)


def assumed_text(inputs: Sequence[PlannedInput]) -> str:
    """Tell the sizes that a plan is made for, and which of them the example inputs do not have.

    Sizes that are equal in the same place of two inputs (tokens and labels) are told once.

    >>> tokens = PlannedInput("t", "input_ids", ("s0", "s1"), (2, 8), (64, 8), is_integer=True)
    >>> assumed_text([tokens])
    'batch 64, sequence 8; the example inputs have batch 2, for which memory is counted'
    """
    names = size_names(inputs)
    told: dict[tuple[int, int], str] = {}
    planned: dict[str, int] = {}
    differing: dict[str, int] = {}
    for item in inputs:
        for place, dim in enumerate(item.dims):
            example, assumed = item.given[place], item.planned[place]
            if dim not in names or told.setdefault((place, example), names[dim]) != names[dim]:
                continue
            planned[names[dim]] = assumed
            if example != assumed:
                differing[names[dim]] = example
    if not planned:
        return "the example inputs, whose sizes are fixed"
    if not differing:
        return f"{_sizes(planned)}, as in the example inputs"
    examples = _sizes(differing)
    return f"{_sizes(planned)}; the example inputs have {examples}, for which memory is counted"


def _sizes(sizes: Mapping[str, int]) -> str:
    """List sizes with their names."""
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def returned_text(plan: Plan, layouts: Iterable[str]) -> str:
    """Tell what a call returns, equal things together: "loss: whole; logits: split as S(2)".

    layouts: the layout of each returned tensor, in words, in the order of plan.outputs.
    """
    counts: dict[tuple[str, str], int] = {}
    texts = list(layouts)
    paths = plan.returned or ("",) * len(texts)
    for path, text in zip(paths, texts, strict=True):
        # The tensors of a cache, "past_key_values.0.1", are told by the name of the whole.
        name = path.partition(".")[0]
        key = ("" if name.isdigit() else name, text)
        counts[key] = counts.get(key, 0) + 1
    rows = []
    for (name, text), count in counts.items():
        what = f"{count} tensors {text}" if count > 1 else text
        rows.append(f"{name}: {what}" if name else what)
    return "; ".join(rows) or "nothing"
