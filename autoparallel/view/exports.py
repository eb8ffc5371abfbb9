"""Plans, parallel modules and graphs as graphs of other libraries: of torch.fx and networkx."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import networkx
import torch
from torch import fx, nn

from autoparallel.capture.example_inputs import find_example_inputs, split_example
from autoparallel.capture.global_reads import undisturbed
from autoparallel.capture.graph_breaks import trace
from autoparallel.errors import PlanError
from autoparallel.graph.captured import Captured
from autoparallel.graph.graph import Graph
from autoparallel.graph.interop import OUTPUT, dataflow, graph_module
from autoparallel.parallel.module_programs import program_of
from autoparallel.placement import layout_text
from autoparallel.plan import Plan
from autoparallel.rewrite.emit import emit
from autoparallel.rewrite.emitted_conversions import fusable
from autoparallel.rewrite.emitted_program import require_graph
from autoparallel.rewrite.program_module import program_module
from autoparallel.rules.lookup import find_rule, known_rule
from autoparallel.rules.rule import OpCall
from autoparallel.runtime.ranks import Ranks, absent_ranks
from autoparallel.runtime.tensor_parts import take_layout_part

__all__ = ["to_fx", "to_networkx"]


def to_fx(
    source: Plan | Graph | nn.Module,
    model: nn.Module | None = None,
    *,
    rank: int | Ranks | None = None,
    example_inputs: Any = None,
) -> fx.GraphModule:
    """Return a torch.fx.GraphModule of a graph, or of the program of one rank.

    source: a plan or a graph gives the captured graph, before it is split; a module is traced with
    `example_inputs` (as in make_plan) and gives its graph; a parallel module gives the program that
    this rank runs in the current mode. model: whose weights a plan or a graph is to have; without
    it they are on the meta device. rank: for a plan, the program of this rank, with its parts of
    the model's weights; runtime.ranks.Ranks in place of a number lets it run among others.
    example_inputs: for a module, whose own are taken without.

    The result takes the input tensors one after another and returns a tuple of the returned ones;
    nodes have the names of the graph or of the program, parameters and buffers are get_attr nodes
    under their own paths. A product and the bias added to it are one call, as in the model: the
    numbers are those of the parallel module on one rank, bit for bit. Tensors are shared with the
    model or the parallel module, and gradients reach its parameters; only a plan's rank has its own
    parts.

        >>> import autoparallel, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
        >>> module = autoparallel.to_fx(model, example_inputs=torch.ones(4, 8))
        >>> [node.name for node in module.graph.nodes if node.op == "call_function"]
        ['linear', 'relu']
        >>> torch.equal(module(torch.ones(4, 8))[0], model(torch.ones(4, 8)))
        True

    Raises PlanError for a plan without its graph and for a plan in parts, CaptureError for a model
    that cannot be traced whole.
    """
    if isinstance(source, nn.Module):
        if model is not None or rank is not None:
            raise PlanError(
                "a model or a rank beside a module",
                why="a module has its weights, and a parallel module its rank",
                fix="to_fx(module), or to_fx(plan, model, rank=0)",
            )
        program = program_of(source)
        if program is not None:
            return program
        args, kwargs = split_example(
            find_example_inputs(source) if example_inputs is None else example_inputs
        )
        with undisturbed(source):
            captured = trace(source, args, kwargs, known=find_rule)
        return _whole(captured, source, type(source).__name__)
    if isinstance(source, Graph):
        if rank is not None:
            raise PlanError("a rank beside a graph", fix="pass the plan: to_fx(plan, rank=0)")
        return _whole(source, model, "Graph")
    captured = _captured(source)
    if rank is None:
        return _whole(captured, model, source.model)
    source.refuse_stages(
        "a program of one rank in torch.fx",
        fix="emitted_program(plan, rank=rank) is the program of a rank's stages as Python, and "
        "to_fx(plan) is the unsplit graph",
    )
    return _part(source, captured, model, rank)


def _captured(plan: Plan) -> Captured:
    """Return the graph of a plan. Raises PlanError for a plan in parts and for one without."""
    if plan.breaks:
        raise PlanError(
            f"the plan for {plan.model} has {len(plan.parts)} parts, each with its own graph",
            why="between the parts runs the user's Python, which is no graph",
            fix="pass them one by one: [part.plan for part in plan.parts]",
        )
    return require_graph(plan)


def _whole(source: Graph | Captured, model: nn.Module | None, name: str) -> fx.GraphModule:
    """Return the module of a captured graph, with the model's tensors or with ones on meta."""
    if isinstance(source, Captured):
        source.refuse_writes("torch.fx")
    graph = source if isinstance(source, Graph) else source.graph
    constants = source.constants if isinstance(source, Captured) else {}
    tensors = {**constants, **_tensors(graph, model)}
    rules = {node.name: known_rule(OpCall.of(graph, node)) for node in graph.calls}
    device = _device(tensors)
    tensors.update({path: tensor.to(device) for path, tensor in constants.items()})
    return graph_module(graph, tensors, fused=fusable(graph, rules), device=device, name=name)


