"""A process joins the others, and waits for its threads when it leaves."""

from __future__ import annotations

from typing import Any

import pytest

from autoparallel.parallel import launch
from autoparallel.support.torch_private import let_gloo_end


def test_a_process_that_joined_ends_after_gloo(
    monkeypatch: pytest.MonkeyPatch, mesh_of_this_process: Any
) -> None:
    """It waits once at its end, however often it has joined; see `let_gloo_end`."""
    waits: list[Any] = []
    monkeypatch.setattr(launch.atexit, "register", waits.append)
    monkeypatch.setattr(
        launch.atexit, "unregister", lambda function: function in waits and waits.remove(function)
    )
    launch.join_world(1)
    launch.join_world(1)
    assert waits == [let_gloo_end]
