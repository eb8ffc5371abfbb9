"""Work per element beside moving it, for ops that are no products: exponentials, and the like."""

from __future__ import annotations

from autoparallel.graph.operators import packet_of
from autoparallel.rules.rule import OpCall

__all__ = ["functions"]

# Forward and backward, in the time of one exponential: what torch's CPU kernels take, rounded. It
# matters only where a processor computes functions more slowly than it moves numbers.
_FUNCTIONS: dict[str, tuple[float, float]] = {
    "exp": (1.0, 0.5),
    "exp2": (1.0, 0.5),
    "expm1": (1.0, 0.5),
    "log": (1.5, 1.5),
    "log1p": (1.5, 1.5),
    "log2": (1.5, 1.5),
    "tanh": (3.0, 0.5),
    "sigmoid": (0.5, 0.5),
    "silu": (0.5, 0.5),
    "erf": (1.5, 2.5),
    "gelu": (0.5, 1.0),
    "sin": (1.5, 2.5),
    "cos": (1.5, 2.5),
    "sqrt": (0.5, 1.0),
    "rsqrt": (0.5, 1.0),
    "pow": (3.5, 3.5),
    "softplus": (1.5, 1.5),
    "mish": (3.0, 3.0),
    "softmax": (0.5, 0.5),
    "log_softmax": (0.5, 0.5),
    "cross_entropy_loss": (1.0, 1.5),
    "layer_norm": (0.5, 0.5),
    "rms_norm": (0.5, 0.5),
    "dropout": (3.0, 0.5),
}
# gelu(approximate="tanh") evaluates a tanh where the exact one evaluates an erf.
_GELU_BY_TANH = (2.0, 2.5)


def functions(call: OpCall) -> tuple[float, float]:
    """Return the functions evaluated per point of the op's loops, forward and backward,
    in the time of one exponential.

    Both are 0 for ops that only move numbers, and for those that have no entry.
    """
    name = packet_of(call.node.target)
    if name == "gelu" and call.argument(1, "approximate", "none") == "tanh":
        return _GELU_BY_TANH
    return _FUNCTIONS.get(name, (0.0, 0.0))
