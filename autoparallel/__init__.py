"""A planner that splits any PyTorch model over devices by itself.

    model = autoparallel.autoparallelize(model, world_size)

Here are the names that users need, and nothing else. They are imported when they are first used
(PEP 562), so that `import autoparallel` is quick. What they name is defined in the packages, of
which docs/architecture.md tells; files that every package needs (errors, placements, the mesh,
options, the plan) lie beside this one.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from autoparallel.support.installation import require_own_planners

if TYPE_CHECKING:
    from autoparallel.analysis.closed_forms import closed_forms
    from autoparallel.analysis.pipeline import pipeline
    from autoparallel.analysis.thread_splits import thread_splits
    from autoparallel.api import (
        apply_plan,
        autoparallelize,
        make_plan,
        simulate,
        traced_plan,
    )
    from autoparallel.errors import AutoParallelError
    from autoparallel.exports.targets import export
    from autoparallel.mesh import Mesh
    from autoparallel.parallel.checkpoint import load_checkpoint, save_checkpoint
    from autoparallel.parallel.gradient_norms import clip_grad_norm_
    from autoparallel.parallel.seeds import manual_seed, rng_state, set_rng_state
    from autoparallel.parallel.state_dicts import full_state_dict
    from autoparallel.placement import Invariant, Partial, Replicate, Shard
    from autoparallel.plan import Plan
    from autoparallel.planning.model_threads import trace_threads
    from autoparallel.planning.predicted_step import timeline
    from autoparallel.questions.differences import compare
    from autoparallel.questions.explain import Explainer, explain
    from autoparallel.rewrite.emitted_program import emitted_program
    from autoparallel.rules.rule import OpCall, ShardingRule
    from autoparallel.rules.user_rules import register_rule
    from autoparallel.view.closed_forms_text import forms_text
    from autoparallel.view.dot import write_svg
    from autoparallel.view.exports import to_fx, to_networkx
    from autoparallel.view.html.page import write_html
    from autoparallel.view.measured_step import measure_step
    from autoparallel.view.report import print_plan
    from autoparallel.view.stages_svg import write_stages
    from autoparallel.view.threads_svg import write_threads
    from autoparallel.view.trace import write_trace

# The module of each public name. The imports above are the same, for type checkers alone.
_HOMES = {
    "apply_plan": "api",
    "autoparallelize": "api",
    "make_plan": "api",
    "simulate": "api",
    "trace_threads": "planning.model_threads",
    "traced_plan": "api",
    "closed_forms": "analysis.closed_forms",
    "pipeline": "analysis.pipeline",
    "thread_splits": "analysis.thread_splits",
    "timeline": "planning.predicted_step",
    "AutoParallelError": "errors",
    "export": "exports.targets",
    "Mesh": "mesh",
    "Invariant": "placement",
    "Partial": "placement",
    "Replicate": "placement",
    "Shard": "placement",
    "Plan": "plan",
    "OpCall": "rules.rule",
    "ShardingRule": "rules.rule",
    "register_rule": "rules.user_rules",
    "compare": "questions.differences",
    "Explainer": "questions.explain",
    "explain": "questions.explain",
    "emitted_program": "rewrite.emitted_program",
    "clip_grad_norm_": "parallel.gradient_norms",
    "full_state_dict": "parallel.state_dicts",
    "load_checkpoint": "parallel.checkpoint",
    "manual_seed": "parallel.seeds",
    "rng_state": "parallel.seeds",
    "save_checkpoint": "parallel.checkpoint",
    "set_rng_state": "parallel.seeds",
    "forms_text": "view.closed_forms_text",
    "measure_step": "view.measured_step",
    "print_plan": "view.report",
    "to_fx": "view.exports",
    "to_networkx": "view.exports",
    "write_html": "view.html.page",
    "write_stages": "view.stages_svg",
    "write_svg": "view.dot",
    "write_threads": "view.threads_svg",
    "write_trace": "view.trace",
}

__all__ = [
    "AutoParallelError",
    "Explainer",
    "Invariant",
    "Mesh",
    "OpCall",
    "Partial",
    "Plan",
    "Replicate",
    "Shard",
    "ShardingRule",
    "apply_plan",
    "autoparallelize",
    "clip_grad_norm_",
    "closed_forms",
    "compare",
    "emitted_program",
    "explain",
    "export",
    "forms_text",
    "full_state_dict",
    "load_checkpoint",
    "make_plan",
    "manual_seed",
    "measure_step",
    "pipeline",
    "print_plan",
    "register_rule",
    "rng_state",
    "save_checkpoint",
    "set_rng_state",
    "simulate",
    "thread_splits",
    "timeline",
    "to_fx",
    "to_networkx",
    "trace_threads",
    "traced_plan",
    "write_html",
    "write_stages",
    "write_svg",
    "write_threads",
    "write_trace",
]


def __getattr__(name: str) -> Any:
    """Import a public name.

    Raises AttributeError for others, as every module does, and ImportError where another package
    named `planners` hides the project's.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_own_planners()
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """Return the public names, for completion, without importing them."""
    return list(__all__)
