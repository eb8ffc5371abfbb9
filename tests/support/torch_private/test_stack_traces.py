"""Traced nodes keep the frames that the adapter asks for."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode

from autoparallel.support import torch_private


def test_frames_of_more_functions_are_kept() -> None:
    """Of a file that is asked for, inside of the forward that is told by its file."""

    class Model(nn.Module):
        def forward(self, x):
            return self.helper(x)

        def helper(self, x):
            return torch.sin(x)

    def functions() -> list[str]:
        program = torch.export.export(Model(), (torch.ones(3),), strict=False)
        (call,) = (node for node in program.graph.nodes if node.op == "call_function")
        return re.findall(r"in (\w+)$", call.meta.get("stack_trace", ""), re.MULTILINE)

    assert functions() == ["forward"]
    with torch_private.keeping_frames(lambda file: file == __file__, inside=torch.nn.__file__):
        kept = functions()
    assert kept[-2:] == ["forward", "helper"]
    with torch_private.keeping_frames(lambda file: file == __file__, inside=__file__):
        assert functions() == []
    assert functions() == ["forward"]


class Reshaped(nn.Module):
    """Calls modules, functions and methods, one of which is named as a forward is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.LayerNorm(4))

    def helped(self, x: torch.Tensor) -> torch.Tensor:
        def forward(x: torch.Tensor) -> torch.Tensor:
            return x.transpose(0, 1).softmax(0)

        return torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = x.abs().sum(0, keepdim=True)
        return self.helped(self.layers(x) / scale)


@pytest.mark.parametrize("inside", [__file__, torch.export.__file__, torch.nn.functional.__file__])
@pytest.mark.parametrize("kept", [__file__, torch.nn.functional.__file__, "none"])
def test_frames_that_are_not_kept_are_not_described(kept: str, inside: str) -> None:
    """The others are those that are left of a whole stack; another thread has whole ones."""
    x, dims = torch.ones(3, 4), ({0: torch.export.Dim.AUTO},)

    def stacks() -> list[str]:
        program = torch.export.export(Reshaped(), (x,), strict=False, dynamic_shapes=dims)
        graphs = [getattr(m, "graph", None) for m in program.graph_module.modules()]
        nodes = [node for graph in graphs if graph is not None for node in graph.nodes]
        return [f"{node.name}: {node.meta.get('stack_trace', '')}" for node in nodes]

    def functions() -> list[str]:
        return [frame.name for frame in proxy.CapturedTraceback.extract().summary()]

    from torch.fx import proxy

    whole = proxy.CapturedTraceback
    with torch_private.keeping_frames(lambda file: file == kept, inside=inside):
        assert proxy.CapturedTraceback is not whole
        assert len(functions()) < 20
        with ThreadPoolExecutor(1) as pool:
            assert {"functions", "run"} <= set(pool.submit(functions).result())
        found = []
        for described in (proxy.CapturedTraceback, whole):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(proxy, "CapturedTraceback", described)
                found.append(stacks())
        assert found[0] == found[1]
    assert proxy.CapturedTraceback is whole


def test_what_tensors_without_numbers_call_is_told() -> None:
    """A list of their elements is made by iterating; a forward that iterates is another caller."""
    told: list[str] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if getattr(function, "__name__", "") == "unbind":
                told.append(torch_private.calling_module(sys._getframe(1)))
            return function(*args, **(kwargs or {}))

    with torch_private.FakeTensorMode(shape_env=ShapeEnv()), Watch():
        rows = torch.tensor([[1, 2], [3, 4]])
        rows.tolist()
        assert {*told} == {"torch"}
        told.clear()
        assert len([*rows]) == 2
        assert told == ["torch._tensor"]