def _tensors(graph: Graph, model: nn.Module | None) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by path: the model's, or ones on meta of the same shapes."""
    if model is not None:
        named: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
        return {**named, **dict(model.named_buffers(remove_duplicate=False))}
    tensors: dict[str, torch.Tensor] = {}
    for node in graph.nodes:
        if node.kind not in ("parameter", "buffer"):
            continue
        value = node.result
        empty = torch.empty([int(str(s)) for s in value.shape], dtype=value.dtype, device="meta")
        wanted = value.requires_grad
        tensors[node.target] = nn.Parameter(empty, wanted) if node.kind == "parameter" else empty
    return tensors


def _device(tensors: Mapping[str, torch.Tensor]) -> torch.device:
    """Return the device of the first parameter, the CPU where there is none."""
    parameters = (tensor for tensor in tensors.values() if isinstance(tensor, nn.Parameter))
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


def _part(
    plan: Plan, captured: Captured, model: nn.Module | None, rank: int | Ranks
) -> fx.GraphModule:
    """Return the program of one rank, with its own parts of the weights and its own buffers."""
    ranks = absent_ranks(plan.mesh, rank) if isinstance(rank, int) else rank
    captured.refuse_writes("torch.fx")
    program = emit(captured.graph, plan, ranks, plan.model)
    tensors = _tensors(captured.graph, model)
    device = _device(tensors)
    parameters = {}
    for path in program.parameters:
        whole, layout = tensors[path], plan.storage[path]
        part = take_layout_part(whole.detach(), layout, ranks.sizes, ranks.coordinates).clone()
        parameters[path] = nn.Parameter(part, whole.requires_grad)
    buffers = {path: tensors[path].clone() for path in program.buffers}
    constants = {path: captured.constants[path].to(device) for path in program.constants}
    name = f"{plan.model}_rank{ranks.rank}"
    return program_module(program, parameters, buffers, constants, device, name)


def to_networkx(source: Plan | Graph) -> networkx.DiGraph:
    """Return the dataflow as a networkx.DiGraph: the graph's nodes, and edges for their values.

    source: a graph, or a plan with its graph.

    A node has kind ("input", "parameter", "buffer", "constant", "call", "output"), op, path (of a
    parameter or buffer), module, line, values, and per value shapes (as text), sizes (for the
    example inputs), dtypes; nbytes, of all its values. An edge has values, shapes and nbytes. The
    node "return" reads what is returned.

    With a plan, a node has placements (per value) and the predicted forward_seconds and
    backward_seconds on a rank; an edge has conversions, (value, from, to) each, and their seconds:
    where several nodes read one conversion, the first of them has its seconds.

        >>> import autoparallel, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
        >>> plan = autoparallel.make_plan(model, 2, example_inputs=torch.ones(4, 8))
        >>> flow = autoparallel.to_networkx(plan)
        >>> [name for name in flow.predecessors("return")]
        ['relu']

    Raises PlanError for a plan without its graph and for a plan in parts.
    """
    if isinstance(source, Graph):
        return dataflow(source)
    flow = dataflow(_captured(source).graph)
    _add_placements(flow, source)
    _add_conversions(flow, source)
    return flow


def _add_placements(flow: networkx.DiGraph, plan: Plan) -> None:
    """Give each node the placements of its values, and its predicted seconds."""
    ops = {op.name: op for op in plan.ops}
    storage = {parameter.name: parameter.storage for parameter in plan.parameters}
    for name, attributes in flow.nodes(data=True):
        op = ops.get(name)
        if op is not None:
            attributes["placements"] = tuple(map(layout_text, op.results))
            attributes["forward_seconds"] = op.forward_seconds
            attributes["backward_seconds"] = op.seconds - op.forward_seconds
            continue
        layouts = (storage[value] for value in attributes["values"] if value in storage)
        attributes["placements"] = tuple(map(layout_text, layouts))
        attributes["forward_seconds"] = attributes["backward_seconds"] = 0.0


def _add_conversions(flow: networkx.DiGraph, plan: Plan) -> None:
    """Give each edge the conversions on it, and their predicted seconds."""
    producers = {value: name for name, values in flow.nodes(data="values") for value in values}
    for _, _, attributes in flow.edges(data=True):
        attributes["conversions"], attributes["seconds"] = (), 0.0
    for conversion in plan.conversions:
        ends = (layout_text(conversion.source), layout_text(conversion.target))
        for index, reader in enumerate(conversion.readers):
            edge = flow.edges[producers[conversion.value], OUTPUT if reader == "return" else reader]
            edge["conversions"] += ((conversion.value, *ends),)
            # Its readers share one conversion; to count it once keeps sums over edges right.
            edge["seconds"] += 0.0 if index else conversion.seconds
