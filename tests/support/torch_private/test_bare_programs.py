"""Programs that are traced bare have no metadata, and run all the same."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from exported_programs import exported
from torch import nn

from autoparallel.support import torch_private


def test_bare_programs_have_no_metadata_of_tensors() -> None:
    """Within, no node has them; afterwards, in other threads too, torch notes them as ever."""

    def metadata() -> list[Any]:
        program = exported(lambda x: x.sin().cos(), torch.ones(3, 4))
        return [node.meta.get("tensor_meta") for node in program.graph.nodes if node.op != "output"]

    with torch_private.bare_programs():
        with torch_private.bare_programs():
            assert metadata() == [None] * 3
        assert metadata() == [None] * 3
        with ThreadPoolExecutor(1) as pool:
            elsewhere = pool.submit(metadata).result()
    for noted in (elsewhere, metadata()):
        assert [tuple(item.shape)[1] for item in noted] == [4, 4, 4]


def two_ways(x: torch.Tensor) -> torch.Tensor:
    """Return a result of which a part is computed without gradients, by a graph of its own."""
    with torch.no_grad():
        y = x.sin().reshape(-1)
    return (x * 2).reshape(-1) + y


def test_bare_programs_write_their_code_when_it_is_asked_for(monkeypatch) -> None:
    """Within, no Python is compiled; whoever runs a graph, or asks for its code, has it all."""
    written: list[str] = []
    original = torch.fx.Graph.python_code

    def noted(graph: Any, *args: Any, **kwargs: Any) -> Any:
        written.append(str(graph))
        return original(graph, *args, **kwargs)

    monkeypatch.setattr(torch.fx.Graph, "python_code", noted)
    plain = exported(two_ways, torch.ones(3, 4))
    assert written
    written.clear()
    with torch_private.bare_programs():
        bare = exported(two_ways, torch.ones(3, 4))
        assert not written
        assert bare.graph_module.code == plain.graph_module.code
        assert len(written) == 2  # one of them is of the graph inside
    assert str(bare) == str(plain)
    x = torch.rand(5, 4)
    torch.testing.assert_close(bare.module()(x), two_ways(x))
    assert [type(module.code) for module in bare.graph_module.children()] == [str]
    # A graph that is edited and written again runs as it is now.
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    with torch_private.bare_programs():
        (call,) = (node for node in graph.graph.nodes if node.op == "call_module")
        call.op, call.target = "call_function", torch.neg
        graph.recompile()
    assert graph(torch.ones(1)).item() == -1
