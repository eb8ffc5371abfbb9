"""Steps of random programs: views, cuts, joins, and writes in place."""

from __future__ import annotations

import math

from fuzz_pen import MOST_ELEMENTS, Pen, SkippedError

__all__ = ["VIEWS"]


def factors(pen: Pen, count: int) -> list[int]:
    """Draw numbers whose product is `count`."""
    made: list[int] = []
    while count > 1 and len(made) < 3:
        own = pen.one(n for n in range(2, count + 1) if count % n == 0)
        made.append(own)
        count //= own
    return [*made, count] if count > 1 or not made else made


def reshape(pen: Pen) -> None:
    """Merge and divide dims, any of them or all but the first ones."""
    a = pen.value(lambda t: t.dim() >= 1)
    shape = pen.shape(a)
    form = pen.number(0, 4)
    kept = pen.number(0, len(shape) - 1)
    heads = [pen.length(a, dim) for dim in range(kept)]
    rest = math.prod(shape[kept:])
    if form == 0:
        own = ", ".join(map(str, (*heads, *factors(pen, rest))))
        pen.write(f"{a}.{pen.one(('reshape', 'contiguous().view'))}({own})")
    elif form == 1:
        pen.write(f"{a}.flatten({kept})")
    elif form == 2:
        dim = pen.axis(a)
        own = ", ".join(map(str, factors(pen, shape[dim])))
        pen.write(f"{a}.unflatten({dim}, ({own},))")
    elif form == 3:
        merged = " * ".join(heads) or "1"
        pen.write(f"{a}.reshape({merged}, -1)")
    else:
        before = heads[: max(kept - 1, 0)]
        last = pen.length(a, len(shape) - 1)
        pen.write(f"{a}.reshape({', '.join((*before, '-1', last))})")


def heads(pen: Pen) -> None:
    """Divide a dim and bring one part forward, and maybe back, as attention does."""
    a = pen.value(lambda t: t.dim() >= 2 and t.shape[-1] > 3)
    shape = pen.shape(a)
    count = pen.one(n for n in range(2, shape[-1]) if shape[-1] % n == 0)
    width = "-1" if pen.maybe() else shape[-1] // count
    b = pen.write(f"{a}.unflatten(-1, ({count}, {width})).transpose(-2, -3)")
    if pen.maybe():
        pen.write(f"{b}.tanh().transpose(-2, -3).flatten(-2)")


def transposed(pen: Pen) -> None:
    a = pen.value(lambda t: t.dim() >= 2)
    one, two = pen.axis(a), pen.sign(pen.axis(a), a)
    order = pen.order(len(pen.shape(a)))
    texts = (
        f"{a}.transpose({one}, {two})", f"{a}.permute({', '.join(map(str, order))})",
        f"{a}.movedim({one}, {two})", f"{a}.swapaxes({one}, {two})", f"{a}.mT",
    )  # fmt: skip
    pen.write(pen.one(texts))


def ones(pen: Pen) -> None:
    """Add, drop or repeat dims of size 1."""
    a = pen.value()
    dim = pen.number(0, len(pen.shape(a)))
    form = pen.number(0, 2)
    if form == 0:
        pen.write(f"{a}.unsqueeze({dim})")
    elif form == 1:
        pen.write(f"{a}.squeeze({pen.one((*range(len(pen.shape(a))), ''))})")
    else:
        sizes = [pen.length(a, i) for i in range(len(pen.shape(a)))]
        times = str(pen.number(2, 6))
        pen.write(f"{a}.unsqueeze({dim}).expand({', '.join((*sizes[:dim], times, *sizes[dim:]))})")


def repeated(pen: Pen) -> None:
    a = pen.value(lambda t: t.dim() >= 1)
    counts = [pen.number(1, 3) for _ in pen.shape(a)]
    extra = [pen.number(1, 3)] if pen.maybe() else []
    if math.prod((*counts, *extra, *pen.shape(a))) > MOST_ELEMENTS:
        raise SkippedError
    dim = pen.axis(a)
    times = ", ".join(map(str, (*extra, *counts)))
    each = f"{a}.repeat_interleave({pen.number(2, 3)}, {dim})"
    texts = (f"{a}.repeat({times})", f"{a}.tile({times})", each)
    pen.write(pen.one(texts))


