"""One or more calls of every op that has a rule, with real tensors.

Independent sizes differ, uneven ones among them (5 on 2, 3 and 4 ranks); no value is zero.
"""

from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch

from autoparallel.rules.pointwise import BINARY, UNARY
from autoparallel.rules.referee import Example, make_example

_SEED = count()


@dataclass
class Call:
    """target(*args, **kwargs). symbolic: sizes that the program takes from its inputs."""

    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    symbolic: dict[int, str] = field(default_factory=dict)

    def example(self) -> Example:
        return make_example(self.target, self.args, self.kwargs, self.symbolic)

    def __str__(self) -> str:
        def word(item):
            if isinstance(item, torch.Tensor):
                return "x".join(map(str, item.shape)) or "scalar"
            if isinstance(item, tuple):
                return "(" + ",".join(map(word, item)) + ")"
            return str(item)

        words = [word(arg) for arg in self.args]
        words += [f"{key}={word(value)}" for key, value in self.kwargs.items()]
        words += ["symbolic"] if self.symbolic else []
        return f"{self.target}({','.join(words)})"


def x(*shape: int, low: float = 0.2, high: float = 0.9, signs: bool = True) -> torch.Tensor:
    """Trainable numbers of magnitude low to high, of both signs unless told otherwise."""
    generator = torch.Generator().manual_seed(next(_SEED))
    numbers = torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low
    if signs:
        numbers *= torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return numbers.requires_grad_()


def fixed(*shape: int) -> torch.Tensor:
    """Numbers that take no gradient."""
    return x(*shape).detach()


def ints(*shape: int, low: int = 1, high: int = 9) -> torch.Tensor:
    """Whole numbers low <= n < high."""
    generator = torch.Generator().manual_seed(next(_SEED))
    return torch.randint(low, high, shape, generator=generator)


def truth(*shape: int) -> torch.Tensor:
    """Truth values."""
    return ints(*shape) % 2 == 0


def call(target: str, *args: Any, symbolic: dict[int, str] | None = None, **kwargs: Any) -> Call:
    return Call(f"aten.{target}", args, kwargs, symbolic or {})


_DOMAINS = {
    "acosh": (1.1, 2.0),
    **dict.fromkeys(("log", "log10", "log1p", "log2", "sqrt", "rsqrt"), (0.2, 0.9)),
    **dict.fromkeys(("logit", "digamma", "lgamma"), (0.2, 0.9)),
}
_MORE_ARGUMENTS = {
    "clamp": (-0.5, 0.6),
    "clamp_min": (-0.3,),
    "clamp_max": (0.4,),
    "threshold": (0.1, 0.7),
}


def _unary(name: str) -> Call:
    if name == "bitwise_not":
        return call("bitwise_not.default", ints(4, 5))
    low, high = _DOMAINS.get(name, (0.2, 0.9))
    operand = x(4, 5, low=low, high=high, signs=name not in _DOMAINS)
    return call(f"{name}.default", operand, *_MORE_ARGUMENTS.get(name, ()))


_ON_INTEGERS = {"__and__", "__or__", "__xor__", "bitwise_and", "bitwise_or", "bitwise_xor"}


def _binary(target: str) -> Call:
    name, _, overload = target.partition(".")
    if name in _ON_INTEGERS or name == "floor_divide":
        left, right, number = ints(4, 5), ints(5), 3
    elif name == "pow":
        left, right, number = x(4, 5, signs=False), x(5), 2.5
    else:
        left, right, number = x(4, 5), x(5), 0.7
    if overload == "Scalar" and name == "pow":
        return call(target, number, left)
    if overload in ("Scalar", "Tensor_Scalar"):
        return call(target, left, number)
    return call(target, left, right)


