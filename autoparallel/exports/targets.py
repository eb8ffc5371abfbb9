"""The programs that a plan can be exported to, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from autoparallel.errors import PlanError
from autoparallel.exports.dimension_names import jax_specs, mesh_tensorflow_rules
from autoparallel.exports.emitted_script import emitted_script
from autoparallel.exports.export_text import Export
from autoparallel.exports.launch_settings import (
    deepspeed_config,
    megatron_arguments,
    torchtitan_toml,
)
from autoparallel.exports.parallelize_module import parallelize_module_source
from autoparallel.exports.transformers_plan import transformers_plan
from autoparallel.plan import Plan
from autoparallel.support.arguments import MAKE_ONE, require_kind

__all__ = ["TARGETS", "export"]

# Those that can be told of stages: programs with pipelines of their own.
_WITH_STAGES = ("megatron", "torchtitan")

_Exporter = Callable[[Plan, nn.Module, Any], Export]

TARGETS: Mapping[str, _Exporter] = {
    "parallelize_module": lambda plan, model, inputs: parallelize_module_source(
        plan, model, example_inputs=inputs
    ),
    "transformers": lambda plan, model, inputs: transformers_plan(
        plan, model, example_inputs=inputs
    ),
    "python": lambda plan, model, _: emitted_script(plan, model),
    "jax": lambda plan, _, __: jax_specs(plan),
    "mesh-tensorflow": lambda plan, _, __: mesh_tensorflow_rules(plan),
    "megatron": lambda plan, _, __: megatron_arguments(plan),
    "torchtitan": lambda plan, _, __: torchtitan_toml(plan),
    "deepspeed": lambda plan, model, inputs: deepspeed_config(plan, model, inputs),
}


def export(plan: Plan, target: str, model: nn.Module, *, example_inputs: Any = None) -> Export:
    """Return a plan in the words of another program.

    plan: with its graph. target: "parallelize_module" (Python for torch's own tensor parallelism),
    "transformers" (entries of its DistributedConfig), "python" (the program as a file of its own),
    "jax" (PartitionSpecs), "mesh-tensorflow" (layout rules by dimension), "megatron" (arguments of
    Megatron-LM), "torchtitan" (its toml) or "deepspeed" (its configuration). model: that was
    planned; it is left as it is. example_inputs: as for make_plan.
    The result's `text` is for a file, and `missing` says what of the plan it does not have.

        >>> import autoparallel, torch
        >>> model, inputs = torch.nn.Linear(8, 8, bias=False), torch.ones(4, 8)
        >>> plan = autoparallel.make_plan(model, 2, example_inputs=inputs)
        >>> print(autoparallel.export(plan, "jax", model).text.splitlines()[-2])
            'weight': PartitionSpec('tp', None),

    Raises PlanError for an unknown target, for a plan in parts, and for one with stages but to
    "megatron" and "torchtitan", which have pipelines of their own.
    """
    require_kind(plan, Plan, MAKE_ONE)
    if target not in TARGETS:
        raise PlanError(f"no export is called {target!r}", fix=f"give one of {', '.join(TARGETS)}")
    if target not in (*_WITH_STAGES, "python"):  # a script says itself what there is instead
        others = " or ".join(map(repr, _WITH_STAGES))
        plan.refuse_stages(f"an export to {target}", fix=f"give {others}, or leave pp out")
    return TARGETS[target](plan, model, example_inputs)
