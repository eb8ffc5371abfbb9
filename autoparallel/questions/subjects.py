"""Subjects of questions about a plan: the op, parameter or redistribution that a text names."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from autoparallel.errors import PlanError
from autoparallel.plan import Conversion, OpChoice, ParameterChoice, Plan, PlannedInput

__all__ = ["Subject", "find_subject"]

_COLLECTIVE = "collective "


@dataclass(frozen=True)
class Subject:
    """A Subject is one decision of a plan.

    choice: the decision. others: names of what the text could also have meant, such as the same
    module in other blocks. module: the path of the module that was asked about, for which an op in
    it stands; "" where it was something else.
    """

    choice: OpChoice | ParameterChoice | Conversion
    others: tuple[str, ...] = ()
    module: str = ""

    @property
    def node(self) -> str:
        """The name of the op or the parameter, or of the value that is redistributed."""
        return self.choice.value if isinstance(self.choice, Conversion) else self.choice.name


def find_subject(plan: Plan, text: str) -> Subject:
    """Return the decision that a text names.

    text: the path of a parameter ("blocks.0.fc1.weight"); the name of an op or of a value that it
    makes, as the report has them ("linear_2"); the path of a module, which stands for the op in it
    that costs most; or "collective VALUE" for the redistribution of a value, which is meant of an
    input too. Of paths the end is enough ("fc1"): the first that fits is meant. Raises PlanError
    where nothing is called so, and where nothing is decided about it.

    >>> import autoparallel, torch
    >>> layer, inputs = torch.nn.Linear(8, 8), torch.ones(4, 8)
    >>> find_subject(autoparallel.make_plan(layer, 2, example_inputs=inputs), "bias").node
    'p_bias'
    """
    name = text.strip()
    if name.startswith(_COLLECTIVE):
        return _collective(plan, name.removeprefix(_COLLECTIVE).strip())
    for parameter in plan.parameters:
        if name in (parameter.path, parameter.name):
            return Subject(parameter)
    for op in plan.ops:
        if name == op.name or name in op.makes:
            return Subject(op)
    for matches in (_is_path, _ends_path):
        parameters = [p for p in plan.parameters if matches(p.path, name)]
        modules = [w for w in _modules(plan) if matches(w, name)]
        # A module is more than its parameters: fc1 is the layer, fc1.weight the parameter.
        if modules:
            return Subject(_costliest(plan, modules[0]), tuple(modules[1:]), modules[0])
        if parameters:
            return Subject(parameters[0], tuple(p.path for p in parameters[1:]))
    for item in plan.inputs:
        if name in (item.path, item.name):
            return _input(plan, item)
    raise _nothing(plan, text)


def _input(plan: Plan, item: PlannedInput) -> Subject:
    """Return the redistribution of an input; about the input itself nothing is decided."""
    if any(conversion.value == item.name for conversion in plan.conversions):
        return _collective(plan, item.name)
    raise PlanError(
        f"nothing is decided about {item.path}",
        why="it is an input: every rank is given all of it, and reads it so",
        fix="ask about an op that reads it",
    )


def _collective(plan: Plan, value: str) -> Subject:
    """Return the redistribution of a value; of several, the one that costs most."""
    rows = [c for c in plan.conversions if value in (c.value, *_paths_of(plan, c.value))]
    if not rows:
        values = dict.fromkeys(conversion.value for conversion in plan.conversions)
        near = get_close_matches(value, values, 3) or list(values)[:8]
        raise PlanError(
            f"the plan redistributes no value {value!r}",
            fix=f"did you mean {' or '.join(near)}?" if near else "it redistributes nothing",
        )
    best = max(rows, key=lambda row: row.seconds)
    return Subject(best, tuple(str(row.target) for row in rows if row is not best))


def _paths_of(plan: Plan, value: str) -> tuple[str, ...]:
    """Return the path of a parameter or an input by its value's name, nothing for other values."""
    paths = [one.path for one in plan.parameters if one.name == value]
    return (*paths, *(one.path for one in plan.inputs if one.name == value))


def _modules(plan: Plan) -> list[str]:
    """Return the paths of all modules with ops in them, in the order of the ops, then by depth."""
    paths: dict[str, None] = {}
    for op in plan.ops:
        parts = op.where.split(".") if op.where else []
        paths |= dict.fromkeys(".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return list(paths)


def _costliest(plan: Plan, module: str) -> OpChoice:
    """Return the op of a module that has most FLOPs or, without any, takes most time."""
    inside = [op for op in plan.ops if op.where == module or op.where.startswith(f"{module}.")]
    return max(inside, key=lambda op: (op.whole_flops, op.seconds))


def _is_path(path: str, name: str) -> bool:
    """Say whether a path is the one that is named."""
    return path == name


def _ends_path(path: str, name: str) -> bool:
    """Say whether a path ends in the parts that are named."""
    return path.endswith(f".{name}")


def _nothing(plan: Plan, text: str) -> PlanError:
    """Return the error for a text that names nothing."""
    names = [p.path for p in plan.parameters] + [op.name for op in plan.ops] + _modules(plan)
    ends = {name.rpartition(".")[2]: None for name in names}
    near = list(dict.fromkeys(get_close_matches(text, [*names, *ends], 3)))
    return PlanError(
        f"nothing in the plan is called {text!r}",
        why="a question is about a parameter or a module by its path, an op or a value by its "
        'name, or "collective VALUE"',
        fix=f"did you mean {' or '.join(near)}?" if near else "see the plan's report",
    )
