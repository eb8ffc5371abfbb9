"""Views of split tensors whose memory is not that of the parts.

A view that spans the parts of several ranks is a copy. It remembers how it was taken, so that what
is written to it reaches the tensor that it is of, and so that it follows what is written there.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from autoparallel.support.torch_private import local_part, storage_key

__all__ = ["View", "forget_values", "is_stale", "keep_view", "note_view", "placed", "view_of"]
__all__ += ["without_history"]

_NAME, _STALE = "_view", "_stale"
# All views that somebody holds, by their ids.
_views: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class View:
    """A function of torch that was called with `source` first has made a view.

    place: the view's among the function's results, None where it is the only one.
    """

    source: DTensor
    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    place: int | None

    def apply(self, value: torch.Tensor) -> torch.Tensor:
        """Return the same view of another tensor."""
        result = self.function(value, *self.args, **self.kwargs)
        view: torch.Tensor = result if self.place is None else result[self.place]
        return view

    @property
    def base(self) -> DTensor:
        """The tensor at the end: the one that is no such view itself."""
        base = self.source
        while (inner := view_of(base)) is not None:
            base = inner.source
        return base

    def of_whole(self, whole: torch.Tensor) -> torch.Tensor:
        """Return the view of the base's whole value."""
        inner = view_of(self.source)
        return self.apply(whole if inner is None else inner.of_whole(whole))


def view_of(tensor: Any) -> View | None:
    """Return how a tensor was taken as a view, None for one that is none or shares the memory.

    Example: `view_of(torch.ones(2))` is None.
    """
    view: View | None = vars(tensor).get(_NAME)
    return view


def note_view(
    tensor: Any, source: DTensor, function: Any, args: tuple[Any, ...], kwargs: Any, place: Any
) -> None:
    """Remember how a tensor was taken as a view; see `View`. One that is a copy for torch, too,
    such as rows by a list of indices, is none.

    Example: `note_view(row, weight, torch.select, (0, 3), {}, None)`.
    """
    view = View(source, function, tuple(args), kwargs, place)
    base = view.base
    indexed = function.__name__ == "__getitem__" and _has_tensors(args)
    with torch.inference_mode(False), torch.no_grad():
        if (
            not indexed
            and view.of_whole(
                torch.empty_strided(base.shape, base.stride(), dtype=base.dtype, device="meta")
            )._is_view()
        ):
            keep_view(tensor, view)


def _has_tensors(value: Any) -> bool:
    """Return whether there is a tensor in an index."""
    if isinstance(value, (list, tuple)):
        return any(map(_has_tensors, value))
    return isinstance(value, torch.Tensor)


def keep_view(tensor: Any, view: View | None) -> None:
    """Give a tensor, which is up to date, a view's history; None does nothing."""
    if view is not None:
        vars(tensor)[_NAME] = view
        vars(tensor)[_STALE] = False
        _views[id(tensor)] = tensor


def is_stale(tensor: Any) -> bool:
    """Return whether the tensor that a view is of may have been written to since.

    Example: `is_stale(torch.ones(2))` is False.
    """
    stale: bool = vars(tensor).get(_STALE, False)
    return stale


def forget_values(written: DTensor | None = None) -> None:
    """Note that a split tensor was written to: views of it are no longer up to date.

    written: None where it may be any. Example: `forget_values()`, when an optimizer has stepped.
    """
    if not _views:
        return
    memory = None if written is None else storage_key(local_part(written))
    for tensor in list(_views.values()):
        view = view_of(tensor)
        if view is not None and memory in (None, storage_key(local_part(view.base))):
            vars(tensor)[_STALE] = True


def without_history(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return a tensor's attributes but for those that only hold for the object itself.

    >>> without_history({"_view": None, "scale": 2.0})
    {'scale': 2.0}
    """
    return {name: value for name, value in attributes.items() if name not in (_NAME, _STALE)}


def placed(result: Any) -> Iterator[tuple[int | None, Any]]:
    """Yield the results of a function that takes views, each with its place among them."""
    if isinstance(result, (list, tuple)):
        yield from enumerate(result)
    else:
        yield None, result