def _pointwise() -> list[Call]:
    same = x(4, 5)
    kept = x(4, 5)
    return [
        *map(_unary, UNARY),
        *map(_binary, BINARY),
        call("clamp.Tensor", x(4, 5), fixed(5)),
        call("clamp.Tensor", x(4, 5), fixed(4, 5) - 1, fixed(5) + 1),
        call("masked_fill.Scalar", x(3, 4, 5), truth(4, 5), 0.5),
        call("masked_fill.Scalar", truth(4, 5), truth(5), True),
        call("addcmul.default", x(4, 5), x(5), x(4, 1), value=0.5),
        call("addcdiv.default", x(4, 5), x(5), x(4, 5), value=0.5),
        call("neg.default", x(4, 5)),
        call("neg.default", ints(4, 5)),
        call("to.dtype", x(4, 5), torch.float64),
        call("to.dtype", ints(4, 5), torch.float64),
        call("to.dtype", fixed(4, 5), torch.int64),
        call("to.dtype", truth(4, 5), torch.float64),
        call("to.dtype_layout", ints(4, 5), dtype=torch.float64, layout=torch.strided),
        call("to.device", x(4, 5), torch.device("cpu"), torch.float64),
        call("_to_copy.default", x(4, 5), dtype=torch.float64),
        call("clone.default", x(4, 5)),
        call("contiguous.default", x(4, 5)),
        call("alias.default", x(4, 5)),
        call("detach.default", x(4, 5)),
        call("positive.default", x(4, 5)),
        call("mul.Scalar", x(4, 5), 0.7),
        call("div.Scalar", x(4, 5), 0.7),
        call("add.Tensor", x(4, 5), x(5)),
        call("add.Tensor", x(4, 5), x(4, 1), alpha=2),
        call("add.Tensor", x(4, 5), 0.3),
        call("add.Tensor", same, same),
        call("add.Tensor", ints(4, 5), ints(5)),
        call("add.Tensor", truth(4, 5), truth(5)),
        call("add.Scalar", x(4, 5), 0.3),
        call("sub.Tensor", x(3, 4, 5), x(4, 5)),
        call("sub.Scalar", x(4, 5), 0.3),
        call("rsub.Scalar", x(4, 5), 0.3),
        call("mul.Tensor", x(4, 5), x(5)),
        call("mul.Tensor", x(4, 5), fixed(4, 1)),
        call("mul.Tensor", x(4, 5), 0.7),
        call("mul.Tensor", kept, kept),
        call("mul.Tensor", truth(4, 5), truth(5)),
        call("div.Tensor", x(4, 5), x(5)),
        call("div.Tensor", x(4, 5), 0.7),
        call("div.Tensor", ints(4, 5), 2),
        call("div.Tensor", kept, kept),
        call("where.self", truth(4, 5), x(4, 5), x(5)),
        call("where.self", truth(5), x(4, 5), x()),
        call("zeros_like.default", x(4, 5)),
        call("ones_like.default", ints(4, 5)),
        call("full_like.default", x(4, 5), 0.3),
        call("dropout.default", x(8, 5), 0.4, True),
        call("dropout.default", x(4, 5), 0.4, False),
        call("mul.Tensor", x(4, 5, 6), x(5, 1), symbolic={4: "s0", 5: "s1"}),
        call("dropout.default", x(4, 5, 6), 0.4, True, symbolic={4: "s0", 5: "s1"}),
    ]


def _contraction() -> list[Call]:
    square, weight = x(5, 5), x(6, 5)
    return [
        call("linear.default", x(3, 4, 6), x(5, 6)),
        call("linear.default", x(8), x(5, 8)),
        call("linear.default", x(4, 5, 6), x(8, 6), symbolic={4: "s0", 5: "s1"}),
        call("linear.default", square, square),
        call("linear.default", weight, weight),
        call("mm.default", x(4, 5), x(5, 6)),
        call("bmm.default", x(4, 5, 6), x(4, 6, 7)),
        call("matmul.default", x(5), x(5)),
        call("matmul.default", x(5), x(5, 6)),
        call("matmul.default", x(5), x(4, 5, 6)),
        call("matmul.default", x(4, 5), x(5)),
        call("matmul.default", x(3, 4, 5), x(5, 6)),
        call("matmul.default", x(3, 4, 5), x(3, 5, 6)),
        call("matmul.default", x(2, 1, 4, 5), x(3, 5, 6)),
        call("matmul.default", x(4, 5), x(3, 5, 6)),
        call("matmul.default", x(3, 4, 5), x(1, 5, 6)),
    ]


