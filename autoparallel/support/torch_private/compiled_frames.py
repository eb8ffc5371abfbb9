"""The frames of Python that torch.compile takes up, and how it is told to leave some."""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    pass

__all__ = [
    "COMPILER",
    "break_graph",
    "frame_compiler",
    "run_as_python",
    "set_frame_compiler",
    "wants_full_graph",
]

# The module whose functions are torch.compile, however a program has come by them.
COMPILER = "torch._dynamo"

# The function of torch.compile that is given each frame that begins in this thread, None where none
# is; and a function that sets it and returns the one before. Both are written in C, so that a call
# is no frame itself.
frame_compiler: Callable[[], Any] = torch._C._dynamo.eval_frame.get_eval_frame_callback

set_frame_compiler: Callable[[Any], Any] = torch._C._dynamo.eval_frame.set_eval_frame


def run_as_python(code: CodeType) -> None:
    """Have torch.compile run the frames of this code as they are, and go on in those that it
    calls."""
    native = torch._C._dynamo.eval_frame
    actions = native._FrameAction
    native.set_code_exec_strategy(code, native._FrameExecStrategy(actions.SKIP, actions.DEFAULT))


def break_graph(message: str) -> None:
    """Have torch.compile, which traces this call, end its graph here and say why.

    With fullgraph=True it raises torch._dynamo.exc.Unsupported with the message.
    """
    torch._dynamo.graph_break(msg=message)


def wants_full_graph(compiler: Any) -> bool:
    """Return whether what `frame_compiler` gave was made with fullgraph=True."""
    inner = getattr(compiler, "_torchdynamo_orig_backend", None)
    return bool(getattr(inner, "_one_graph", False))
