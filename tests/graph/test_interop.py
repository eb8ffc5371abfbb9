"""The graph for other tools: torch.fx runs it to the same bits, networkx shows what flows."""

from __future__ import annotations

from typing import Any

import networkx
import pytest
import torch
from broad_cases import share_of
from families import (
    FAMILIES,
    Float64,
    build,
    gradients_of,
    inputs_for,
    loss_and_logits,
    relative_error,
    worst_gradient,
)
from torch import nn

import autoparallel
from autoparallel.capture.example_inputs import bind_inputs
from autoparallel.capture.graph_breaks import trace
from autoparallel.errors import PlanError
from autoparallel.graph.graph import Graph, Node, Ref, Value
from autoparallel.graph.interop import dataflow, graph_module
from autoparallel.rules.lookup import find_rule
from autoparallel.support.pytree import flatten, rebuild

pytestmark = pytest.mark.usefixtures("one_trace")


def flat(model: nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    return flatten(dict(bind_inputs(model, (), inputs).arguments))[0]


@pytest.mark.parametrize("name", share_of(FAMILIES, 6))
def test_the_module_equals_the_model(name: str) -> None:
    """Up to the order of sums, which passes change: a loss over (b, v, s) adds up otherwise than
    one over (b s, v).

    The parallel module on one rank runs the latter, and has the model's loss to the bit. The nodes
    are the graph's, the parameters the model's own.
    """
    model, inputs = build(name), inputs_for(name)
    with Float64():
        captured = trace(model, (), inputs, known=find_rule)
        loss, logits = loss_and_logits(model(**inputs))
        module = autoparallel.to_fx(model, example_inputs=inputs)
        expected = gradients_of(model, inputs)
    model.zero_grad()
    module.graph.lint()
    nodes = {node.name: node for node in module.graph.nodes}
    for node in captured.graph.nodes:
        if node.kind in ("parameter", "buffer"):
            found = nodes[node.result.name]
            assert (found.op, found.target) == ("get_attr", node.target)
        elif node.kind == "input":
            assert nodes[node.result.name].op == "placeholder"
    python = {"and", "pow", "slice"}
    assert all(f"{name}_" in nodes for name in python & set(captured.graph.values))
    for value in (
        set(captured.graph.values) - set(nodes) - python
    ):  # products that are one call with a bias
        (reader,) = captured.graph.readers[value]
        assert reader.target == "aten.add.Tensor"
        assert len(nodes[reader.name].args) == 3
    own = rebuild(captured.outputs, list(module(*flat(model, inputs))))
    own_loss, own_logits = loss_and_logits(own)
    assert relative_error(own_loss.detach(), loss.detach()) < 1e-14
    assert torch.equal(own_logits, logits)
    with Float64():
        single = autoparallel.autoparallelize(model, 1, example_inputs=inputs)
        assert torch.equal(loss, loss_and_logits(single(**inputs))[0])
    own_loss.backward()
    named = model.named_parameters(remove_duplicate=False)
    actual = {path: parameter.grad for path, parameter in named}
    assert worst_gradient(actual, expected)[0] < 1e-12
    for path, parameter in module.named_parameters():
        assert parameter is model.get_parameter(path)


class Statistics(nn.Module):
    """It writes to a buffer that its backward pass needs, makes several results, computes sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.register_buffer("scale", torch.ones(6))
        self.double()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.linear(x * self.scale.clone())
        self.scale += 1
        first, second = y.sort(-1)[0].split(4, -1)
        wide = torch.cat([first, second], 0).reshape(x.shape[0] * 4, 2)
        rows = torch.arange(x.shape[0] * 4, dtype=torch.float64, device=x.device)
        return wide * rows[:, None], wide.argmax(-1)


def test_buffers_are_written_and_sizes_follow_the_inputs() -> None:
    """At other sizes than it was traced with, twice, with gradients through the buffer's reader."""
    torch.manual_seed(0)
    model, plain = Statistics(), Statistics()
    plain.load_state_dict(model.state_dict())
    module = autoparallel.to_fx(model, example_inputs=torch.randn(5, 6, dtype=torch.float64))
    for rows in (7, 3):
        x = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
        twin = x.detach().clone().requires_grad_()
        expected, places = plain(twin)
        own, own_places = module(x)
        assert torch.equal(own, expected)
        assert torch.equal(own_places, places)
        own.square().sum().backward()
        expected.square().sum().backward()
        assert torch.equal(x.grad, twin.grad)
        assert torch.equal(model.linear.weight.grad, plain.linear.weight.grad)
        assert torch.equal(model.scale, plain.scale)


def test_what_torch_fx_has_no_place_for_is_refused() -> None:
    """Tensors that are not given, names that a GraphModule has itself, ops that are none."""
    graph = trace(nn.Linear(4, 4), (torch.ones(2, 4),), {}, known=find_rule).graph
    with pytest.raises(PlanError, match="parameter weight is not given") as caught:
        graph_module(graph, {})
    assert "to_fx(plan, model)" in caught.value.fix

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.graph(x)

    with pytest.raises(PlanError, match=r"graph\.weight has no place") as caught:
        autoparallel.to_fx(Named(), example_inputs=torch.ones(2, 4))
    assert "rename" in caught.value.fix

    value, other = (Value(name, (4,), torch.float32) for name in "xy")
    nodes = (
        Node("x", "input", "0", (value,)),
        Node("y", "call", "aten.no_such_op.default", (other,), (Ref("x"),)),
    )
    with pytest.raises(PlanError, match="no_such_op"):
        graph_module(Graph(nodes, ("y",)), {})


def test_names_of_the_graph_are_kept_from_the_nodes_that_torch_fx_needs_besides() -> None:
    """A value that is called as such a node would be."""
    first, second, third = (Value(name, (2, 3), torch.float32) for name in ("x", "detach", "copy"))
    nodes = (
        Node("x", "input", "0", (first,)),
        Node("b", "buffer", "b", (Value("b", (2, 3), torch.float32),)),
        Node("detach", "call", "aten.add.Tensor", (second,), (Ref("x"), Ref("b"))),
        Node("copy", "call", "aten.neg.default", (third,), (Ref("detach"),)),
    )
    buffer = torch.ones(2, 3)
    module = graph_module(Graph(nodes, ("copy",), (("b", "detach"),)), {"b": buffer})
    (result,) = module(torch.full((2, 3), 2.0))
    assert torch.equal(result, torch.full((2, 3), -3.0))
    assert torch.equal(buffer, torch.full((2, 3), 3.0))
    names = [node.name for node in module.graph.nodes]
    assert [name for name in names if name in ("x", "b", "detach", "copy")] == [
        "x", "b", "detach", "copy",
    ]  # fmt: skip
    assert "add" in str(next(n.target for n in module.graph.nodes if n.name == "detach"))


def test_the_dataflow_has_every_node_and_every_read() -> None:
    """With shapes and bytes, in execution order, without a circle."""
    model, inputs = build("gpt"), inputs_for("gpt")
    graph = trace(model, (), inputs, known=find_rule).graph
    flow = dataflow(graph)
    assert networkx.is_directed_acyclic_graph(flow)
    assert list(flow) == [*(node.name for node in graph.nodes), "return"]
    for node in graph.nodes:
        reads = {graph.producers[name].name for name in node.operands()}
        assert set(flow.predecessors(node.name)) == reads
        attributes = flow.nodes[node.name]
        assert attributes["kind"] == node.kind
        assert attributes["module"] == node.where
        assert len(attributes["shapes"]) == len(attributes["dtypes"]) == len(node.results)
        for value, sizes in zip(node.results, attributes["sizes"], strict=True):
            nbytes = torch.Size(sizes).numel() * value.dtype.itemsize
            assert nbytes <= attributes["nbytes"]
    for producer, reader, attributes in flow.edges(data=True):
        assert set(attributes["values"]) <= set(flow.nodes[producer]["values"])
        read = graph.outputs if reader == "return" else None
        node = next((node for node in graph.nodes if node.name == reader), None)
        assert set(attributes["values"]) <= set(read or node.operands())
    weight = flow.nodes["p_token_embedding_weight"] if "p_token_embedding_weight" in flow else None
    assert weight is None or weight["nbytes"] == weight["sizes"][0][0] * weight["sizes"][0][1] * 8


def test_a_node_that_reads_two_results_of_another_has_one_edge() -> None:
    """With both values and the bytes of both."""

    class Both(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = x.split(3, -1)
            return first * second

    flow = dataflow(trace(Both(), (torch.ones(4, 6),), {}, known=find_rule).graph)
    ((_, _, edge),) = [item for item in flow.edges(data=True) if len(item[2]["values"]) > 1]
    assert edge["nbytes"] == 2 * 4 * 3 * 4
    assert len(edge["shapes"]) == 2
