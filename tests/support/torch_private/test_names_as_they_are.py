"""Names that the adapter gives as torch has them do what the project relies on."""

from __future__ import annotations

import sympy
import torch
from exported_programs import exported
from torch import nn

from autoparallel.support import torch_private

aten = torch.ops.aten


def test_calls_of_an_exported_program_are_op_overloads() -> None:
    program = exported(lambda x: torch.sin(x), torch.ones(3))
    (call,) = (node for node in program.graph.nodes if node.op == "call_function")
    assert isinstance(call.target, torch_private.OpOverload)
    assert str(call.target) == "aten.sin.default"
    assert (call.target.namespace, call.target.tags) == ("aten", aten.sin.default.tags)
    assert not isinstance(aten.sin, torch_private.OpOverload)


def test_tracing_may_put_other_ops_in_the_place_of_one() -> None:
    """The table is asked for every op while something is traced, and only then."""
    assert torch_private.get_proxy_mode() is None
    seen = []

    def forward(x):
        seen.append(torch_private.get_proxy_mode())
        with torch_private.decompose({aten.sin.default: lambda x: aten.cos.default(x)}):
            return torch.sin(x)

    program = exported(forward, torch.ones(3))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls == ["aten.cos.default"]
    assert all(mode is not None for mode in seen)


def test_fake_tensors_have_sizes_strides_and_no_data() -> None:
    with torch_private.FakeTensorMode():
        x = torch.empty(3, 4, requires_grad=True)
        made = (x.t() @ torch.empty(3, 5)).t()
    assert (made.shape, made.stride(), made.requires_grad) == ((5, 4), (1, 5), True)
    assert made.untyped_storage().nbytes() == 4 * 5 * 4


def test_fake_tensors_of_one_mode_begin_a_trace_with_symbolic_sizes() -> None:
    """A module whose parameters are fake is exported: the mode needs a place for its symbols."""
    with torch_private.FakeTensorMode(
        allow_non_fake_inputs=True, shape_env=torch_private.ShapeEnv()
    ):
        layer = nn.Linear(3, 2)
    free = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(layer, (torch.ones(4, 3),), strict=False, dynamic_shapes=free)
    output = next(node for node in program.graph.nodes if node.op == "output")
    assert isinstance(output.args[0][0].meta["val"].shape[0], torch.SymInt)


def test_a_dispatch_mode_sees_ops_below_autograd_and_autocast() -> None:
    seen: list[str] = []

    class Recorder(torch_private.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    x = torch.ones(2, 2, requires_grad=True)
    with Recorder():
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            made = x @ x
        made.sum().backward()
    assert seen[:3] == ["aten._to_copy.default", "aten._to_copy.default", "aten.mm.default"]
    assert seen.count("aten.mm.default") == 3


def test_nested_arguments_come_apart_and_together() -> None:
    x, y = torch.ones(1), torch.zeros(1)
    nested = ([x, {"key": (y, 3)}], None)
    leaves, structure = torch_private.tree_flatten(nested)
    assert leaves[0] is x
    assert leaves[1] is y
    assert leaves[2:] == [3, None]
    assert torch_private.tree_leaves(nested) == leaves
    assert torch_private.tree_unflatten(leaves, structure) == nested
    assert torch_private.tree_map(lambda leaf: 2 if leaf == 3 else leaf, nested)[0][1]["key"] == (
        y,
        2,
    )


def test_expressions_print_as_python() -> None:
    size = sympy.Symbol("n", integer=True, positive=True)
    printed = torch_private.PythonPrinter().doprint(3 * size + sympy.Max(size, 2))
    assert [eval(printed, {"n": n, "max": max}) for n in (1, 5)] == [5, 20]
    floored = sympy.floor(sympy.Rational(1, 2) * size)
    assert "n" in torch_private.PythonPrinter().doprint(floored)
