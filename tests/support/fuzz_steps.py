"""Steps of random programs: ops that compute. Each writes a line that reads what is there."""

from __future__ import annotations

import math

import torch
from fuzz_pen import MOST_ELEMENTS, Pen, SkippedError, apart_from, distinct

__all__ = ["COMPUTE"]

SMOOTH = """
tanh sigmoid sin cos erf expm1 square neg atan asinh F.gelu F.silu F.softplus F.elu F.mish
F.logsigmoid F.selu F.celu exp
""".split()
KINKED = "relu abs F.leaky_relu F.hardtanh F.relu6 F.hardsigmoid F.hardswish".split()


def unary(pen: Pen) -> None:
    a = pen.value()
    name = pen.one((*SMOOTH, *KINKED))
    if name in KINKED and not apart_from(pen[a], 0, 1, -1, 3, -3, 6):
        raise SkippedError
    pen.write(f"{name}({a})" if "." in name else f"{a}.{name}()")


def scaled(pen: Pen) -> None:
    a = pen.value()
    texts = (
        f"{a} * 0.5",
        f"{a} + 1.5",
        f"{a} / 3",
        f"0.3 - {a}",
        f"-{a}",
        f"{a}.clone()",
        f"{a}.contiguous()",
        f"{a}.detach()",
        f"torch.add({a}, {a}, alpha=0.5)",
        f"{a}.div(2.0)",
        f"torch.clamp({a}, -0.37, 0.61)",
        f"1.0 / (2.0 + {a}.sigmoid())",
        f"({a}.square() + 0.1).sqrt()",
        f"({a}.sigmoid() + 0.2).log()",
        f"({a}.square() + 0.3).rsqrt()",
        f"({a}.sigmoid() + 0.1) ** 2.5",
        f"torch.nan_to_num({a})",
        f"torch.zeros_like({a})",
        f"{a} - {a}.detach()",
        f"{a} ** 2",
    )
    pen.write(pen.one(texts))


def rounded(pen: Pen) -> None:
    a = pen.value(lambda t: apart_from(t, *range(-12, 13), *(n / 2 for n in range(-11, 12, 2))))
    if float(pen[a].abs().max()) > 5:
        raise SkippedError
    pen.write(pen.one((f"{a}.floor()", f"{a}.round()", f"{a}.sign()", f"{a}.trunc()")))


def partner(pen: Pen, a: str) -> str:
    """Return another operand that broadcasts with `a`."""
    shape = pen.shape(a)

    def fits(tensor: torch.Tensor) -> bool:
        try:
            return torch.broadcast_shapes(shape, tensor.shape).numel() <= MOST_ELEMENTS
        except RuntimeError:
            return False

    if pen.maybe():
        return pen.value(fits)
    own = [1 if pen.number(0, 3) == 3 else size for size in shape[pen.number(0, len(shape)) :]]
    return pen.declare(pen.one(("parameter", "input", "given", "frozen")), *own)


def binary(pen: Pen) -> None:
    a = pen.value()
    b = partner(pen, a)
    texts = (
        f"{a} + {b}", f"{a} * {b}", f"{a} - {b}", f"{b} - {a}", f"{a} / (2 + {b}.sigmoid())",
        f"torch.lerp({a}, {b}, 0.3)", f"torch.addcmul({a}, {a}, {b}, value=0.5)",
        f"torch.hypot({a}, {b} + 3)", f"torch.atan2({a}, {b}.sigmoid() + 1)",
        f"torch.rsub({a}, {b})", f"torch.sub({a}, {b}, alpha=2)", f"{a} / {a}.square().add(1)",
    )  # fmt: skip
    pen.write(pen.one(texts))


def extremes(pen: Pen) -> None:
    a = pen.value()
    b = partner(pen, a)
    if not apart_from(pen[a] - pen[b], 0):
        raise SkippedError
    pen.write(f"torch.{pen.one(('maximum', 'minimum', 'fmax', 'fmin'))}({a}, {b})")


