"""Symbolic sizes have the expressions, hints and guards that the adapter reads."""

from __future__ import annotations

import logging

import pytest
import sympy
import torch
from exported_programs import exported

from autoparallel.support import torch_private


def test_symbolic_sizes_have_expressions_hints_and_guards() -> None:
    program = exported(lambda x, y: torch.cat([x, x]) + y, torch.ones(3, 4), torch.ones(6, 4))
    first, second = (node.meta["val"] for node in program.graph.nodes if node.op == "placeholder")
    (result,) = (n.meta["val"] for n in program.graph.nodes if str(n.target) == "aten.add.Tensor")
    rows = torch_private.expression_of(first.shape[0])
    assert isinstance(rows, sympy.Symbol)
    assert torch_private.expression_of(result.shape[0]) == 2 * rows
    assert torch_private.hint_of(first.shape[0]) == 3
    assert torch_private.hint_of(result.shape[0]) == 6
    guards = torch_private.guards_of(first.shape[0])
    assert all(isinstance(guard, sympy.Basic) for guard in guards)
    known = {torch_private.expression_of(second.shape[0]), 2 * rows}
    assert len(known) == 1 or any(guard.atoms(sympy.Symbol) for guard in guards)


def test_a_size_that_other_sizes_decide_is_fixed() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x[:, ::4].reshape(x.shape[0], 1)  # so that the other dim has 4 elements at most

    program = exported(forward, torch.ones(3, 4))
    sizes = {
        str(node.target): node.meta["val"].shape
        for node in program.graph.nodes
        if isinstance(node.meta.get("val"), torch.Tensor)
    }
    (x,) = (n.meta["val"] for n in program.graph.nodes if n.op == "placeholder")
    kept = [size for size in sizes["aten.slice.Tensor"] if isinstance(size, torch.SymInt)]
    assert [torch_private.is_fixed(size) for size in kept] == [False, True]
    assert not torch_private.is_fixed(x.shape[1])


def test_a_size_that_data_decide_has_no_hint() -> None:
    program = exported(lambda x: x.nonzero(), torch.ones(3, 4))
    (made,) = (
        n.meta["val"] for n in program.graph.nodes if str(n.target) == "aten.nonzero.default"
    )
    assert torch_private.hint_of(made.shape[0]) is None


@pytest.mark.parametrize("enabled", [True, False])
def test_results_of_fake_tensors_are_remembered_or_not(enabled: bool) -> None:
    def sizes_found() -> int:
        """Count the calls of the op's own function for the same sizes."""
        asked = []
        library = torch.library.Library("private_names", "FRAGMENT")
        name = f"asked_{enabled}".lower()
        if not hasattr(torch.ops.private_names, name):
            library.define(f"{name}(Tensor x) -> Tensor", tags=[torch.Tag.pt2_compliant_tag])

        @torch.library.register_fake(f"private_names::{name}", lib=library)
        def fake(x):
            asked.append(x.shape)
            return torch.empty_like(x)

        with torch_private.remembering_fake_results(enabled), torch_private.FakeTensorMode():
            for _ in range(3):
                getattr(torch.ops.private_names, name)(torch.empty(3))
        return len(asked)

    before = torch._dynamo.config.fake_tensor_cache_enabled
    with torch_private.remembering_fake_results(enabled):
        assert torch._dynamo.config.fake_tensor_cache_enabled is enabled
        assert torch_private.FakeTensorMode().cache_enabled is enabled
    assert torch._dynamo.config.fake_tensor_cache_enabled is before
    if not enabled:
        assert sizes_found() == 3


def test_loggers_of_the_tracer_have_these_names() -> None:
    """Silencing them silences what is logged below them."""
    from torch._export import non_strict_utils
    from torch._subclasses import fake_tensor
    from torch.export import _trace
    from torch.fx.experimental import symbolic_shapes

    assert fake_tensor.log.name == torch_private.FAKE_TENSOR_LOGGER
    for module, name in zip(
        (non_strict_utils, _trace, symbolic_shapes), torch_private.EXPORT_LOGGERS, strict=True
    ):
        logger = logging.getLogger(name)
        level = logger.level
        assert module.log.isEnabledFor(logging.WARNING)
        logger.setLevel(logging.ERROR)
        assert not module.log.isEnabledFor(logging.WARNING)
        logger.setLevel(level)


def test_as_if_exported_has_the_flags_of_an_export() -> None:
    """Within, code is told that a graph is made of it; afterwards it is not."""
    pair = torch.tensor([1, 4]), torch.tensor([3, 2])
    with torch_private.as_if_exported():
        assert max(*pair).tolist() == [3, 4]
        assert min(*pair).tolist() == [1, 2]
        assert torch.compiler.is_compiling()
        assert torch.compiler.is_exporting()
    assert not torch.compiler.is_compiling()
    assert not torch.compiler.is_exporting()
