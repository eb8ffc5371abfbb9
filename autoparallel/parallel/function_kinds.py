"""The ways in which a function of torch is run with split tensors, told by its name and its op."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch

from autoparallel.support.replaced_functions import refuse_replaced

__all__ = ["FunctionKind", "kind_of"]


class FunctionKind(Enum):
    """The ways in which a function of torch may be run with split tensors."""

    # It asks for a fact, or belongs to the object itself: a hook, say.
    PASSED = "passed"
    # The same, and what it returns is split as well.
    MARKED = "marked"
    # It differentiates, and may be given gradients.
    DERIVES = "derives"
    # It gives the same values to what autograd does not record.
    DATA = "data"
    # It registers a function that is called with a gradient, or with the tensor itself.
    HOOKS = "hooks"
    # It makes a tensor of the same type, of any size, which every rank has whole.
    NEW = "new"
    # It computes: on the parts if DTensor can, else on whole values.
    COMPUTES = "computes"
    # It may return a view, which is written to later.
    VIEWS = "views"
    # It gives numbers to Python, draws them, or writes to a place that may be another rank's.
    WHOLE = "whole"
    # It assigns a gradient.
    GRADIENT = "gradient"
    # It assigns other memory.
    ASSIGNED = "assigned"
    # It asks for memory, which a split tensor has none of, or how often that was written to.
    MEMORY = "memory"


_PASSED = frozenset(
    "size dim ndimension numel nelement stride is_contiguous is_floating_point is_complex "
    "is_signed is_inference is_conj is_neg is_pinned is_shared is_same_size is_set_to is_tensor "
    "is_storage element_size get_device storage_offset dim_order has_names result_type can_cast "
    "requires_grad_ retain_grad "
    "share_memory_ __repr__ __len__ __hash__ __deepcopy__ __reduce_ex__ __reduce__ __setstate__ "
    "_is_view _has_compatible_shallow_copy_type _make_subclass _make_wrapper_subclass".split()
)
_READ = frozenset(
    "item tolist numpy __array__ __float__ __int__ __bool__ __index__ __complex__ __format__ "
    "is_nonzero equal allclose __contains__ __setitem__ index_put_ index_put masked_fill_ "
    "masked_scatter_ unique multinomial "
    # DTensor of torch 2.11 gathers places without dims wrongly.
    "argmax argmin".split()
)
_RANDOM = ("dropout", "rrelu", "gumbel", "bernoulli", "rand")
_DERIVES = (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)
# Attributes that are computed.
_COMPUTED_ATTRIBUTES = frozenset(("T", "mT", "H", "mH", "real", "imag"))
_HOOKS = frozenset(("register_hook", "register_post_accumulate_grad_hook"))
_MEMORY = frozenset(("data_ptr", "untyped_storage", "storage", "_typed_storage"))


@lru_cache(maxsize=4096)
def kind_of(function: Any) -> FunctionKind:
    """Return how a function is run. function: one that torch names in `__torch_function__`."""
    refuse_replaced(function)
    name = getattr(function, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        attribute = getattr(getattr(function, "__self__", None), "__name__", "")
        if name == "__get__":
            if attribute in _COMPUTED_ATTRIBUTES:
                return FunctionKind.VIEWS
            held = {"data": FunctionKind.DATA, "grad": FunctionKind.MARKED}
            held["_version"] = FunctionKind.MEMORY
            return held.get(attribute, FunctionKind.PASSED)
        assigned = {"grad": FunctionKind.GRADIENT, "data": FunctionKind.ASSIGNED}
        known = assigned if name == "__set__" else {}
        return known.get(attribute, FunctionKind.PASSED)
    if name.startswith("new_") and name != "new_tensor":
        return FunctionKind.NEW
    if name in _HOOKS:
        return FunctionKind.HOOKS
    if name in _PASSED:
        return FunctionKind.PASSED
    # torch.autograd.grad is asked for the gradients of the objects themselves.
    if function in _DERIVES:
        return FunctionKind.DERIVES
    if str(getattr(function, "__module__", "")).startswith("torch.autograd"):
        return FunctionKind.MARKED
    if name in _MEMORY:
        return FunctionKind.MEMORY
    if name == "detach":
        return FunctionKind.MARKED
    drawn = name.startswith(_RANDOM) or "dropout" in name or _draws(name)
    ours = isinstance(function, FunctionType) and function.__module__ == "torch.nn.init"
    if name in _READ or drawn or ours:
        return FunctionKind.WHOLE
    views = name in ("__getitem__", "reshape", "flatten") or _views(name)
    return FunctionKind.VIEWS if views else FunctionKind.COMPUTES


def _overloads(name: str) -> Iterator[Any]:
    """Return the overloads of the op of a name, if there is one."""
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    if packet is not None and hasattr(packet, "overloads"):
        for overload in packet.overloads():
            yield getattr(packet, overload)


def _draws(name: str) -> bool:
    """Return whether an op draws random numbers."""
    return any(torch.Tag.nondeterministic_seeded in one.tags for one in _overloads(name))


def _views(name: str) -> bool:
    """Return whether an op returns a view of its argument."""
    return any(one.is_view for one in _overloads(name))
