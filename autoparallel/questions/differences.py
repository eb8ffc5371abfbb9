"""In what two plans differ: every decision that is another one, and the seconds that it changes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

from autoparallel.analysis.communication import collective_totals
from autoparallel.plan import Conversion, OpChoice, ParameterChoice, Plan
from autoparallel.support.arguments import MAKE_ONE, require_kind
from autoparallel.support.units import bytes_text, seconds_text
from autoparallel.view.folded_rows import fold
from autoparallel.view.words import Words, collective_text

__all__ = ["Comparison", "Difference", "compare", "differences", "require_comparable"]

_SHOWN = 20
_NUMBER = re.compile(r"_?\d+")
# The rows of a plan are added up in another order than its total.
_ROUNDING = 1e-9

Choice = OpChoice | ParameterChoice | Conversion


@dataclass(frozen=True)
class Difference:
    """A Difference is one decision in which two plans differ.

    kind: "op", "parameter", "redistribution" or "update" (of all parameters together). name: of
    the op, the parameter's path, or the value that is redistributed. where: the path of its module.
    line: of the user's source. first, second: the decision in words in either plan, "" where there
    is none. seconds: by how much the second plan spends more on it; all differences add up to that
    of the plans' predicted seconds.
    """

    kind: str
    name: str
    where: str
    line: str
    first: str
    second: str
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """A Comparison has two plans side by side; print it to read it.

    first, second: the plans. names: what they are called. differences: the decisions that differ.
    """

    first: Plan
    second: Plan
    names: tuple[str, str]
    differences: tuple[Difference, ...]

    def __str__(self) -> str:
        """Return the totals side by side, and the differing decisions, those that matter first."""
        rows = [("", *self.names), *self._totals()]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
                 for row in rows]  # fmt: skip
        return "\n".join([*lines, "", *self._decisions()])

    def _totals(self) -> list[tuple[str, str, str]]:
        """Return rows of what both plans take."""
        both = (self.first, self.second)
        rows = [
            ("model", *(plan.model for plan in both)),
            ("mesh", *(str(plan.mesh) for plan in both)),
            ("hardware", *(plan.hardware for plan in both)),
            ("step, predicted", *(seconds_text(plan.step) for plan in both)),
            ("memory", *(bytes_text(sum(n for _, n in plan.memory)) for plan in both)),
            ("products split", *(f"{plan.split_flops:.1%}" for plan in both)),
            ("matrices split", *(f"{plan.split_parameter_bytes:.1%}" for plan in both)),
        ]
        sent = [_collectives(plan) for plan in both]
        for name in dict.fromkeys([*sent[0], *sent[1]]):
            rows.append((name, *(one.get(name, "none") for one in sent)))
        return [(name, one, other) for name, one, other in rows]

    def _decisions(self) -> list[str]:
        """Return a line for each decision that differs, repeated blocks folded."""
        if not self.differences:
            return ["no decision differs"]
        lines = [f"{self.names[1]} in place of {self.names[0]}, by what it adds to a step:"]
        lines += difference_lines(self.differences, _SHOWN)
        total = self.second.seconds - self.first.seconds
        return [*lines, f"{signed(total):>11}  in all"]


def compare(first: Plan, second: Plan, names: tuple[str, str] = ("first", "second")) -> Comparison:
    """Return two plans side by side: what they take, and every decision that differs.

    first, second: plans of one model, for other meshes, options or sizes. They may have been read
    from JSON. names: what they are called in the text.

        >>> import autoparallel, torch
        >>> layer, inputs = torch.nn.Linear(64, 64, bias=False), torch.ones(8, 64)
        >>> plan = autoparallel.make_plan(layer, 2, example_inputs=inputs)
        >>> pins = {"weight": autoparallel.Shard(1)}
        >>> other = autoparallel.make_plan(layer, 2, example_inputs=inputs, pins=pins)
        >>> both = autoparallel.compare(plan, other)
        >>> [(row.kind, row.name, row.first, row.second) for row in both.differences][0]
        ('parameter', 'weight', 'S(0), column: output dim', 'S(1), row: input dim')

    Raises AutoParallelError for what is no plan.
    """
    for plan in (first, second):
        require_kind(plan, Plan, MAKE_ONE)
        require_comparable(plan)
    return Comparison(first, second, names, differences(first, second))


def require_comparable(plan: Plan) -> None:
    """Raise PlanError for a plan with stages, of which no decisions are compared.

    Example: `require_comparable(plan)`
    """
    plan.refuse_stages(
        "a comparison of decisions",
        fix="compare timeline(plan), which is of whole steps; or plans without pp in the mesh",
    )


def differences(first: Plan, second: Plan) -> tuple[Difference, ...]:
    """Return every decision in which two plans differ, in the order of the model.

    Decisions of the same name are compared; what only one of the plans has is a difference too.

    Example: `sum(row.seconds for row in differences(plan, other))`
    """
    rows: list[Difference] = []
    told = [_Told(plan) for plan in (first, second)]
    for one, other in _pairs(told[0].parameters, told[1].parameters):
        rows += _difference("parameter", told, one, other)
    for one, other in _pairs(told[0].ops, told[1].ops):
        rows += _difference("op", told, one, other)
    for one, other in _pairs(told[0].conversions, told[1].conversions):
        rows += _difference("redistribution", told, one, other)
    missing = second.seconds - first.seconds - sum(row.seconds for row in rows)
    if abs(missing) > _ROUNDING * max(first.seconds, second.seconds):
        rows.append(Difference("update", "update of all parameters", "", "", "", "", missing))
    return tuple(rows)


class _Told:
    """A plan's decisions by name, and in words."""

    def __init__(self, plan: Plan) -> None:
        self.words = Words(plan)
        self.parameters: Mapping[object, Choice] = {p.path: p for p in plan.parameters}
        self.ops: Mapping[object, Choice] = {op.name: op for op in plan.ops}
        self.conversions: Mapping[object, Choice] = {
            (c.value, c.target if len(plan.mesh.axes) == 1 else str(c.target)): c
            for c in plan.conversions
        }

    def text(self, choice: Choice | None) -> str:
        """Return a decision in words, "" for none."""
        return "" if choice is None else choice_text(self.words, choice)


