"""Steps of random programs: look-ups, losses, attention, convolutions, dropout, constants."""

from __future__ import annotations

import math

from fuzz_pen import Pen, SkippedError

__all__ = ["LAYERS", "LOSSES", "squares"]


def embedded(pen: Pen) -> None:
    shape = [pen.size() for _ in range(pen.number(1, 2))]
    rows = pen.one((5, 3, 7, 8, 12, 2))
    if pen.maybe():
        index = pen.whole(rows)
    else:
        index = pen.integers(tuple(shape), rows)
    more = pen.one(("", "", f", padding_idx={rows - 1}", ", scale_grad_by_freq=True"))
    pen.write(f"F.embedding({index}, {pen.parameter(rows, pen.size())}{more})")


def looked_up(pen: Pen) -> None:
    a = pen.value(lambda t: t.dim() >= 1)
    dim = pen.axis(a)
    shape = list(pen.shape(a))
    form = pen.number(0, 5)
    if form == 0:
        index = pen.integers((pen.size(),), shape[dim])
        pen.write(f"{a}.index_select({dim}, {index})")
    elif form == 1:
        own = [size if i != dim else pen.size() for i, size in enumerate(shape)]
        if pen.number(0, 3) == 3:
            own = [max(1, size - 1) for size in own]
        index = pen.integers(tuple(own), shape[dim])
        pen.write(f"{a}.gather({dim}, {index})")
    elif form == 2:
        index = pen.integers(tuple(pen.size() for _ in range(pen.number(1, 2))), shape[dim])
        pen.write(f"{a}[{':, ' * dim}{index}]")
    elif form == 3:
        if len(shape) < 2:
            raise SkippedError
        wide = pen.size()
        one, two = pen.integers((wide,), shape[0]), pen.integers((wide,), shape[1])
        pen.write(f"{a}[{one}, {two}]")
    elif form == 4:
        pen.write(f"{a}[{':, ' * dim}torch.arange({shape[dim]} // 2 + 1)]")
    else:
        index = pen.whole(shape[dim], lambda t: 1 <= t.dim() <= 2)
        pen.write(f"{a}[{':, ' * dim}{index}]")


def attention(pen: Pen) -> None:
    a = pen.value(lambda t: 3 <= t.dim() <= 4)
    shape = pen.shape(a)
    # Made from one value: torch corrupts memory where sizes of keys and values differ.
    k, v = (pen.write(f"{a} * {pen.parameter(shape[-1])}") if pen.maybe() else a for _ in "kv")
    more = ""
    form = pen.number(0, 3)
    if form == 1:
        more = ", is_causal=True"
    elif form == 2:
        mask = pen.declare("given", shape[-2], shape[-2])
        more = f", attn_mask={mask}"
    elif form == 3:
        more = ", dropout_p=0.3"
    pen.write(f"F.scaled_dot_product_attention({a}, {k}, {v}{more})")


def self_attention(pen: Pen) -> None:
    """Write all of self-attention: a fused product, heads, attention, and back."""
    a = pen.value(lambda t: t.dim() == 3)
    length, width = pen.length(a, 1), pen.shape(a)[-1]
    count, each = pen.one((2, 3, 5, 4)), pen.one((2, 3, 4))
    inner = count * each
    fused = pen.write(f"F.linear({a}, {pen.parameter(3 * inner, width)})")
    pen.write(f"{fused}.chunk(3, dim=-1)", 3)
    q, k, v = (f"{fused_part}" for fused_part in list(pen.values)[-3:])
    parts = [
        pen.write(f"{part}.reshape({a}.size(0), {length}, {count}, {each}).transpose(1, 2)")
        for part in (q, k, v)
    ]
    y = pen.write(f"F.scaled_dot_product_attention({', '.join(parts)}, is_causal={pen.maybe()})")
    z = pen.write(f"{y}.transpose(1, 2).reshape({a}.size(0), {length}, {inner})")
    pen.write(f"F.linear({z}, {pen.parameter(width, inner)}) + {a}")


def perceptron(pen: Pen) -> None:
    a = pen.value(lambda t: t.dim() >= 1)
    width, inner = pen.shape(a)[-1], pen.one((4, 6, 10, 12))
    up = pen.write(f"F.linear({a}, {pen.parameter(2 * inner, width)})")
    if pen.maybe():
        gated = pen.write(f"F.glu({up}, -1)")
    else:
        one = pen.write(f"{up}.chunk(2, -1)", 2)
        other = list(pen.values)[-1]
        gated = pen.write(f"F.silu({one}) * {other}")
    pen.write(f"F.linear({gated}, {pen.parameter(width, inner)}, {pen.parameter(width)})")