def cut(pen: Pen) -> None:
    a = pen.value(lambda t: t.dim() >= 1 and max(t.shape) > 1)
    dim = pen.axis(a, lambda size: size > 1)
    size = pen.shape(a)[dim]
    at = pen.sign(dim, a)
    form = pen.number(0, 6)
    if form == 0:
        count = pen.one(n for n in range(2, min(size, 5) + 1) if size % n == 0 or n < 3)
        pen.write(f"{a}.chunk({count}, dim={at})", count)
    elif form == 1:
        first = pen.number(1, size - 1)
        pen.write(f"{a}.split(({first}, {size - first}), dim={at})", 2)
    elif form == 2:
        part = pen.number(max(1, -(-size // 5)), size - 1)
        pen.write(f"{a}.split({part}, dim={at})", -(-size // part))
    elif form == 3:
        if size > 6:
            raise SkippedError
        pen.write(f"{a}.unbind({at})", size)
    elif form == 4:
        pen.write(f"{a}.select({at}, {pen.number(0, size - 1)})")
    elif form == 5:
        start = pen.number(0, size - 2)
        pen.write(f"{a}.narrow({at}, {start}, {pen.number(1, size - start)})")
    else:
        colons = ":, " * dim
        texts = ("1:", "::2", ":-1", "1::2", f"{size // 2}:", ":1")
        pen.write(f"{a}[{colons}{pen.one(texts)}]")


def joined(pen: Pen) -> None:
    a = pen.value(lambda t: t.dim() >= 1)
    dim = pen.axis(a)
    shape = pen.shape(a)
    form = pen.number(0, 2)
    if form == 0:
        b = pen.value(lambda t: t.shape == shape)
        parts = (a, b, a) if pen.maybe() else (a, b)
        pen.write(f"torch.cat(({', '.join(parts)}), {pen.sign(dim, a)})")
    elif form == 1:
        b = pen.value(
            lambda t: (
                t.dim() == len(shape)
                and all(i == dim or s == shape[i] for i, s in enumerate(t.shape))
            )
        )
        pen.write(f"torch.cat(({a}, {b}), {dim})")
    else:
        b = pen.value(lambda t: t.shape == shape)
        pen.write(f"torch.stack(({a}, {b}), {pen.number(0, len(shape))})")


def bordered(pen: Pen) -> None:
    a = pen.value(lambda t: t.dim() >= 1)
    form = pen.number(0, 3)
    if form == 0:
        pen.write(f"F.pad({a}, ({pen.number(0, 2)}, {pen.number(0, 2)}))")
    elif form == 1:
        pen.write(f"F.pad({a}, (1, 2), value=0.5)")
    elif len(pen.shape(a)) < 2:
        raise SkippedError
    elif form == 2:
        pen.write(f"{a}.{pen.one(('tril', 'triu'))}({pen.number(-1, 1)})")
    else:
        pen.write(pen.one((f"{a}.diagonal()", f"{a}.unfold(-1, {min(2, pen.shape(a)[-1])}, 1)")))


def written(pen: Pen) -> None:
    """Write in place: a value of the program, or a buffer, gets new numbers under its old name."""
    form = pen.number(0, 5)
    a = pen.value()
    b = pen.write(f"{a} * 1.25")
    texts = (f"{b}.add_({a})", f"{b}.mul_(0.5)", f"{b}.tanh_()", f"{b}.sub_({a}, alpha=0.5)")
    if form < 4:
        pen.change(texts[form], b)
    elif form == 4:
        view = pen.write(f"{b}.unsqueeze(0)")
        pen.change(f"{view}.add_(1.0)", view, b)
    else:
        shape = pen.shape(a)
        kept = pen.declare("buffer", *shape)
        verb = pen.one((f"add_({a}.detach())", f"copy_({a}.detach())", "mul_(0.5)", "add_(1.0)"))
        pen.change(f"{kept}.{verb}", kept)


def written_into(pen: Pen) -> None:
    """Write to a view of a value; both are read later."""
    a = pen.value(lambda t: t.dim() >= 1)
    b = pen.write(pen.one((f"{a} * 1.25", f"torch.zeros_like({a})", f"{a}.clone()")))
    shape = pen.shape(b)
    dim = pen.axis(b)
    colons, size = ":, " * dim, shape[dim]
    at = pen.number(0, size - 1)
    texts = (
        f"{b}[{colons}{at}]", f"{b}[{colons}{size // 2}:]", f"{b}.transpose(0, -1)",
        f"{b}.narrow({dim}, 0, {max(1, size // 2)})", f"{b}.select({dim}, {at})",
        f"{b}.view(-1)[1:]", f"{b}[{colons}::2]", f"{b}.unsqueeze(0)", f"{b}.chunk(2, {dim})[0]",
        f"{b}.flatten()", f"{b}.diagonal()" if len(shape) == 2 else f"{b}.squeeze()",
    )  # fmt: skip
    form = pen.number(0, 3)
    if form == 0:
        rest = [size for i, size in enumerate(shape) if i != dim]
        c = pen.parameter(*rest[pen.number(0, len(rest)) :])
        pen.change(f"{b}[{colons}{at}] = {c}", b)
        return
    if form == 1:
        pen.change(f"{b}[{colons}{pen.one((':1', '1:', '::2'))}] = 0.5", b)
        return
    view = pen.write(pen.one(texts))
    verb = pen.one(
        ("mul_(0.5)", "add_(1.0)", "tanh_()", "zero_()", "fill_(0.25)", "sub_(0.5).square_()")
    )
    line = f"{view}.{verb}"
    if form == 3 and pen.maybe():
        line = f"with torch.no_grad(): {line}"
    pen.change(line, view, b)


def filled(pen: Pen) -> None:
    """Write at places that another tensor tells."""
    a = pen.value(lambda t: t.dim() >= 1)
    b = pen.write(f"{a} * 1.25")
    shape, dim = pen.shape(b), pen.axis(b)
    form = pen.number(0, 3)
    if form == 0:
        pen.change(f"{b}.masked_fill_({pen.truths(shape)}, 0.5)", b)
    elif form == 1:
        index = pen.integers((2,), shape[dim])
        own = [size if i != dim else 2 for i, size in enumerate(shape)]
        pen.change(f"{b}.index_add_({dim}, {index}, {pen.parameter(*own)})", b)
    elif form == 2:
        index = pen.integers(shape, shape[dim])
        pen.change(f"{b}.scatter_add_({dim}, {index}, {pen.parameter(*shape)})", b)
    else:
        pen.change(f"{b}[{pen.declare('truths', *shape)}] = 0.5", b)


VIEWS = (
    reshape, transposed, heads, cut, joined, ones, repeated, bordered, written, written_into,
    filled,
)  # fmt: skip
