"""The context in which a user's forward is run to find out what it does."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

from autoparallel.support.torch_private import EXPORT_LOGGERS, FAKE_TENSOR_LOGGER

__all__ = ["quiet"]


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
