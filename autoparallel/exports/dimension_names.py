"""A plan by dimensions: PartitionSpecs of JAX, and layout rules of Mesh-TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping

from autoparallel.exports.export_text import Export
from autoparallel.exports.module_split import folded_pattern
from autoparallel.graph.graph import Dim
from autoparallel.placement import Layout, Partial, Shard
from autoparallel.plan import OpChoice, Plan
from autoparallel.rewrite.emitted_program import require_graph
from autoparallel.view.size_names import size_names

__all__ = ["jax_specs", "mesh_tensorflow_rules"]


def jax_specs(plan: Plan) -> Export:
    """Return Python with a PartitionSpec for every parameter, input and output of a plan.

    The names of the specs are those of the mesh axes, for use as
    NamedSharding(Mesh(devices, AXES), PARAMETERS[path]). Blocks have no word in JAX: such a dim is
    said to be split in one piece, and listed as missing.

    Example: `exec(jax_specs(plan).text)`
    """
    missing: list[str] = []
    rows = []
    for parameter in plan.parameters:
        spec = _spec(plan, parameter.storage, len(parameter.shape), parameter.path, missing)
        rows.append(f"    {parameter.path!r}: {spec},")
        if parameter.state != parameter.storage:
            missing.append(f"{parameter.path}: its optimizer state is split, and it is not (ZeRO)")
    outputs = []
    for name, layout in zip(plan.returned or (), plan.outputs, strict=False):
        rank = max((p.dim + 1 for p in layout if isinstance(p, Shard)), default=0)
        outputs.append(f"    {name or 'output'!r}: {_spec(plan, layout, rank, name, missing)},")
    changed = [c for c in plan.conversions if c.value not in {p.name for p in plan.parameters}]
    if changed:
        missing.append(
            f"{len(changed)} redistributions of activations: XLA chooses them, or "
            "jax.lax.with_sharding_constraint does"
        )
    notes = "\n".join(f"# - {text}" for text in missing)
    axes = tuple(name for name, _ in plan.mesh.axes)
    sizes = tuple(size for _, size in plan.mesh.axes)
    text = "\n".join(
        [
            f'"""{plan.model} on {plan.mesh}: PartitionSpecs, written by autoparallel."""',
            *(["", "# What these do not say of the plan:", notes] if missing else []),
            "",
            "from jax.sharding import PartitionSpec",
            "",
            f"AXES = {axes!r}",
            f"SIZES = {sizes!r}",
            "OUTPUTS = {",
            *outputs,
            "}",
            "PARAMETERS = {",
            *rows,
            "}",
        ]
    )
    return Export("jax", text + "\n", ".py", tuple(missing))


def _spec(plan: Plan, layout: Layout, rank: int, name: str, missing: list[str]) -> str:
    """Return the PartitionSpec of a layout. What it cannot say is added to `missing`."""
    axes: list[list[str]] = [[] for _ in range(rank)]
    for (axis, size), placement in zip(plan.mesh.axes, layout, strict=True):
        if isinstance(placement, Partial):
            missing.append(f"{name}: a sum that is pending on {axis}")
        if not isinstance(placement, Shard) or size == 1:
            continue
        axes[placement.dim].append(axis)
        if placement.blocks != 1 or placement.unit != 1 or placement.repeat != 1:
            missing.append(f"{name} is {placement}: its dim {placement.dim} is one piece here")
    items = [
        "None" if not names else repr(names[0]) if len(names) == 1 else repr(tuple(names))
        for names in axes
    ]
    return f"PartitionSpec({', '.join(items)})"


def mesh_tensorflow_rules(plan: Plan) -> Export:
    """Return layout rules of Mesh-TensorFlow, "heads:tp;batch:dp", and the mesh's shape.

    Mesh-TensorFlow splits a named dimension in every tensor that has it, or in none. Dimensions
    here are sizes that products split: those of inputs by name (batch, sequence), and of parameters
    by "path.dim", with * for the blocks. Where a plan splits a dimension in some ops only, it is
    listed as missing.

    Example: `mesh_tensorflow_rules(plan).text`
    """
    graph = require_graph(plan).graph
    names = size_names(plan.inputs)
    missing: list[str] = []
    rules: dict[tuple[str, str], None] = {}
    shapes = {name: value.shape for name, value in graph.values.items()}
    counted: dict[tuple[str, str], list[bool]] = {}
    for op in plan.ops:
        if not op.whole_flops:
            continue
        for dim, axes in _split_inputs(op, shapes, names, plan).items():
            for axis in axes:
                counted.setdefault((dim, axis), []).append(True)
    products = sum(1 for op in plan.ops if op.whole_flops)
    for (dim, axis), where in counted.items():
        rules[dim, axis] = None
        if len(where) < products:
            missing.append(f"{dim} is split on {axis} in {len(where)} of {products} products only")
    for parameter in plan.parameters:
        for (axis, size), placement in zip(plan.mesh.axes, parameter.storage, strict=True):
            if isinstance(placement, Shard) and size > 1:
                path = folded_pattern(parameter.path)
                rules[f"{path}.{placement.dim}", axis] = None
                if placement.blocks != 1 or placement.unit != 1 or placement.repeat != 1:
                    missing.append(f"{path} is {placement}: make each block a dimension of its own")
    layout = ";".join(f"{dim}:{axis}" for dim, axis in rules)
    shape = ";".join(f"{name}:{size}" for name, size in plan.mesh.axes)
    text = f"mesh_shape = {shape!r}\nlayout = {layout!r}\n"
    missing = list(dict.fromkeys(missing))
    notes = "".join(f"# missing: {line}\n" for line in missing)
    return Export("mesh-tensorflow", notes + text, ".py", tuple(missing))


def _split_inputs(
    op: OpChoice,
    shapes: Mapping[str, tuple[Dim, ...]],
    names: Mapping[str, str],
    plan: Plan,
) -> dict[str, list[str]]:
    """Return the inputs' dimensions along which an op's results are split, with the axes."""
    found: dict[str, list[str]] = {}
    for value, layout in zip(op.makes, op.results, strict=True):
        for (axis, size), placement in zip(plan.mesh.axes, layout, strict=True):
            if isinstance(placement, Shard) and size > 1:
                dim = names.get(str(shapes[value][placement.dim]))
                if dim is not None:
                    found.setdefault(dim, []).append(axis)
    return found