def _shape() -> list[Call]:
    symbolic = {5: "s0", 3: "s1"}
    return [
        call("reshape.default", x(4, 6, 5), (24, 5)),
        call("reshape.default", x(5, 24), (5, 4, 6)),
        call("reshape.default", x(5, 24), (5, 4, -1)),
        call("reshape.default", x(4, 6, 5), (8, 3, 5)),
        call("reshape.default", x(4, 9), (6, 6)),
        call("reshape.default", x(1, 8, 5), (8, 1, 5)),
        call("reshape.default", truth(4, 6), (24,)),
        call("reshape.default", x(5, 3, 24), (5, 3, 4, 6), symbolic=symbolic),
        call("reshape.default", x(5, 3, 4, 6), (5, 3, 24), symbolic=symbolic),
        call("reshape.default", x(5, 3, 8), (15, 8), symbolic=symbolic | {15: "s0*s1"}),
        call("view.default", x(5, 24), (5, 4, 6)),
        call("transpose.int", x(4, 5, 6), 1, -1),
        call("swapaxes.default", x(4, 5, 6), 0, 2),
        call("t.default", x(4, 5)),
        call("numpy_T.default", x(4, 5)),
        call("mT.default", x(3, 4, 5)),
        call("permute.default", x(4, 5, 6), (2, 0, -2)),
        call("unsqueeze.default", x(4, 5), -1),
        call("unsqueeze.default", x(4, 5), 0),
        call("squeeze.dim", x(4, 1, 5), 1),
        call("squeeze.dim", x(4, 5), 1),
        call("squeeze.dims", x(4, 1, 5, 1), (1, -1)),
        call("squeeze.default", x(4, 1, 5, 1)),
        call("expand.default", x(4, 1, 5), (4, 6, 5)),
        call("expand.default", x(1, 5), (4, 3, 5)),
        call("expand.default", x(4, 1, 5), (-1, 6, -1)),
        call("expand.default", x(3, 1, 4), (3, 5, 4), symbolic=symbolic),
        call("split.Tensor", x(12, 5), 4),
        call("split.Tensor", x(5, 12), 6, -1),
        call("split.Tensor", x(5, 8), 3, 1),
        call("chunk.default", x(12, 5), 3),
        call("chunk.default", x(5, 24), 7, 1),
        call("split_with_sizes.default", x(5, 12), (4, 4, 4), 1),
        call("split_with_sizes.default", x(5, 12), (6, 2, 4), 1),
        call("unbind.int", x(4, 3, 5), 1),
        call("select.int", x(4, 3, 5), 1, -1),
        call("slice.Tensor", x(4, 9, 5), 1, 2, 8, 2),
        call("slice.Tensor", x(9, 5), 0, 3),
        call("flip.default", x(4, 5, 6), (0, -1)),
        call("roll.default", x(4, 5, 6), (1, 2), (0, 2)),
        call("roll.default", x(4, 5), (3,)),
        call("constant_pad_nd.default", x(4, 5, 6), (1, 2)),
        call("constant_pad_nd.default", x(4, 5, 6), (0, 0, 2, 1), 0.5),
        call("pad.default", x(4, 5, 6), (1, 2)),
        call("pad.default", x(4, 5, 6), (1, 2), "reflect"),
        call("pad.default", x(4, 5, 6), (1, 2), "constant", 0.5),
        call("cat.default", (x(4, 6), x(4, 6), x(4, 6)), -1),
        call("cat.default", (x(4, 6), x(4, 5)), 1),
        call("cat.default", (x(4, 6), fixed(3, 6))),
        call("stack.default", (x(4, 5), x(4, 5)), 1),
    ]