def windows(pen: Pen) -> None:
    """Write a convolution or pooling."""
    a = pen.value(lambda t: 3 <= t.dim() <= 4 and t.shape[-1] >= 3 and t.shape[-2] >= 3)
    shape = pen.shape(a)
    plane = len(shape) - 2
    channels, wide = shape[1], pen.size()
    kernel = tuple(pen.number(1, 3) for _ in range(plane))
    n = f"{plane}d"
    form = pen.number(0, 6)
    if form == 0:
        pen.write(f"F.conv{n}({a}, {pen.parameter(wide, channels, *kernel)})")
    elif form == 1:
        w, b = pen.parameter(wide, channels, *kernel), pen.parameter(wide)
        pen.write(f"F.conv{n}({a}, {w}, {b}, padding='same')")
    elif form == 2:
        w = pen.parameter(channels * pen.number(1, 2), 1, *kernel)
        pen.write(f"F.conv{n}({a}, {w}, groups={channels}, padding=1)")
    elif form == 3:
        w = pen.parameter(channels, wide, *kernel)
        pen.write(f"F.conv_transpose{n}({a}, {w}, stride=2)")
    elif form == 4:
        pen.write(f"F.avg_pool{n}({a}, 2)")
    elif form == 5:
        pen.write(f"F.adaptive_avg_pool{n}({a}, 2)")
    else:
        pen.write(f"F.interpolate({a}, scale_factor=2.0)")


def dropped(pen: Pen) -> None:
    pen.write(f"F.dropout({pen.value()}, {pen.one((0.5, 0.25))})")


def constants(pen: Pen) -> None:
    a = pen.value(lambda t: t.dim() >= 1)
    dim = pen.axis(a)
    size = pen.length(a, dim)
    steps = f"torch.arange({size}, dtype=torch.float64)"
    tail = "[:, None]" * (dim == len(pen.shape(a)) - 2)
    texts = (
        f"torch.ones({size}, dtype=torch.float64) * 0.5", f"{steps} / 7",
        f"torch.full(({size}, 2), 0.25, dtype=torch.float64)",
        f"torch.ones({size}, {size}, dtype=torch.float64).tril() / {size}",
        f"{a} * {steps}{tail} / 5" if dim >= len(pen.shape(a)) - 2 else f"{a} / {size}",
        "torch.tensor([0.5, -0.25, 1.0], dtype=torch.float64)",
    )  # fmt: skip
    pen.write(pen.one(texts))


def unrecorded(pen: Pen) -> None:
    """Write a region in which no gradient is recorded."""
    a = pen.value()
    b = pen.write(f"{a}.detach().tanh()")
    pen.write(f"{a} * {b}")


def branched(pen: Pen) -> None:
    """Write a branch that depends on a size."""
    a = pen.value(lambda t: t.dim() >= 1)
    size = f"{a}.size({pen.axis(a)})"
    test = pen.one((f"{size} > 4", f"{size} % 2 == 0", f"{size} == 3"))
    pen.write(f"{a} * 2 if {test} else {a} * 3")


LAYERS = (
    perceptron, embedded, looked_up, self_attention, attention, windows, dropped, constants,
    unrecorded, branched,
)  # fmt: skip


def squares(pen: Pen) -> str:
    a = pen.value()
    return pen.write(f"({a} * {a}).sum()")


def classes(pen: Pen) -> str:
    """Write a cross-entropy of any kind."""
    a = pen.value(lambda t: t.dim() >= 2 and t.shape[-1] > 1)
    shape = pen.shape(a)
    count = shape[-1]
    labels = pen.integers(shape[:-1], count)
    flat = f"{a}.reshape(-1, {count})" if len(shape) != 2 or pen.maybe() else a
    label = labels if flat == a else f"{labels}.reshape(-1)"
    first = int(pen[labels].flatten()[0])
    more = ["", ", reduction='sum'", ", label_smoothing=0.1"]
    if bool((pen[labels] != first).any()):
        more.append(f", ignore_index={first}")
    if pen.number(0, 4) == 4:
        each = pen.write(f"F.cross_entropy({flat}, {label}, reduction='none')")
        return pen.write(f"{each}.mean()")
    return pen.write(f"F.cross_entropy({flat}, {label}{pen.one(more)})")


def distances(pen: Pen) -> str:
    a = pen.value()
    b = pen.declare(pen.one(("given", "parameter")), *pen.shape(a))
    way = pen.one(("mean", "sum"))
    name = pen.one(("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss"))
    other = f"{a}.sigmoid().detach()"
    texts = (
        f"F.{name}({a}, {b}, reduction='{way}')",
        f"F.binary_cross_entropy_with_logits({a}, {other}, reduction='{way}')",
        f"F.kl_div({a}, {other}, reduction='{way}')",
    )
    return pen.write(pen.one(texts))


def likelihood(pen: Pen) -> str:
    a = pen.value(lambda t: t.dim() == 2 and t.shape[-1] > 1)
    labels = pen.integers(pen.shape(a)[:1], pen.shape(a)[-1])
    return pen.write(f"F.nll_loss({a}.log_softmax(-1), {labels})")


def means(pen: Pen) -> str:
    a = pen.value(lambda t: math.prod(t.shape) > 1)
    return pen.write(f"{a}.square().mean()")


LOSSES = (squares, classes, distances, means, likelihood)
