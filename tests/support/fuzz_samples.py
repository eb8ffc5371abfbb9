"""A step of random programs for every op with a rule: its samples on the program's tensors."""

from __future__ import annotations

from typing import Any

import torch
from calls import Call
from fuzz_pen import Pen, SkippedError
from sample_calls import CALLS

from autoparallel.graph.operators import makes_list, operator_of

__all__ = ["sampled"]

# Rounding may decide what these give: they read what was there before the program ran.
_JUMPS = frozenset(
    """
    ceil floor round frac trunc sign sgn fmod remainder floor_divide eq ne lt le gt ge argmax argmin
    topk sort amax amin max min maximum minimum fmax fmin isnan isinf isfinite any all copysign div
    threshold hardtanh hardsigmoid hardswish relu relu6 clamp clamp_min clamp_max clip abs absolute
    leaky_relu prelu rrelu median mode kthvalue unique max_pool1d max_pool2d max_pool3d
    max_pool2d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    logical_not logical_and logical_or logical_xor erfinv logit digamma lgamma nan_to_num
    """.split()
)


def _word(pen: Pen, item: Any, smooth: bool, known: dict[int, str]) -> str:
    """Write an argument of a sample as text."""
    if isinstance(item, torch.Tensor):
        if id(item) not in known:
            known[id(item)] = _operand(pen, item, smooth)
        return known[id(item)]
    if isinstance(item, tuple):
        return "[" + ", ".join(_word(pen, part, smooth, known) for part in item) + "]"
    if isinstance(item, (bool, int, str, type(None), torch.dtype)):
        return repr(item)
    if isinstance(item, float) and abs(item) < 1e9:
        return repr(item)
    raise SkippedError


def _operand(pen: Pen, tensor: torch.Tensor, smooth: bool) -> str:
    """Return a value in place of a sample's tensor: one of its shape, or a new one."""
    shape = tuple(tensor.shape)
    if tensor.dtype == torch.bool:
        return pen.declare("truths", *shape)
    if tensor.dtype == torch.int64:
        # They may be the ends of groups, which in any other order name rows that there are not.
        if tensor.dim() == 1 and len(tensor) > 1 and bool((tensor.diff() >= 0).all()):
            raise SkippedError
        return pen.integers(shape, int(tensor.max()) + 1)
    if tensor.dtype != torch.float64:
        raise SkippedError
    found = [n for n, t in pen.values.items() if tuple(t.shape) == shape and t.is_floating_point()]
    if smooth and found and pen.maybe():
        return str(pen.one(reversed(found)))
    return pen.declare("parameter" if tensor.requires_grad else "given", *shape)


def sampled(pen: Pen) -> None:
    """Write one of the sample calls."""
    call: Call = pen.one(CALLS)
    _, name, _ = call.target.split(".")
    if call.symbolic or name in ("rnn_relu",):
        raise SkippedError
    known: dict[int, str] = {}
    words = [_word(pen, item, name not in _JUMPS, known) for item in call.args]
    words += [f"{k}={_word(pen, v, name not in _JUMPS, known)}" for k, v in call.kwargs.items()]
    count = len(operator_of(call.target)._schema.returns)
    if makes_list(call.target):
        pen.write(f"torch.ops.{call.target}({', '.join(words)})[0]")
    else:
        pen.write(f"torch.ops.{call.target}({', '.join(words)})", count)
