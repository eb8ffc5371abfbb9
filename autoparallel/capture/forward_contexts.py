"""The context in which a user's forward is run to find out what it does."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from autoparallel.graph.captured import autocast_type
from autoparallel.support.torch_private import EXPORT_LOGGERS, FAKE_TENSOR_LOGGER

__all__ = ["plain_surroundings", "quiet", "unprinted"]

_log = logging.getLogger(__name__)
_told: set[str] = set()
_TORCH = str(Path(torch.__file__).parent)


@contextlib.contextmanager
def unprinted(name: str = "") -> Iterator[None]:
    """Keep a forward that is tried out from printing and warning: it is not the user who calls it.

    name: of the model whose forward is traced. What it prints, and warns of in Python's way, is no
    part of its program, of which a warning tells, once for each text.

    >>> with unprinted():
    ...     print("a tensor of size s0")
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always" if name else "ignore")
        yield
    for warning in warned if name else ():
        text = f"{name}.forward: {warning.message}"
        # A forward warns in the name of its caller, and torch for itself.
        if text not in _told and not warning.filename.startswith(_TORCH):
            _told.add(text)
            _log.warning(
                "%s.forward warns %r: its program does not; warn outside of the forward, or in a "
                "forward hook", name, str(warning.message)[:60],
            )  # fmt: skip
    text = f"{name}.forward: {printed.getvalue().strip()}"
    if name and printed.getvalue() and text not in _told:
        _told.add(text)
        _log.warning(
            "%s.forward prints %r: its program does not, and a call of it prints nothing; print "
            "outside of the forward, or in a forward hook", name, printed.getvalue().strip()[:60],
        )  # fmt: skip


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from logging and warning about what is found out and explained here anyway.

    Errors still propagate as exceptions. Loggers, warning filters and stderr are put back.

    Example: `with quiet(): model(x)`.
    """
    loggers = [logging.getLogger(name) for name in (*EXPORT_LOGGERS, FAKE_TENSOR_LOGGER)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def plain_surroundings(device: torch.device) -> Iterator[None]:
    """Have the tracer itself at work without autocast, and outside of inference mode.

    device: of the model. The autocast region around a call is entered around its forward alone.

    Example: `with plain_surroundings(torch.device("cpu")): trace(model)`.
    """
    with contextlib.ExitStack() as stack:
        gradients = torch.is_grad_enabled()
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))  # leaving the mode has changed it
        if autocast_type(device) is not None:
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield
