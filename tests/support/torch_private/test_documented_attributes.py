"""Attributes of tensors, modules and nodes that torch documents hold what the project reads."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn


def test_nodes_of_an_exported_program_say_where_they_come_from() -> None:
    class Inner(nn.Module):
        def forward(self, x):
            return torch.sin(x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(x)

    program = torch.export.export(Outer(), (torch.ones(3),), strict=False)
    (call,) = (node for node in program.graph.nodes if node.op == "call_function")
    assert isinstance(call.meta["val"], torch.Tensor)
    assert [path for path, _ in call.meta["nn_module_stack"].values()] == ["", "inner"]
    last = [row for row in call.meta["stack_trace"].splitlines() if "File " in row][-1]
    assert Path(__file__).name in last
    assert re.search(r'File "[^"]+", line \d+', last)


def test_writing_to_a_tensor_counts_up_its_version() -> None:
    """Views count with what they are views of; writing to `data` does not count."""
    x = torch.zeros(4)
    assert x._version == 0
    x[1:].add_(1)
    assert (x._version, x[2:]._version) == (1, 1)
    x.data.add_(1)
    assert x._version == 1


def test_a_module_holds_its_parts_in_dictionaries() -> None:
    module = nn.BatchNorm1d(2)
    module.register_buffer("extra", torch.zeros(1), persistent=False)
    module.register_parameter("absent", None)
    assert list(module._parameters) == ["weight", "bias", "absent"]
    assert module._parameters["absent"] is None
    assert list(module._buffers) == ["running_mean", "running_var", "num_batches_tracked", "extra"]
    assert module._non_persistent_buffers_set == {"extra"}
    assert nn.Sequential(module)._modules == {"0": module}
    module._parameters["weight"] = replacement = nn.Parameter(torch.ones(2))
    assert module.weight is replacement
