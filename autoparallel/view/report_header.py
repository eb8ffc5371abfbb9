"""The first lines of a plan's report: what it is for, what it costs, what it leaves idle."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from autoparallel.analysis.idle_ranks import idle_ranks
from autoparallel.placement import Invariant, Layout
from autoparallel.plan import Plan
from autoparallel.support.units import bytes_text, seconds_text
from autoparallel.view.folded_rows import fold
from autoparallel.view.size_names import assumed_text, returned_text
from autoparallel.view.words import Words, kind_of

__all__ = ["report_header"]


def report_header(plan: Plan, words: Words) -> Table:
    """Tell what was planned for, what the plan costs, and how near the optimum it is."""
    ranks = f"{plan.world_size} rank{'s' if plan.world_size > 1 else ''}"
    gap = plan.cost - plan.lower_bound
    share = gap / plan.lower_bound if plan.lower_bound else 0.0
    bound = f"lower bound {plan.lower_bound:.6g}, gap {share:.2%}"
    options = plan.options
    allowed = [
        name.replace("_", " ")
        for name in ("sequence_parallel", "data_parallel")
        if getattr(options, name)
    ]
    rows = [
        ("model", plan.model),
        ("mesh", f"{plan.whole_mesh}, {ranks}"),
        *((("pipeline", str(plan.pipeline)),) if plan.pipeline is not None else ()),
        ("hardware", plan.hardware),
        ("allowed", ", ".join(allowed) or "no splits of batch or sequence"),
        ("planned for", _planned_for(plan)),
        ("predicted", f"{seconds_text(plan.step)} a step{_least(plan)}"),
        ("sum", f"cost {plan.cost:.6g} without overlap, {bound}"),
        ("method", plan.method),
        *_excess(plan),
        *_recomputed(plan),
        *_waiting(plan),
        *_idle(plan),
        ("returns", returned_text(plan, (_returned(words, layout) for layout in plan.outputs))),
    ]
    if plan.breaks:
        rows[-1] = ("returns", "what its Python returns, whole")
    if plan.product_weight != 1:
        rows.append(
            (
                "product weight",
                f"{plan.product_weight:g}: the model is so small that leaving it whole would be "
                "the fastest on this hardware. To split it all the same, a second of matrix "
                f"products counts {plan.product_weight:g} seconds in the cost (not in the "
                "predicted time).",
            )
        )
    rows += [
        ("split", f"{plan.split_flops:.1%} of the FLOPs of matrix products"),
        ("", f"{plan.split_parameter_bytes:.1%} of the bytes of parameter matrices"),
    ]
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def _least(plan: Plan) -> str:
    """Tell how near the step is to the least of all plans."""
    if not plan.step_bound:
        return ""
    return f"; no plan's is below {seconds_text(plan.step_bound)}: {plan.step_proof}"


def _excess(plan: Plan) -> list[tuple[str, str]]:
    """Tell where a plan takes more memory than a device has."""
    if not plan.excess_nbytes:
        return []
    device, limit = bytes_text(plan.device_nbytes), plan.device_nbytes // 2**20
    return [
        (
            "DOES NOT FIT",
            f"a rank takes {bytes_text(plan.excess_nbytes)} more than the {device} of a device; "
            f'with memory_limit="{limit}MiB" a plan that fits is looked for',
        )
    ]


def _planned_for(plan: Plan) -> str:
    """Tell the sizes that were planned for; older texts of plans do not have them."""
    if plan.inputs:
        return assumed_text(plan.inputs)
    if plan.options.tokens > 1:
        return f"inputs of at least {plan.options.tokens} elements"
    return "inputs as large as the example inputs"


def _recomputed(plan: Plan) -> list[tuple[str, str]]:
    """Tell which blocks are recomputed in the backward pass, or why none is where it was asked."""
    rows = fold((path, mode, mode) for path, mode in plan.recompute if mode != "none")
    text = ", ".join(f"{row.path} ({row.first})" for row in rows)
    if text:
        chosen = ", as the model asks" if plan.options.recompute == "model" else ""
        return [("recomputed", f"in the backward pass{chosen}: {text}")]
    lacking = {"full": "", "selective": " and has products of activations"}
    if plan.options.recompute not in lacking or plan.breaks:
        return []
    return [("recomputed", f"nothing: no block is repeated{lacking[plan.options.recompute]}")]


def _waiting(plan: Plan) -> list[tuple[str, str]]:
    """Tell where less of the communication is hidden for want of memory."""
    if plan.fills_gaps:
        return []
    return [
        (
            "overlap",
            "gradients of weights hide the collectives of their own inputs alone, for want of "
            "memory to keep what they are computed of until those of other layers",
        )
    ]


def _idle(plan: Plan) -> list[tuple[str, str]]:
    """Tell where ranks hold nothing of a value, and so have nothing to do for it."""
    idle = idle_ranks(plan)
    if idle is None:
        return []
    sizes = "the cost counts the busiest rank" if idle.planned else "at the sizes given"
    return [
        (
            "idle",
            f"{idle.ranks} of {plan.world_size} ranks hold nothing of {idle.value}, whose dim "
            f"{idle.dim} has {idle.size} element{'s' if idle.size > 1 else ''}: {sizes}; fewer "
            "ranks would be as fast there",
        )
    ]


def _returned(words: Words, layout: Layout) -> str:
    """Say how one returned tensor lies."""
    return "whole" if kind_of(layout) is Invariant else f"split as {words.layout(layout)}"
