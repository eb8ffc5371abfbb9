"""Closed forms as texts in the units of the papers: "4 all-reduces of 2 b s h bytes"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import sympy

from autoparallel.analysis.closed_forms import closed_forms
from autoparallel.analysis.module_forms import AMOUNTS, HANDED, ClosedForms, Form, Sent
from autoparallel.plan import Plan
from autoparallel.view.folded_rows import fold
from autoparallel.view.size_names import size_names
from autoparallel.view.words import collective_text

__all__ = ["expression_text", "forms_text", "plan_forms_text"]

_MOST_PATHS = 3  # modules that a title names
_WORDS = {
    "flops": "FLOPs forward",
    "backward_flops": "FLOPs backward",
    "parameters": "bytes of parameters",
    "gradients": "bytes of gradients",
    "optimizer_state": "bytes of optimizer state",
    "activations": "bytes of saved activations",
    "handed_on": "bytes sent to the next stage",
    "handed_back": "bytes sent to the stage before",
}


def plan_forms_text(plan: Plan, names: Mapping[int, str] | None = None) -> str:
    """Return the closed forms of a plan as text.

    plan: it needs its graph, which a plan that was read from JSON lacks. names: letters for fixed
    sizes, as {12288: "h"}; without it letters are chosen. Raises PlanError for a plan without its
    graph.

    Example: print(plan_forms_text(plan, names={12288: "h"}))
    """
    return forms_text(closed_forms(plan, names=names), plan)


def forms_text(forms: ClosedForms, plan: Plan) -> str:
    """Return closed forms as text: of each repeated module, of the rest, and of the whole step.

    forms: of the plan. plan: gives the title, and the names that a reader knows for sizes. Below
    the title stand the sizes that were planned for, for each letter that occurs.

    Example: print(forms_text(autoparallel.closed_forms(plan), plan))
    """
    total = forms.total
    used = {symbol for amount in _expressions(total) for symbol in amount.free_symbols}
    values = {symbol.name: size for symbol, size in forms.algebra.values.items() if symbol in used}
    names = size_names(plan.inputs)
    called = {
        symbol.name: f" ({names[str(dim)]})"
        for dim, symbol in reversed(forms.algebra.renamed.items())
        if str(dim) in names
    }
    sizes = ", ".join(f"{name} = {size}{called.get(name, '')}" for name, size in values.items())
    lines = [
        f"Closed forms of {plan.model} on {plan.mesh}, on the busiest rank, for one step",
        f"planned for {sizes}",
    ]
    for form in (*forms.forms, total):
        whole = "total" if plan.pipeline is None else "total of one rank of each stage"
        lines += ["", whole if form is total else _title(form)]
        lines += [f"  {line}" for line in _rows(form, tuple(values))]
    return "\n".join(lines) + "\n"


def _expressions(form: Form) -> list[sympy.Expr]:
    """Return all amounts of a form."""
    return [
        *(sent.nbytes for sent in form.sent),
        *(getattr(form, name) for name in (*AMOUNTS, *HANDED)),
    ]


def _title(form: Form) -> str:
    """Name the modules that a form is of, equal layers as one."""
    rows = [row.path for row in fold((path, "", path) for path in form.paths if path)]
    names = ", ".join(rows[:_MOST_PATHS]) + (", ..." if len(rows) > _MOST_PATHS else "")
    if "" in form.paths:
        names = f"{names}, and what is in no repeated module" if names else "the rest"
    return f"{names} (each of {form.count})" if form.count > 1 else names


def _rows(form: Form, order: Sequence[str]) -> list[str]:
    """Tell what a form sends, computes and holds; equal collectives of all phases in one line.

    order: the names of symbols, in the order in which products name them.
    """

    def text(expression: sympy.Expr) -> str:
        return expression_text(expression, order)

    alike: dict[Sent, dict[str, int]] = {}
    for sent in form.sent:
        key = replace(sent, phase="", count=0)
        alike.setdefault(key, {})[sent.phase] = sent.count
    rows = []
    for sent, counts in alike.items():
        count, name = sum(counts.values()), collective_text(sent.collective)
        row = (
            f"{count} {name}{'s' if count > 1 else ''} of {text(sent.nbytes)} bytes on {sent.axis}"
        )
        if sent.kernel:
            row += f", in {sent.kernel}"
        elif len(counts) > 1:
            row += f": {', '.join(f'{number} {phase}' for phase, number in counts.items())}"
        else:
            row += f", {next(iter(counts))}"
        rows.append(row + (", together" if sent.together else ""))
    for name in (*AMOUNTS, *HANDED):
        if (amount := getattr(form, name)) != 0:
            rows.append(f"{_WORDS[name]}: {text(amount)}")
    return rows


def expression_text(expression: sympy.Expr, order: Sequence[str] = ()) -> str:
    """Write an expression as a person does: common factors first, no signs between factors.

    order: names of symbols, in the order in which products name them; all others follow.

    >>> b, s, h, tp = sympy.symbols("b s h tp", positive=True)
    >>> expression_text(10 * b * s * h + 24 * b * s * h / tp, ["b", "s", "h"])
    '2 b s h (5 + 12/tp)'
    """
    terms = sympy.Add.make_args(sympy.expand(sympy.sympify(expression)))
    if len(terms) == 1:
        return _product(terms[0], order)
    common = _common(terms)
    inner = [_product(term / common, order) for term in _by_weight(terms)]
    text = " + ".join(inner).replace("+ -", "- ")
    if common == 1:
        return text
    above, below = common.as_numer_denom()
    text = f"({text})" if above == 1 else f"{_product(above, order)} ({text})"
    return text if below == 1 else text + _product(1 / below, order).removeprefix("1")


def _by_weight(terms: Sequence[sympy.Expr]) -> list[sympy.Expr]:
    """Sort terms: the highest degree first, which is the largest term of a large model."""

    def weight(term: sympy.Expr) -> tuple[float, float, bool, str]:
        powers = [float(power) for base, power in term.as_powers_dict().items() if base.is_Symbol]
        above = sum(power for power in powers if power > 0)
        return -above, above - sum(powers), bool(term.could_extract_minus_sign()), str(term)

    return sorted(terms, key=weight)


def _common(terms: Sequence[sympy.Expr]) -> sympy.Expr:
    """Return the common factor of terms: a number, and whole powers of symbols."""
    factors = [term.as_powers_dict() for term in terms]
    common = sympy.gcd_list([term.as_coeff_Mul()[0] for term in terms])
    for base in sorted(factors[0], key=str):
        powers = [sympy.sympify(powers_of.get(base, 0)) for powers_of in factors]
        if base.is_Symbol and all(power.is_Integer for power in powers):
            # A symbol above in all terms is taken out once, one below in all as well: 1/tp.
            common *= base ** (min(powers) if min(powers) > 0 else min(max(powers), 0))
    return common


def _product(term: sympy.Expr, order: Sequence[str]) -> str:
    """Write a product of a number and powers: "2 b s h^2/(3 tp)"."""
    number, rest = term.as_coeff_Mul()
    above: list[str] = []
    below: list[str] = []
    if number.q != 1:
        below.append(str(number.q))

    def place(factor: tuple[sympy.Expr, sympy.Expr]) -> tuple[int, str]:
        name = str(factor[0])
        return (order.index(name) if name in order else len(order)), name

    for base, power in sorted(rest.as_powers_dict().items(), key=place):
        if base == 1:
            continue
        name = base.name if base.is_Symbol else f"({base})"
        if isinstance(base, sympy.ceiling):
            name = f"ceil({expression_text(base.args[0], order)})"
        size = abs(power)
        (above if power > 0 else below).append(name if size == 1 else f"{name}^{size}")
    if abs(number.p) != 1 or not above:
        above.insert(0, str(abs(number.p)))
    text = ("-" if number.p < 0 else "") + " ".join(above)
    if below:
        text += "/" + (below[0] if len(below) == 1 else f"({' '.join(below)})")
    return text
