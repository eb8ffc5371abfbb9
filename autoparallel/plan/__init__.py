"""The plan: a frozen value that says for every tensor and op how it is split, and what that costs.

choices.py has the values that a plan consists of, plan.py the plan itself with its short text,
plan_fields.py and plan_rows.py both as JSON. All of it is importable from here. How a plan is found
is in planning/, what a finished one takes in analysis/, and longer texts and pictures of it in
view/.
"""

from autoparallel.plan.choices import (
    Break,
    Conversion,
    OpChoice,
    ParameterChoice,
    Pipeline,
    PlannedInput,
)
from autoparallel.plan.plan import Part, Plan

__all__ = [
    "Break",
    "Conversion",
    "OpChoice",
    "ParameterChoice",
    "Part",
    "Pipeline",
    "Plan",
    "PlannedInput",
]