def compared(pen: Pen) -> None:
    a = pen.value(lambda t: apart_from(t, 0.1))
    texts = (f"{a} > 0.1", f"{a}.lt(0.1)", f"~({a} > 0.1)", f"({a} > 0.1) | ({a} < 0)")
    m = pen.write(pen.one(texts))
    if pen.maybe():
        pen.write(f"{m}.to(torch.float64)")


def masked(pen: Pen) -> None:
    a = pen.value()
    m = pen.truths(pen.shape(a))
    b = partner(pen, a)
    texts = (
        f"{a}.masked_fill({m}, 0.0)", f"{a}.masked_fill({m}, 0.5)", f"torch.where({m}, {a}, {b})",
        f"torch.where({m}, {a}, 0.0)", f"torch.where({m}, 0.25, {a})", f"{a} * {m}",
    )  # fmt: skip
    pen.write(pen.one(texts))


def linear(pen: Pen) -> None:
    a = pen.value(lambda t: t.dim() >= 1)
    width, wide = pen.shape(a)[-1], pen.size()
    w = pen.parameter(wide, width)
    form = pen.number(0, 3)
    if form == 1:
        pen.write(f"F.linear({a}, {w}, {pen.parameter(wide)})")
    elif form == 2:
        pen.write(f"{a} @ {w}.t()")
    elif form == 3:
        pen.write(f"F.linear({a}, {pen.parameter(width, wide)}.t())")
    else:
        pen.write(f"F.linear({a}, {w})")


def product(pen: Pen) -> None:
    a = pen.value(lambda t: t.dim() >= 2)
    width = pen.shape(a)[-1]
    form = pen.number(0, 5)
    if form == 0:
        pen.write(f"{a} @ {pen.parameter(width, pen.size())}")
    elif form == 1:
        b = pen.value(lambda t: t.dim() >= 1 and t.shape[-1] == width)
        other = f"{b}.transpose(-1, -2)" if len(pen.shape(b)) > 1 else b
        try:
            pen.write(f"torch.matmul({a}, {other})")
        except RuntimeError:
            raise SkippedError from None
    elif form == 2:
        pen.write(f"{a} @ {pen.parameter(width)}")
    elif form == 3:
        pen.write(f"{a}.transpose(-1, -2) @ {a}")
    elif form == 4:
        pen.write(f"{pen.parameter(pen.shape(a)[-2])} @ {a}")
    else:
        batch = pen.shape(a)[:-2] if pen.maybe() else ()
        pen.write(f"torch.matmul({a}, {pen.parameter(*batch, width, pen.size())})")


def flat_product(pen: Pen) -> None:
    """Write a product that takes no batch, or just one."""
    form = pen.number(0, 6)
    a = pen.value(lambda t: t.dim() == (3 if form in (3, 4, 5) else 2))
    *batch, rows, width = pen.shape(a)
    if form == 0:
        pen.write(f"torch.mm({a}, {pen.parameter(width, pen.size())})")
    elif form == 1:
        wide = pen.size()
        bias = pen.parameter(*pen.one(((wide,), (rows, wide), (1, wide), (1,))))
        pen.write(f"torch.addmm({bias}, {a}, {pen.parameter(width, wide)})")
    elif form == 2:
        pen.write(f"torch.mv({a}, {pen.parameter(width)})")
    elif form == 3:
        pen.write(f"torch.bmm({a}, {pen.parameter(*batch, width, pen.size())})")
    elif form == 4:
        wide = pen.size()
        bias = pen.parameter(*pen.one(((rows, wide), (*batch, rows, wide), (wide,))))
        pen.write(f"torch.baddbmm({bias}, {a}, {pen.parameter(*batch, width, wide)})")
    elif form == 5:
        wide = pen.size()
        other = pen.parameter(*batch, width, wide)
        pen.write(f"torch.addbmm({pen.parameter(rows, wide)}, {a}, {other})")
    else:
        pen.write(f"torch.addmv({pen.parameter(rows)}, {a}, {pen.parameter(width)})")


def einsum(pen: Pen) -> None:
    a = pen.value(lambda t: 2 <= t.dim() <= 4)
    names = "abcd"[: len(pen.shape(a))]
    known = dict(zip(names, pen.shape(a), strict=True))
    known["z"] = pen.size()
    other = "".join(name for name in (*names, "z") if pen.maybe()) or names[0]
    b = pen.parameter(*(known[name] for name in other))
    letters = [name for name in known if name in names + other]
    kept = [letters[i] for i in pen.order(len(letters)) if pen.number(0, 2)]
    pen.write(f"torch.einsum('{names},{other}->{''.join(kept)}', {a}, {b})")


