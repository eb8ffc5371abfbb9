"""An explanation: what was decided, and what else could be, in data and in plain sentences."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autoparallel.mesh import MICROBATCH
from autoparallel.plan import OpChoice, ParameterChoice, Plan
from autoparallel.questions.differences import Difference, difference_lines, signed
from autoparallel.questions.subjects import Subject
from autoparallel.support.units import bytes_text, seconds_text
from autoparallel.view.words import Words, collective_text

__all__ = ["Alternative", "Explanation"]

_LINES = 6
_ROUNDING = 1e-9
# Ops of a chain that are named at its beginning and at its end.
_FIRST, _LAST = 4, 3


@dataclass(frozen=True)
class Alternative:
    """An Alternative is what one decision might be instead, with all others planned anew.

    text: the decision in words. added_cost: what the best plan with it costs more, in the cost that
    was minimized; infinity where there is no such plan. proven: no plan with it adds less.
    plan: that plan; None of alternatives that were only priced. added_seconds: what all its work
    takes longer, added up; added_step: what its step does, in which work overlaps; NaN where nobody
    has told that of the plan. differences: all decisions that come with it. chain: names of the ops
    from this decision to the one that makes it dear. excess_nbytes: the bytes of a rank that its
    plan takes beyond the memory limit: where alternatives are told at the price of memory, or where
    the search within the limit has found none.
    """

    text: str
    added_cost: float
    proven: float
    plan: Plan | None = None
    added_seconds: float = math.nan
    differences: tuple[Difference, ...] = ()
    chain: tuple[str, ...] = ()
    excess_nbytes: int = 0
    added_step: float = math.nan


@dataclass(frozen=True)
class Explanation:
    """An Explanation answers why one decision of a plan is as it is; print it to read it.

    plan, subject: what was asked. kind: "op", "parameter" or "redistribution". chosen: the decision
    in words. seconds: what it takes of a step by itself. alternatives: the cheapest first. asked:
    the one that was asked for by why_not. price: the seconds that a byte is charged in the costs of
    the alternatives, in place of a memory limit; 0 where there is none, and where they were
    searched within it. stage: of an op of a plan with stages, the one that computes it, in words.
    Seconds of such a plan are those of one micro-batch on all stages; steps are whole ones.
    """

    plan: Plan
    subject: Subject
    kind: str
    chosen: str
    seconds: float
    alternatives: tuple[Alternative, ...]
    asked: Alternative | None = None
    price: float = 0.0
    stage: str = ""

    def __str__(self) -> str:
        """Return a paragraph for the decision and one for each alternative."""
        lines = [self._module()] if self.subject.module else []
        lines.append(self._decision())
        shown = [self.asked] if self.asked is not None else []
        shown += [other for other in self.alternatives if other is not self.asked]
        if not shown:
            lines.append("There is nothing else that it could be.")
        for number, other in enumerate(shown):
            lines += self._alternative(other, number == 0)
        if self.price and shown:
            charged = (
                f"{seconds_text(self.price * 2**30)} a GiB, the price at which the limit holds"
            )
            lines.append(f"Memory is charged at {charged}; search (--search) plans within it.")
        if self.subject.others:
            others = ", ".join(self.subject.others[:3])
            more = " and others" if len(self.subject.others) > 3 else ""
            lines.append(f"The name also fits {others}{more}.")
        return "\n".join(lines)

    def _decision(self) -> str:
        """Say what was decided, where, and what it takes."""
        choice, words = self.subject.choice, Words(self.plan)
        place = ""
        if isinstance(choice, OpChoice):
            name, place = choice.name, _place(choice)
            place += f", in {self.stage}," if self.stage else ""
        elif isinstance(choice, ParameterChoice):
            name, place = choice.path, self._read(choice.name)
        else:
            parameter = words.parameters.get(choice.value)
            name = words.value(choice.value) if parameter is None else parameter.path
            op = words.producers.get(choice.value)
            place = f", made{_place(op)}," if op is not None else self._read(choice.value)
        verb = "" if self.chosen.startswith("makes ") else "is "
        takes = f"; {self._share(self.seconds)} of {self._unit}" if self.seconds else ""
        return f"{name}{place} {verb}{self.chosen}{takes}."

    def _read(self, value: str) -> str:
        """Return where a value is first read that no op makes; "" where nothing reads it."""
        readers = Words(self.plan).readers.get(value, [])
        return f", read{_place(readers[0][0])}," if readers else ""

    def _share(self, seconds: float) -> str:
        """Return seconds with the share of the step's that they are."""
        share = f" ({seconds / self.plan.seconds:.1%})" if self.plan.seconds else ""
        return f"{seconds_text(seconds)}{share}"

    def _module(self) -> str:
        """Say what all of a module takes, of which one op is explained."""
        path, words = self.subject.module, Words(self.plan)
        ops = [op for op in self.plan.ops if _is_inside(op.where, path)]
        sent = [
            conversion
            for conversion in self.plan.conversions
            if words.sent(conversion) and _is_inside(words.where(conversion.value), path)
        ]
        moving = sum(conversion.seconds for conversion in sent)
        seconds = sum(op.seconds for op in ops) + moving
        told = f"{path} takes {self._share(seconds)} of {self._unit}: {_number(len(ops), 'op')}"
        if sent:
            kinds = [
                " + ".join(dict.fromkeys(collective_text(one.collective) for one in words.sent(c)))
                for c in sent
            ]
            counts = [f"{kinds.count(kind)} of {kind}" for kind in dict.fromkeys(kinds)]
            told += f", and {_number(len(sent), 'redistribution')} of {seconds_text(moving)}"
            told += f": {', '.join(counts)}"
        return f"{told}. Of its ops the one with most work is told:" if len(ops) > 1 else f"{told}."

    def _alternative(self, other: Alternative, first: bool) -> list[str]:
        """Say what an alternative would cost, and by what."""
        if other.proven == math.inf:
            return [f"  {other.text}: no plan has that."]
        if other.added_cost == math.inf:
            least = signed(max(other.proven, 0.0))
            return [
                f"  {other.text}: would cost at least {least}; search (--search) looks for a plan."
            ]
        lines = [f"  {other.text}: {'; '.join(self._told(other))}."]
        if other.plan is None or not first:
            return lines
        lines += [f"  {line}" for line in difference_lines(other.differences, _LINES)]
        if len(other.chain) > 1:
            start, *rest = self._chain(other.chain)
            lines += [f"    forced along {start}", *(f"      → {name}" for name in rest)]
        return lines

    def _chain(self, names: tuple[str, ...]) -> list[str]:
        """Return a chain with the module and the line of each op; of a long one what is between its
        ends is counted.
        """
        words = Words(self.plan)
        ops = {op.name: op for op in self.plan.ops}
        told = []
        for name in names:
            op = ops.get(name) or words.producers.get(name)
            parameter = words.parameters.get(name)
            named = words.value(name) if parameter is None else parameter.path
            told.append(f"{named}{_place(op)}" if op is not None else named)
        between = len(told) - _FIRST - _LAST
        if between > 1:
            told[_FIRST:-_LAST] = [f"{between} more"]
        return told

    def _told(self, other: Alternative) -> list[str]:
        """Return what an alternative adds, in words: its cost, its step, how sure, its bytes."""
        least = _ROUNDING * self.plan.cost
        told = ["costs the same"]
        if abs(other.added_cost) > least:
            share = f" ({other.added_cost / self.plan.cost:+.2%})" if self.plan.cost else ""
            unit = " of weighted cost" if self._is_weighted else ""
            told = [f"would cost {signed(other.added_cost)}{unit}{share}"]
            if self._is_of_microbatch:
                told[0] += " a micro-batch"
            if self._is_weighted and other.plan is not None:
                told[0] += f", {signed(other.added_seconds)} {self._unit}"
        if other.plan is not None:
            told[0] += " with all else planned anew"
        if abs(other.added_step) > least:
            longer = "longer" if other.added_step > 0 else "shorter"
            told.append(f"its step would be {seconds_text(abs(other.added_step))} {longer}")
        if other.added_cost < -least and other.added_step > least:
            told.append("that decided, as the work of a step overlaps")
        elif other.added_cost < -least and not other.excess_nbytes:
            told.append("the step in which work overlaps speaks against it, or what was asked for")
        elif other.added_cost > least and other.added_cost - other.proven > least:
            sure = signed(other.proven)
            told.append(f"{sure} is proven" if other.proven > 0 else "less may do, by the bound")
        if other.excess_nbytes:
            told.append(f"it would take {bytes_text(other.excess_nbytes)} more than the limit")
        return told

    @property
    def _is_of_microbatch(self) -> bool:
        """Whether the plan is that of one micro-batch on all stages."""
        return any(name == MICROBATCH for name, _ in self.plan.mesh.axes)

    @property
    def _unit(self) -> str:
        """The work that the seconds of the plan are of, in words."""
        return "a micro-batch" if self._is_of_microbatch else "a step"

    @property
    def _is_weighted(self) -> bool:
        """Whether the cost is another figure than the predicted seconds."""
        return self.plan.product_weight != 1.0 or not self.plan.options.sequence_parallel


def _is_inside(path: str, module: str) -> bool:
    """Return whether a path is that of a module, or of what is in it."""
    return path == module or path.startswith(f"{module}.")


def _number(count: int, what: str) -> str:
    """Return a number of things in words."""
    return f"{count} {what}{'s' if count != 1 else ''}"


def _place(op: OpChoice) -> str:
    """Return where an op is: its module and its line."""
    line = f" ({op.line})" if op.line else ""
    return f" in {op.where}{line}" if op.where else line
