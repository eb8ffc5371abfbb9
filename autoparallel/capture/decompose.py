"""Decompositions while tracing: an op is recorded as the simpler ops that define it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch

# Importing these fills the registry.
from autoparallel.capture import (  # noqa: F401
    decompositions,
    loss_decompositions,
    matrix_decompositions,
    random_decompositions,
)
from autoparallel.capture.decomposition_registry import DECOMPOSITIONS, Decomposition, Known
from autoparallel.capture.seeded_draws import without_generator
from autoparallel.support.torch_private import (
    OpOverload,
    decompose,
    get_proxy_mode,
    is_composite,
    schema_of,
)

__all__ = ["decomposing"]


class _Table(Mapping[Any, Decomposition]):
    """The decompositions as torch's tracer asks for them: for one op after the other.

    known: as in `decomposing`. The decompositions that are written out come first; any other op
    that torch defines by others, and that is not known, is traced as torch defines it.
    """

    def __init__(self, known: Known) -> None:
        self.known = known

    def __contains__(self, op: object) -> bool:
        return self.find(op) is not None

    def __getitem__(self, op: Any) -> Decomposition:
        decomposition = self.find(op)
        assert decomposition is not None
        return decomposition

    def __len__(self) -> int:
        return len(DECOMPOSITIONS)

    def __iter__(self) -> Iterator[Any]:
        return iter(DECOMPOSITIONS)

    def find(self, op: Any) -> Decomposition | None:
        """Return the function to trace in place of an op, None where the op is traced as itself."""
        if not isinstance(op, OpOverload):
            return None
        drawn = torch.Tag.nondeterministic_seeded in op.tags
        if not drawn and any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
            return None  # autocast casts the operands of the op as a whole
        written_out = DECOMPOSITIONS.get(str(op))
        if written_out is not None:
            return without_generator(written_out) if drawn else written_out
        into = _writing_into(op)
        if into is not None:
            return into
        composite = op.namespace == "aten" and is_composite(op) and schema_of(op).returns
        if not composite or self.known(str(op)) or str(op) in _AS_THEY_ARE:
            return None
        # An in-place op whose out-of-place form has a rule becomes that form in a pass.
        packet, _, overload = str(op).rpartition(".")
        if packet.endswith("_") and self.known(f"{packet[:-1]}.{overload}"):
            return None
        return op.decompose


@cache
def _writing_into(op: Any) -> Decomposition | None:
    """Return a decomposition of an op that writes its results into memory that it is given (out=):
    the op that returns them, and copies of these. None for any other op.
    """
    schema: Any = schema_of(op)
    written = [
        item.name for item in schema.arguments if item.alias_info and item.alias_info.is_write
    ]
    rest = [(item.name, str(item.type)) for item in schema.arguments if item.name not in written]
    by_name = {item.name for item in schema.arguments if item.kwarg_only}
    if not written or not by_name.issuperset(written) or len(written) != len(schema.returns):
        return None
    packet = op.overloadpacket
    for overload in map(partial(getattr, packet), packet.overloads()):
        arguments = [(item.name, str(item.type)) for item in schema_of(overload).arguments]
        if arguments == rest:
            return partial(_copied, overload, written)
    return None


def _copied(op: Any, written: list[str], *args: Any, **kwargs: Any) -> Any:
    """Compute the results of an op, and copy them to where the call wants them."""
    places = [kwargs.pop(name) for name in written]
    results = op(*args, **kwargs)
    several = isinstance(results, tuple | list)
    pairs = list(zip(places, results if several else [results], strict=True))
    # Torch gives memory of another size a new one, which nobody who shares it sees.
    if any(place.shape != result.shape for place, result in pairs):
        return NotImplemented
    for place, result in pairs:
        place.copy_(result)
    return tuple(places) if several else places[0]


# These return numbers of Python, for which torch's tracer has a way of its own.
_AS_THEY_ARE = {"aten.item.default", "aten.is_nonzero.default"}


@contextlib.contextmanager
def decomposing(known: Known) -> Iterator[None]:
    """Trace ops, inside of this context, as the ops that define them.

    known: says of an op's name whether the op has a rule, and is traced as itself for that.

    Example: `with decomposing(known=find_rule): model(x)`, inside of torch.export.
    """
    # Outside of a trace there is nobody to record the simpler ops: eager torch runs as it is.
    if get_proxy_mode() is None:
        yield
        return
    with decompose(_Table(known)):
        yield
