"""The rule of routed experts: tokens are free, experts and their inner dim can be split."""

from __future__ import annotations

from autoparallel.graph.graph import Dim, numel_hint
from autoparallel.graph.row_program import LOOKUP, PRODUCT
from autoparallel.placement import Collective, Partial
from autoparallel.rules.inner_split import (
    LINEAR_STEPS,
    SUM_STEPS,
    VIEW_STEPS,
    ExpertShapes,
    InnerSplit,
    inner_split,
)
from autoparallel.rules.inner_work import InnerProduct, InnerWork
from autoparallel.rules.registry import rule
from autoparallel.rules.rule import Dims, Exchange, Kernel, Loops, OpCall, ShardingRule

_PARTIAL = Partial()


@rule("autoparallel.routed_experts.default")
def routed_experts(call: OpCall) -> ShardingRule:
    """y[b.., h] = sum_k f(x[b.., :], c[b.., k], w[c[b.., k], ..]), f being what an expert does.

    Tokens b are free. Experts e can be split in two ways: all ranks see all tokens and add up what
    their experts make of them, or the tokens are split as well, and each is sent to the ranks whose
    experts it chose. The inner dim f of the experts' products is split column-, then row-parallel.
    """
    shapes = ExpertShapes(call)
    experts = call.operands[len(shapes.rows)]
    batch = experts.shape[:-1]
    tokens = tuple(f"b{at}" for at, size in enumerate(batch) if size != 1)
    leading: Dims = tuple((f"b{at}",) if size != 1 else () for at, size in enumerate(batch))
    sizes: dict[str, Dim] = {f"b{at}": size for at, size in enumerate(batch) if size != 1}
    count = shapes.count
    expert: Loops = ("e",) if count > 1 else ()
    if expert:
        sizes["e"] = count
    inner = inner_split(shapes)
    if inner is not None:
        sizes["f"] = inner.size
    tables: list[Dims] = []
    for at, table in enumerate(shapes.tables):
        dims: list[Loops] = [expert, *[()] * (len(table.shape) - 1)]
        if inner is not None and at in inner.tables:
            dim, blocks, unit = inner.tables[at]
            names = (("outer", blocks), ("f", inner.size), ("inner", unit))
            loops = tuple(f"{name}{at}" if name != "f" else name for name, n in names if n > 1)
            sizes |= {f"{name}{at}": n for name, n in names if name != "f" and n > 1}
            dims[dim] = loops
        tables.append(tuple(dims))
    operands = (
        *(_behind(leading, value.shape) for value in shapes.rows),
        (*leading, ()),
        *(_behind(leading, value.shape) for value in shapes.values),
        *tables,
        *(((),) * len(value.shape) for value in shapes.plain),
    )
    kernels = {}
    exchanges = {}
    if expert:
        kernels["e"] = Kernel("experts_summed", _PARTIAL, arguments=(("count", count),), wraps=True)
        exchanges["e"] = Exchange(_exchange(call, shapes), tokens)
    if inner is not None and inner.once:
        kernels["f"] = Kernel(
            "experts_inner", _PARTIAL, arguments=(("once", inner.once),), wraps=True
        )
    result = _behind(leading, call.results[0].shape)
    whole = {name for name in sizes if name.startswith(("outer", "inner"))}
    work = _work(shapes, tokens, inner)
    points = numel_hint(tuple(sizes.values()))
    return ShardingRule(
        operands,
        (result,),
        sizes,
        whole=frozenset(whole),
        kernels=kernels,
        flops=2 * sum(each.points for each in work.products) / max(points, 1),
        exchanges=exchanges,
        inner=work,
    )


def _behind(leading: Dims, shape: tuple[Dim, ...]) -> Dims:
    """Return the loops of a tensor that has the tokens' dims and others behind them."""
    return (*leading, *[()] * (len(shape) - len(leading)))


def _exchange(call: OpCall, shapes: ExpertShapes) -> Kernel:
    """Return the kernel that sends tokens to their experts, with what it sends.

    A token goes once to each rank that it chose experts of; its rows return. The backward pass
    sends as much again.
    """
    sent = (*shapes.rows, *shapes.values)
    gradients = [value for value in sent if value.requires_grad]
    result = call.results[0]
    there = sum(numel_hint(value.shape) * value.dtype.itemsize for value in sent)
    again = sum(numel_hint(value.shape) * value.dtype.itemsize for value in gradients)
    back = numel_hint(result.shape) * result.dtype.itemsize
    # The numbers of tokens, and the chosen experts with their ranks.
    small = shapes.tokens * shapes.choices * 16
    kinds = [there, back, small, *([back] if result.requires_grad else []), again]
    return Kernel(
        "experts_exchanged",
        _PARTIAL,
        collectives=tuple((Collective.ALL_TO_ALL, nbytes) for nbytes in kinds if nbytes),
        arguments=(("count", shapes.count),),
        wraps=True,
        routed=(shapes.choices, shapes.count),
        moved=2 * there + 2 * back,
    )


def _work(shapes: ExpertShapes, tokens: Loops, inner: InnerSplit | None) -> InnerWork:
    """Return the products of sorted rows, and the bytes of everything else."""
    split = inner.tables if inner is not None else {}
    per_expert = shapes.tokens * shapes.choices / shapes.count
    products = []
    rows = shapes.tokens * shapes.choices
    moved: list[tuple[float, float, Loops]] = []
    loops = (*tokens, *(("e",) if shapes.count > 1 else ()))
    for step in shapes.program.steps:
        if step.target == PRODUCT:
            table = int(step.args[1].name.removeprefix("table"))
            (_, depth), (_, columns) = (
                shapes.shapes[name] for name in (step.args[0].name, step.makes[0])
            )
            transposed = step.args[2:] == (True,)
            at = split.get(table, (0, 1, 1))[0]
            column_dim = 1 if transposed else 2
            products.append(
                InnerProduct(
                    rows=per_expert,
                    row_loops=tokens,
                    groups=shapes.count,
                    group_loop="e",
                    columns=columns,
                    column_loop="f" if at == column_dim else "",
                    depth=depth,
                    depth_loop="f" if at and at != column_dim else "",
                    itemsize=shapes.tables[table].dtype.itemsize,
                )
            )
            continue
        if step.target in ("aten.chunk.default", "aten.slice.Tensor", *VIEW_STEPS):
            continue  # views
        # Backward, gradients are read and written, and operands where the step is not linear.
        reads = sum(shapes.nbytes[name] for name in step.reads() if not name.startswith("table"))
        nbytes = reads + sum(shapes.nbytes[name] for name in step.makes)
        again = nbytes + (0 if step.target in (LOOKUP, *SUM_STEPS, *LINEAR_STEPS) else reads)
        wide = inner is not None and len(shapes.shapes[step.makes[0]]) > 1
        wide = wide and shapes.shapes[step.makes[0]][-1] % inner.size == 0  # type: ignore[union-attr]
        shared = (*loops, *(("f",) if wide else ()))
        moved.append((rows * nbytes, rows * again, shared))
    # Gathered from the tokens, and put back and added up.
    gathered = sum(shapes.nbytes[f"row{at}"] for at in range(len(shapes.rows)))
    nbytes = rows * (2 * gathered + 3 * shapes.nbytes[shapes.program.result])
    moved.append((nbytes, nbytes, loops))
    return InnerWork(tuple(products), tuple(moved))
