"""Names of libraries' functions in a forward's code, in whose place other functions may be put.

A trace has what the functions have computed, under whatever name they were called. Another one that
is put under the name later (a patched `torch.nn.functional.linear`, `math.sqrt` or `Tensor.tanh`)
is noticed by identity: the name no longer refers to the object that it referred to.
"""

from __future__ import annotations

import builtins
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from autoparallel.capture.asked_switches import SWITCHES
from autoparallel.capture.library_questions import ways_in
from autoparallel.graph.attribute_read import UNKNOWN, AttributeRead, Where
from autoparallel.graph.read_holders import Methods
from autoparallel.support.replaced_functions import HOMES

__all__ = ["library_names", "named", "torch_functions"]

_ANSWERED = frozenset(
    [("torch", "is_grad_enabled"), *(("torch", name) for name in SWITCHES)]
    + [(home, "seed") for home in ("random", "numpy.random")]
)


def named(module: str, name: str) -> AttributeRead:
    """Return the read of a name in a Python module, of which only the object counts.

    >>> str(named("math", "sqrt"))
    "['math'].sqrt"
    """
    return AttributeRead("", (("global", module),), name, Where.NAMED, UNKNOWN)


def library_names(code: types.CodeType, variables: Mapping[str, Any]) -> Iterator[AttributeRead]:
    """Yield the reads of all names by which code comes to things of libraries.

    variables: its global ones.

    >>> import math
    >>> [str(read) for read in library_names((lambda: math.sqrt(2)).__code__, {"math": math})]
    ["['math'].sqrt"]
    """
    module = str(variables.get("__name__"))
    known = sys.modules.get(module)
    for root, steps in ways_in(code):
        if root in variables:
            value: Any = variables[root]
        elif callable(getattr(builtins, root, None)):
            value = getattr(builtins, root)
            yield named("builtins", root)
            # A variable of the module's would stand before it.
            if known is not None and vars(known) is variables:
                yield named(module, root)
        else:
            value = sys.modules.get(root)
        for kind, name in steps:
            home = value.__name__ if isinstance(value, types.ModuleType) else ""
            # What is no function or class has a value, which others look at.
            if kind != "attribute" or not home or sys.modules.get(home) is not value:
                break
            value = vars(value).get(name, UNKNOWN)
            # Planning, perhaps in another thread, has functions of its own in some places.
            if callable(value) and (home, name) not in _ANSWERED:
                yield named(home, name)


def torch_functions(functions: Iterable[Any]) -> Iterator[AttributeRead]:
    """Yield the reads of the names of functions of torch. functions: those that a forward calls.

    >>> [str(read) for read in torch_functions([torch.tanh, torch.nn.functional.relu])]
    ["['torch'].tanh", "['torch.nn.functional'].relu"]
    """
    methods: dict[str, None] = {}
    for function in dict.fromkeys(functions):
        name = str(getattr(function, "__name__", ""))
        if getattr(torch.Tensor, name, None) is function:
            # An operator, such as `+`, is another method that calls the same function.
            both = (name, f"__{name}__")
            methods.update((each, None) for each in both if hasattr(torch.Tensor, each))
            continue
        for home in HOMES:
            if vars(home).get(name) is function:
                yield named(home.__name__, name)
    if methods:
        route = (("cell", Methods(torch.Tensor, methods)),)
        yield AttributeRead("", route, "torch.Tensor", Where.LISTED, UNKNOWN)
