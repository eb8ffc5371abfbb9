"""The adapter says what torch.compile is told of frames."""

from __future__ import annotations

import sys

import pytest
import torch

from autoparallel.support import torch_private


@pytest.mark.parametrize("whole", [True, False])
def test_frames_are_given_to_the_compiler_unless_it_is_put_aside(whole: bool) -> None:
    seen: list[bool] = []

    def noted(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.compiler.is_compiling())
        return x + 1

    def outer(x: torch.Tensor) -> torch.Tensor:
        """Run as it is, and call the same function aside from the compiler and with it."""
        compiler = torch_private.frame_compiler()
        seen.append(torch_private.wants_full_graph(compiler))
        assert torch_private.set_frame_compiler(None) is compiler
        noted(x)
        torch_private.set_frame_compiler(compiler)
        return noted(x)

    torch._dynamo.reset()
    torch_private.run_as_python(outer.__code__)
    assert torch_private.frame_compiler() is None
    torch.compile(outer, backend="eager", fullgraph=whole)(torch.ones(2))
    assert seen == [whole, False, True]
    assert torch_private.frame_compiler() is None


def test_a_broken_graph_says_why() -> None:
    def breaks(x: torch.Tensor) -> torch.Tensor:
        torch_private.break_graph("no graph holds this")
        return x + 1

    assert torch.equal(torch.compile(breaks, backend="eager")(torch.ones(2)), torch.full((2,), 2.0))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="no graph holds this"):
        torch.compile(breaks, backend="eager", fullgraph=True)(torch.ones(2))


def test_the_compiler_is_where_it_is_said_to_be() -> None:
    compiled = torch.compile(lambda x: x, backend="eager")
    assert type(compiled(torch.ones(1))) is torch.Tensor
    assert compiled.__code__.co_filename.endswith("eval_frame.py")
    assert torch_private.COMPILER in (name.rpartition(".")[0] for name in sys.modules)
    assert sys.modules[torch_private.COMPILER].optimize is not None