def choice_text(words: Words, choice: Choice) -> str:
    """Return a decision in words: how an op runs, how a parameter is stored, what is sent.

    words: of the plan that the decision is from.

    Example: `choice_text(Words(plan), plan.ops[0])` is "column-parallel".
    """
    if isinstance(choice, OpChoice):
        role = words.role(choice)
        layouts = ", ".join(dict.fromkeys(words.layout(layout) for layout in choice.results))
        return f"{role}, makes {layouts}" if role else f"makes {layouts}"
    if isinstance(choice, ParameterChoice):
        split = words.split(choice)
        return f"{words.layout(choice.storage)}, {split}"
    sent = words.sent(choice)
    kinds = dict.fromkeys(collective_text(item.collective) for item in sent)
    return f"{words.change(choice)}{': ' if kinds else ''}{' + '.join(kinds)}"


def _difference(
    kind: str, told: list[_Told], one: Choice | None, other: Choice | None
) -> Iterable[Difference]:
    """Return the difference between two decisions, none where they are the same."""
    texts = (told[0].text(one), told[1].text(other))
    seconds = _seconds(other) - _seconds(one)
    if texts[0] == texts[1] and abs(seconds) <= _ROUNDING * max(_seconds(one), _seconds(other)):
        return
    some = one if one is not None else other
    words = told[0].words if one is not None else told[1].words
    assert some is not None
    if isinstance(some, OpChoice):
        yield Difference(kind, some.name, some.where, some.line, *texts, seconds)
    elif isinstance(some, ParameterChoice):
        module = some.path.rpartition(".")[0]
        yield Difference(kind, some.path, module, "", *texts, seconds)
    else:
        parameter = words.parameters.get(some.value)
        if parameter is not None:
            yield Difference(kind, parameter.path, parameter.path.rpartition(".")[0], "", *texts,
                             seconds)  # fmt: skip
            return
        op = words.producers.get(some.value)
        line = op.line if op is not None else ""
        yield Difference(kind, words.value(some.value), words.where(some.value), line, *texts,
                         seconds)  # fmt: skip


def _seconds(choice: Choice | None) -> float:
    """Return what a decision takes of a step; parameters are updated all together."""
    return choice.seconds if isinstance(choice, OpChoice | Conversion) else 0.0


def _pairs(
    first: Mapping[object, Choice], second: Mapping[object, Choice]
) -> list[tuple[Choice | None, Choice | None]]:
    """Return decisions of the same name in pairs, in the order of the first and then the second."""
    return [(first.get(key), second.get(key)) for key in dict.fromkeys([*first, *second])]


def _collectives(plan: Plan) -> dict[str, str]:
    """Return number and bytes of the collectives of one step, by axis and kind."""
    counts: dict[str, tuple[int, float]] = {}
    for (_, axis, kind), (count, nbytes) in collective_totals(plan).items():
        name = collective_text(kind) + (f" on {axis}" if len(plan.mesh.axes) > 1 else "")
        before = counts.get(name, (0, 0))
        counts[name] = (before[0] + count, before[1] + nbytes)
    return {name: f"{count}, {bytes_text(nbytes)}" for name, (count, nbytes) in counts.items()}


def difference_lines(rows: Iterable[Difference], most: int) -> list[str]:
    """Return differences as lines, those of repeated blocks folded, the largest first.

    most: the number of lines; a last one tells how many there are besides.

    Example: `print(*difference_lines(differences(plan, other), 5), sep="\\n")`
    """
    keyed = (
        (row.where or row.name, (row.kind, _shape_of(row), row.first, row.second), row)
        for row in rows
    )
    folded = sorted(fold(keyed), key=lambda group: -abs(sum(r.seconds for r in group.items)))
    lines = []
    for group in islice(folded, most):
        row = group.first
        seconds = sum(item.seconds for item in group.items)
        times = f" ×{group.count}" if group.count > 1 else ""
        name = f"{row.name} in {group.path}"
        if row.where and row.name.startswith(f"{row.where}."):
            # A parameter is called by its path.
            name = f"{group.path}.{row.name.rpartition('.')[2]}"
        elif row.kind == "update" or not row.where:
            name = row.name
        place = f" ({row.line})" if row.line and row.kind == "op" else ""
        change = f", {row.first}, becomes {row.second}"
        if row.first == row.second:
            change = f", {row.first}" if row.first else ""
        elif not row.first:
            change = f" is new: {row.second}"
        elif not row.second:
            change = f" is gone: {row.first}"
        lines.append(f"{signed(seconds):>11}  {name}{times}{place}{change}")
    if len(folded) > most:
        rest = sum(row.seconds for group in folded[most:] for row in group.items)
        lines.append(f"{signed(rest):>11}  in {len(folded) - most} more")
    return lines


def _shape_of(row: Difference) -> str:
    """Return what rows of repeated blocks have in common in their names."""
    if row.kind == "parameter":
        return row.name.rpartition(".")[2]
    return _NUMBER.sub("", row.name)


def signed(seconds: float) -> str:
    """Return a time with its sign.

    >>> signed(-0.0015), signed(0.0)
    ('-1.5 ms', '0 s')
    """
    if not seconds:
        return "0 s"
    return f"{'+' if seconds > 0 else '-'}{seconds_text(abs(seconds))}"
