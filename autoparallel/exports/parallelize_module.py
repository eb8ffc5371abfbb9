"""A plan as Python for torch's own tensor parallelism: a table for parallelize_module."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from autoparallel.exports.export_text import Export
from autoparallel.exports.module_split import ModuleSplit, ModuleSplits, folded_pattern
from autoparallel.exports.module_splits import module_splits
from autoparallel.plan import Plan

__all__ = ["parallelize_module_source", "patterns"]

_HEAD = '''"""{model} on {world_size} ranks of a mesh axis, {axis!r}, by torch's parallelize_module.

    mesh = init_device_mesh("cuda", ({world_size},), mesh_dim_names=({axis!r},))
    model = parallelize(model, mesh)

Written by autoparallel from a plan.{missing}
"""
'''
_OWN_STYLE = '''

class SplitProduct(ParallelStyle):
    """A product whose class torch has no style for: its weight and its bias become DTensors.

    weight_dim, bias_dim: that are split; None for a bias that is whole. takes, gives: placements of
    the module's input and of its result. inside: of the input, when the product is computed.
    """

    def __init__(self, weight_dim, bias_dim, takes, inside, gives):
        super().__init__()
        self.dims = {"weight": weight_dim, "bias": bias_dim}
        self.takes, self.inside, self.gives = takes, inside, gives

    def _apply(self, module, device_mesh):
        return distribute_module(module, device_mesh, self._split, self._enter, self._leave)

    def _split(self, _, module, device_mesh):
        for name, parameter in list(module.named_parameters(recurse=False)):
            dim = self.dims[name]
            placements = [Replicate() if dim is None else Shard(dim)]
            part = distribute_tensor(parameter, device_mesh, placements)
            module.register_parameter(name, nn.Parameter(part, parameter.requires_grad))

    def _enter(self, module, inputs, device_mesh):
        x = DTensor.from_local(inputs[0], device_mesh, [self.takes], run_check=False)
        return (x.redistribute(placements=[self.inside]), *inputs[1:])

    def _leave(self, module, output, device_mesh):
        return output.redistribute(placements=[self.gives]).to_local()
'''


def parallelize_module_source(
    plan: Plan, model: nn.Module, *, axis: str | None = None, example_inputs: Any = None
) -> Export:
    """Return Python that splits the model by torch's parallelize_module, as a plan says.

    plan: with its graph. model: the one that was planned, which is left as it is. axis: of the
    mesh; by default the last. example_inputs: as for make_plan. The text defines PLAN, a table from
    patterns of modules' paths to styles, and parallelize(model, device_mesh). Activations between
    the modules are whole on all ranks, but for those that are proven to be parts of the plan's.
    Raises PlanError for a plan in parts.

    Example: `print(parallelize_module_source(plan, model))`
    """
    splits = module_splits(plan, model, axis=axis, example_inputs=example_inputs)
    rows, own = [], False
    for pattern, split in patterns(splits, model).items():
        text = _style(split, model)
        own = own or text.startswith("SplitProduct")
        rows.append(f"    {pattern!r}: {text},")
    notes = "".join(f"\n- {sentence}" for sentence in splits.missing)
    head = _HEAD.format(
        model=plan.model,
        world_size=splits.world_size,
        axis=splits.axis,
        missing=f" What it does not have of the plan:\n{notes}" if notes else "",
    )
    tensor = (
        "DTensor, Replicate, Shard, distribute_module, distribute_tensor" if own else "Replicate"
    )
    styles = "ColwiseParallel, RowwiseParallel, parallelize_module"
    imports = [
        *(["from torch import nn"] if own else []),
        f"from torch.distributed.tensor import {tensor}",
        f"from torch.distributed.tensor.parallel import {styles}",
        *(["from torch.distributed.tensor.parallel import ParallelStyle"] if own else []),
    ]
    table = "\n".join(["PLAN = {", *rows, "}"])
    function = (
        "def parallelize(model, device_mesh):\n"
        '    """Return the model, whose modules hold this rank\'s parts of their parameters."""\n'
        "    return parallelize_module(model, device_mesh, PLAN)\n"
    )
    text = "\n".join([head, *imports]) + (_OWN_STYLE if own else "")
    return Export("parallelize_module", f"{text}\n\n{table}\n\n\n{function}", ".py", splits.missing)


def patterns(splits: ModuleSplits, model: nn.Module) -> dict[str, ModuleSplit]:
    """Return the splits by patterns of paths, where one stands for repeated blocks.

    A pattern is used only where all modules that it fits are split alike; else each has its path.

    Example: `patterns(splits, model)["model.layers.*.mlp.up_proj"].kind`
    """
    names = [name for name, _ in model.named_modules()]
    by_path = {split.path: split for split in splits.modules}
    table: dict[str, ModuleSplit] = {}
    for split in splits.modules:
        pattern = folded_pattern(split.path)
        # A star of torch's stands for one part of a path, one of fnmatch for any number.
        depth = pattern.count(".")
        fits = [n for n in names if n.count(".") == depth and fnmatchcase(n, pattern)]
        alike = all(name in by_path and _form(by_path[name]) == _form(split) for name in fits)
        table.setdefault(pattern if alike else split.path, split)
    return table


def _form(split: ModuleSplit) -> tuple[object, ...]:
    """Return all of a split but where it is."""
    return (split.kind, split.weight_dim, split.bias_dim, split.gathered)


def _style(split: ModuleSplit, model: nn.Module) -> str:
    """Return the call that makes a module's style."""
    known = type(model.get_submodule(split.path)) in (nn.Linear, nn.Embedding)
    if known:
        if split.kind == "column":
            return f"ColwiseParallel({'output_layouts=Replicate()' if split.gathered else ''})"
        if split.kind == "row":
            return f"RowwiseParallel({'input_layouts=Replicate()' if split.gathered else ''})"
        if split.kind == "table":
            return "RowwiseParallel(input_layouts=Replicate())"
        return "ColwiseParallel(output_layouts=Replicate())"
    parts = "Shard(-1)"
    row, column = split.kind == "row", split.kind == "column"
    takes = parts if row and not split.gathered else "Replicate()"
    inside = parts if row else "Replicate()"
    gives = parts if column and not split.gathered else "Replicate()"
    return f"SplitProduct({split.weight_dim}, {split.bias_dim}, {takes}, {inside}, {gives})"
