"""The arguments that say which model is planned and for what, and the plan that they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from autoparallel.commands.bundled_models import BUNDLED
from autoparallel.commands.command import positive, progress
from autoparallel.commands.model_names import FORMS, NamedModel, named_model
from autoparallel.errors import PlanError
from autoparallel.options import SCHEDULES

if TYPE_CHECKING:
    from autoparallel.mesh import Mesh
    from autoparallel.plan import Plan

__all__ = [
    "STAGES",
    "add_model",
    "add_model_sizes",
    "add_request",
    "model_again",
    "model_of",
    "planned",
    "read_plan",
]

Weights = Literal["none", "buffers", "all"]

# Names of the arguments that decide which model it is and what goes into it; those of them that
# are numbers. A plan keeps them, so that its model can be built again.
_OF_THE_MODEL = ("model", "batch", "sequence", "layers", "dtype")
STAGES = ("microbatches", "schedule", "stages_per_rank")  # options of a pipeline
_NUMBERS = ("batch", "sequence", "layers")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names a model."""
    action = parser.add_argument("model", help=FORMS)
    # What argcomplete offers; files and functions are the shell's own to complete.
    vars(action)["completer"] = lambda **_: list(BUNDLED)


def add_model_sizes(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how large the model and its inputs are."""
    group = parser.add_argument_group("the model and its inputs")
    group.add_argument(
        "--batch", type=positive, metavar="N", help="sequences in one step, by default 8"
    )
    group.add_argument("--sequence", type=positive, metavar="N", help="tokens in each of them")
    group.add_argument(
        "--layers", type=positive, metavar="N", help="fewer layers than the model has"
    )
    group.add_argument(
        "--dtype", help="of parameters; by default bfloat16, and as it is for a function's model"
    )


def add_request(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what the model is planned for."""
    add_model_sizes(parser)
    group = parser.add_argument_group("the devices")
    group.add_argument("--world-size", type=positive, metavar="N", help="number of ranks")
    group.add_argument(
        "--nodes", type=positive, metavar="N", help="full nodes of the hardware instead"
    )
    group.add_argument(
        "--hardware",
        "--cluster",
        default="auto",
        metavar="NAME",
        help="a preset (dgx-2h, dgx-a100, dgx-a100-40gb, dgx-h100, cpu), or a file of `calibrate`; "
        "by default this machine's",
    )
    group.add_argument(
        "--mesh",
        metavar="AXES",
        help='axes, outermost first, as "dp=8,tp=8", or "auto" for the best of several; by default '
        "one axis, and auto on several nodes",
    )
    group.add_argument("--memory-limit", metavar="SIZE", help="that a rank may use, as 76GiB")
    group = parser.add_argument_group("a pipeline, of --mesh pp=2,tp=4")
    group.add_argument("--microbatches", type=positive, metavar="N", help="default: what suits")
    group.add_argument(
        "--schedule",
        help=f"one of {', '.join(SCHEDULES)}; default: 1f1b, or what suits a mesh that is chosen",
    )
    group.add_argument(
        "--stages-per-rank", type=positive, metavar="N", help="default: as many as suit"
    )
    group = parser.add_argument_group("what a plan may do")
    group.add_argument(
        "--optimizer",
        help="sgd, momentum, adam, or mixed_adam, the default for parameters of 16 bits",
    )
    group.add_argument("--recompute", help="model, auto, none, selective or full")
    group.add_argument(
        "--constraint",
        action="append",
        default=[],
        metavar="TEXT",
        help='a demand, as "fsdp on dp" or "*.q_proj is column on tp"; may be given again',
    )
    group.add_argument(
        "--layout",
        metavar="TEXT",
        help='the dims that axes split, and no others, as "batch:dp, heads:tp"; see '
        "`autoparallel dims`",
    )
    on_or_off = argparse.BooleanOptionalAction
    group.add_argument("--sequence-parallel", action=on_or_off, default=True, help="default: on")
    group.add_argument("--data-parallel", action=on_or_off, help="default: on with --mesh")
    group.add_argument(
        "--unknown-ops", default="discover", help="discover (default), replicate or error"
    )
    group.add_argument("--gap", type=float, default=0.01, help="under a limit, 0.01 for 1%%")
    group.add_argument("--seconds", type=float, help="how long to search; default: to the end")


def model_of(options: argparse.Namespace, weights: Weights = "none") -> NamedModel:
    """Return the model that the arguments name. weights: see `named_model`."""
    progress(f"building {options.model}")
    dtype = options.dtype
    # A model that computes here does so in float32; one that is planned trains in bfloat16.
    if dtype is None and weights == "none" and _is_ours_to_build(options.model):
        dtype = "bfloat16"
    return named_model(
        options.model,
        batch=options.batch,
        sequence=options.sequence,
        layers=options.layers,
        dtype=dtype,
        weights=weights,
    )


def _is_ours_to_build(name: str) -> bool:
    """Return whether a model is built here, and not by a function of the user's."""
    return name in BUNDLED or name.startswith("hf:")


def planned(options: argparse.Namespace, named: NamedModel | None = None) -> Plan:
    """Return the plan that the arguments ask for. named: the model, where it has been built.

    Raises PlanError for arguments that contradict each other, and the errors of make_plan.
    """
    from autoparallel.api import make_plan

    named = model_of(options) if named is None else named
    world_size = _world_size(options)
    mesh = _mesh(options, world_size)
    where = str(mesh) if _has_axes(mesh) else f"{world_size} ranks"
    hardware = "this machine" if options.hardware == "auto" else options.hardware
    progress(f"planning it for {where} of {hardware}")
    plan = make_plan(
        named.model,
        None if _has_axes(mesh) else world_size,
        mesh=mesh,
        example_inputs=named.inputs,
        **plan_options(options, named),
    )
    return asked_for(plan, options)


def plan_options(options: argparse.Namespace, named: NamedModel) -> dict[str, Any]:
    """Return the keyword arguments of make_plan but for the model, its inputs and the ranks."""
    given = ((name, getattr(options, name)) for name in STAGES)
    return {
        **{name: value for name, value in given if value is not None},
        "hardware": options.hardware,
        "memory_limit": options.memory_limit,
        "optimizer": options.optimizer or ("mixed_adam" if _is_half(named) else "adam"),
        "recompute": options.recompute,
        "constraints": options.constraint,
        "layout": options.layout,
        "sequence_parallel": options.sequence_parallel,
        "data_parallel": options.data_parallel,
        "unknown_ops": options.unknown_ops,
        "gap": options.gap,
        "seconds": options.seconds,
    }


def asked_for(plan: Plan, options: argparse.Namespace) -> Plan:
    """Return the plan with the arguments by which its model is built again."""
    given = ((name, getattr(options, name)) for name in _OF_THE_MODEL)
    texts = tuple((name, str(value)) for name, value in given if value is not None)
    return replace(plan, request=texts).checked()


def _is_half(named: NamedModel) -> bool:
    """Return whether most of the parameters have 16 bits."""
    sizes = [(p.element_size(), p.numel()) for p in named.model.parameters()]
    return 2 * sum(count for size, count in sizes if size == 2) > sum(count for _, count in sizes)


def _world_size(options: argparse.Namespace) -> int | None:
    """Return the number of ranks, None where the mesh says it. Raises PlanError for two of them."""
    if options.nodes is None:
        size: int | None = options.world_size
        return size
    from autoparallel.cost.hardware import find_hardware

    devices = find_hardware(options.hardware).devices_per_node
    if options.world_size not in (None, options.nodes * devices):
        raise PlanError(
            f"--nodes {options.nodes} beside --world-size {options.world_size}",
            why=f"a node of {options.hardware} has {devices} devices",
            fix="leave one of the two out",
        )
    count: int = options.nodes * devices
    return count


def _mesh(options: argparse.Namespace, world_size: int | None) -> Mesh | str | None:
    """Return the mesh that is asked for: axes, "auto", or None for a single axis."""
    if options.mesh not in (None, "auto"):
        mesh = parse_mesh(options.mesh)
        if world_size not in (None, mesh.world_size):
            raise PlanError(
                f"--mesh {options.mesh} beside {world_size} ranks",
                why=f"the mesh has {mesh.world_size}",
                fix="leave --world-size or --nodes out, or give a mesh of as many",
            )
        return mesh
    if world_size is None:
        raise PlanError(
            "over how many ranks?", fix='give --world-size 8, --nodes 2, or --mesh "dp=2,tp=4"'
        )
    if options.mesh == "auto":
        return "auto"
    from autoparallel.cost.hardware import find_hardware

    # One axis over several nodes would send everything over the slow links.
    several = world_size > find_hardware(options.hardware).devices_per_node > 1
    return "auto" if several else None


def _has_axes(mesh: Mesh | str | None) -> bool:
    """Return whether a mesh says the number of ranks by itself."""
    return mesh is not None and not isinstance(mesh, str)


def parse_mesh(text: str) -> Mesh:
    """Return the mesh of axes as they are written on the command line.

    Raises PlanError for a text that names none.

    >>> print(parse_mesh("dp=2,tp=4"))
    Mesh(dp=2, tp=4)
    """
    from autoparallel.mesh import Mesh

    axes = [axis.partition("=") for axis in text.split(",")]
    if not all(size.strip().isdecimal() for _, _, size in axes):
        raise PlanError(f"{text!r} is no mesh", fix='give "dp=8,tp=8", or "auto"')
    names = [name.strip() for name, _, _ in axes]
    if len(set(names)) < len(names):
        raise PlanError(f"{text!r} names an axis twice", fix="give each axis a name of its own")
    return Mesh(**{name: int(size) for name, (_, _, size) in zip(names, axes, strict=True)})


def read_plan(path: str | Path) -> Plan:
    """Return the plan in a file. Raises PlanError where there is none."""
    from autoparallel.plan import Plan

    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(
            f"no plan can be read from {path}: {error}",
            fix="autoparallel plan MODEL --world-size 8 -o plan.json writes one",
        ) from None
    return Plan.from_json(text)


def model_again(plan: Plan, weights: Weights = "none") -> NamedModel:
    """Return the model of a plan, built again from what the plan was asked for with.

    weights: see `named_model`. Raises PlanError for a plan that Python asked for.
    """
    request: Mapping[str, Any] = dict(plan.request)
    if "model" not in request:
        raise PlanError(
            f"the plan does not say how to build {plan.model}",
            why="it was made by autoparallel.make_plan, and this needs the model",
            fix="autoparallel plan my_module:build -o plan.json, or ask in Python: "
            "autoparallel.explain(plan, ...)",
        )
    unknown = [name for name in request if name not in _OF_THE_MODEL]
    numbers = {name: request[name] for name in _NUMBERS if name in request}
    if unknown or not all(text.isdecimal() for text in numbers.values()):
        raise PlanError("the plan's request is none that a command has written", fix="plan again")
    progress(f"building {request['model']}")
    dtype = request.get("dtype") or ("bfloat16" if _is_ours_to_build(request["model"]) else None)
    return named_model(
        request["model"],
        dtype=dtype,
        weights=weights,
        **{name: int(text) for name, text in numbers.items()},
    )