def outer(pen: Pen) -> None:
    a = pen.value(lambda t: t.dim() == 1)
    b = pen.value(lambda t: t.dim() == 1)
    pen.write(f"torch.outer({a}, {b})" if pen.maybe() else f"torch.dot({a}, {a})")


def reduced(pen: Pen) -> None:
    a = pen.value(lambda t: t.dim() >= 1)
    rank = len(pen.shape(a))
    dims = [d for d in range(rank) if pen.maybe()] or [rank - 1]
    keep = pen.one(("", ", keepdim=True"))
    name = pen.one(("sum", "mean", "logsumexp", "amax", "amin", "var", "std", "norm"))
    many = math.prod(pen.shape(a)[d] for d in dims) > 1
    if name in ("amax", "amin", "var", "std", "norm") and not (distinct(pen[a]) and many):
        raise SkippedError
    where = dims[0] if len(dims) == 1 and pen.maybe() else tuple(dims)
    if name == "norm":
        pen.write(f"torch.linalg.vector_norm({a}, dim={where}{keep})")
    elif name in ("sum", "mean") and pen.number(0, 4) == 4:
        pen.write(f"{a}.{name}()")
    else:
        pen.write(f"{a}.{name}({where}{keep})")


def along(pen: Pen) -> None:
    a = pen.value(lambda t: t.dim() >= 1)
    dim = pen.sign(pen.axis(a), a)
    name = pen.one(("softmax", "log_softmax", "cumsum", "flip", "prod", "logcumsumexp", "roll"))
    text = {"roll": f"torch.roll({a}, 2, {dim})", "flip": f"{a}.flip({dim})"}
    pen.write(text.get(name, f"{a}.{name}({dim})"))


def ordered(pen: Pen) -> None:
    a = pen.value(lambda t: t.dim() >= 1 and distinct(t))
    dim = pen.sign(pen.axis(a), a)
    form = pen.number(0, 3)
    if form == 0:
        pen.write(f"{a}.topk({pen.number(1, min(3, pen.shape(a)[dim]))}, dim={dim})", 2)
    elif form == 1:
        pen.write(f"{a}.sort(dim={dim})", 2)
    elif form == 2:
        pen.write(f"{a}.max({dim})", 2)
    else:
        pen.write(f"{a}.argmax({dim})")


def normalized(pen: Pen) -> None:
    a = pen.value(lambda t: t.dim() >= 2 and t.shape[-1] > 1 and distinct(t))
    *_, width = shape = pen.shape(a)
    form = pen.number(0, 5)
    if form == 0:
        w, b = pen.parameter(width), pen.parameter(width)
        pen.write(f"F.layer_norm({a}, ({width},), {w}, {b})")
    elif form == 1:
        pen.write(f"F.layer_norm({a}, {shape[-2:]})")
    elif form == 2:
        pen.write(f"F.rms_norm({a}, ({width},), {pen.parameter(width)})")
    elif form == 3:
        groups = pen.one(n for n in range(1, shape[1] + 1) if shape[1] % n == 0)
        if math.prod(shape[2:]) * shape[1] // groups < 2:
            raise SkippedError
        w, b = pen.parameter(shape[1]), pen.parameter(shape[1])
        pen.write(f"F.group_norm({a}, {groups}, {w}, {b})")
    elif form == 4:
        if math.prod(shape) // shape[1] < 2:
            raise SkippedError
        w, b = pen.parameter(shape[1]), pen.parameter(shape[1])
        pen.write(f"F.batch_norm({a}, None, None, {w}, {b}, training=True)")
    else:
        pen.write(f"F.normalize({a}, dim={pen.one((-1, 1))})")


COMPUTE = (
    unary, binary, linear, scaled, reduced, product, masked, along, normalized, flat_product,
    einsum, compared, rounded, extremes, outer, ordered,
)  # fmt: skip