def _reduction() -> list[Call]:
    symbolic = {4: "s0", 5: "s1"}
    return [
        call("sum.dim_IntList", x(4, 5, 6), (1,)),
        call("sum.dim_IntList", x(4, 5, 6), (0, -1), True),
        call("sum.dim_IntList", x(4, 5, 6), (1, 2), symbolic=symbolic),
        call("sum.dim_IntList", truth(4, 5), (1,)),
        call("sum.default", x(4, 5)),
        call("amax.default", x(4, 5, 6), (1,)),
        call("amin.default", x(4, 5, 6), (0, 2), True),
        call("amax.default", x(4, 5)),
        call("argmax.default", x(4, 5, 6), 1),
        call("argmax.default", x(4, 5)),
        call("argmin.default", x(4, 5, 6), -1, True),
        call("logsumexp.default", x(4, 5, 6), (1,)),
        call("any.dim", truth(4, 5, 6), 1),
        call("all.dim", truth(4, 5, 6), 1, True),
        call("prod.dim_int", x(4, 5, 6), 1),
        call("var.correction", x(4, 5, 6), (1,), correction=0),
        call("var.dim", x(4, 5, 6), (-1,), True),
        call("std.correction", x(4, 5, 6), (1, 2), correction=1, keepdim=True),
        call("max.dim", x(4, 5, 6), 1),
        call("min.dim", x(4, 5, 6), -1, True),
        call("cumsum.default", x(4, 5, 6), 1),
        call("softmax.int", x(4, 5, 6), -1),
        call("log_softmax.int", x(4, 5, 6), 1),
        call("_softmax.default", x(4, 5, 6), -2, False),
    ]


def _normalization() -> list[Call]:
    return [
        call("layer_norm.default", x(4, 5, 6), (6,), x(6), x(6)),
        call("layer_norm.default", x(4, 5, 6), (5, 6), x(5, 6)),
        call("layer_norm.default", x(4, 5, 6), (6,)),
        call("rms_norm.default", x(4, 5, 6), (6,), x(6), 1e-5),
        call("rms_norm.default", x(4, 5, 6), (6,)),
    ]


def _attention() -> list[Call]:
    name = "scaled_dot_product_attention.default"
    q, k, v = x(4, 6, 5, 8), x(4, 6, 7, 8), x(4, 6, 7, 9)
    grouped = (x(4, 12, 5, 8), x(4, 3, 7, 8), x(4, 3, 7, 8))
    return [
        call(name, q, k, v),
        call(name, q, k, v, fixed(5, 7)),
        call(name, q, k, v, truth(4, 1, 5, 7) | True),
        call(name, q, k, v, fixed(4, 6, 5, 7)),
        call(name, q, k, v, None, 0.0, True),
        call(name, q, k, v, is_causal=True, scale=0.3),
        call(name, *grouped, enable_gqa=True),
        call(name, *grouped, truth(12, 1, 7) | True, enable_gqa=True),
        call(name, x(6, 5, 8), x(6, 7, 8), x(6, 7, 8)),
        call(name, x(4, 5, 8, 6), x(4, 5, 8, 6), x(4, 5, 8, 6), symbolic={4: "s0", 8: "s1"}),
    ]


def _indexing() -> list[Call]:
    return [
        call("embedding.default", x(9, 6), ints(4, 5, high=9)),
        call("embedding.default", x(10, 6), ints(4, 5, low=0, high=10), 3),
        call("embedding.default", x(9, 6), ints(4, 5, low=0), -1, True, False),
        call("embedding.default", x(9, 6), ints(4, 5), symbolic={4: "s0", 5: "s1"}),
    ]


def _losses() -> list[Call]:
    logits, target = x(8, 9), ints(8)
    ignored = torch.where(torch.arange(8) % 3 == 0, -100, target)
    name = "cross_entropy_loss.default"
    calls = [call(name, x(5, 9), ints(5), None, reduction) for reduction in (0, 1, 2)]
    calls += [call(name, logits, ignored, None, reduction) for reduction in (0, 1, 2)]
    calls += [
        call(name, logits, target),
        call(name, logits, target, None, 1, 4),
        call(name, logits, target, x(9, signs=False).detach()),
        call(name, logits, target, None, 1, -100, 0.1),
        call(name, logits, x(8, 9)),
        call(name, x(4, 9, 5), ints(4, 5)),
        call(name, x(4, 9, 5), ints(4, 5), None, 0),
        call(name, x(9), ints()),
        call(name, x(8, 6), ints(8, high=6), None, 1, symbolic={8: "s0"}),
    ]
    for loss in ("mse_loss", "l1_loss", "smooth_l1_loss"):
        calls += [call(f"{loss}.default", x(4, 5), x(4, 5), way) for way in (0, 1, 2)]
    calls.append(call("mse_loss.default", x(4, 5), x(4, 5)))
    return calls


CALLS = (
    *_pointwise(),
    *_contraction(),
    *_shape(),
    *_reduction(),
    *_normalization(),
    *_attention(),
    *_indexing(),
    *_losses(),
)
