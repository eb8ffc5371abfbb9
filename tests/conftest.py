"""What holds for the collection of all tests."""

from __future__ import annotations

import gc
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from garbage import collect_rarely

# Folders of tests of what becomes of graphs: in each file, equal models are traced once.
_AFTER_TRACING = ("analysis", "plan", "planning", "questions", "view")
# Of what becomes of modules: what changes about one is traced as always.
_AFTER_FIRST_TRACE = ("parallel",)

# What is tested is planning, and not a plan that another test or another run has left.
os.environ["AUTOPARALLEL_KEEP_PLANS"] = "0"

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every process collects the same tests: no name holds an address, which each process chooses.

    Without that pytest-xdist stops with "Different tests were collected".
    """
    named = [item.nodeid for item in items if _ADDRESS.search(item.nodeid)]
    if named:
        raise pytest.UsageError(f"tests named by addresses, give them ids: {', '.join(named)}")


def pytest_collection_finish() -> None:
    """All that the tests import has been imported: it stays. Nobody reads torch's log of traces.

    Pytest listens to every logger that hands on nothing. As soon as somebody listens to that one,
    torch writes down the stack at each step of a trace: a ninth of the time of tests that trace.
    """
    collect_rarely()
    logging.getLogger("torch.__trace").propagate = True


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    """Pytest looks for garbage five times as it ends, among all that the tests have left."""
    gc.freeze()


@pytest.fixture(scope="module")
def one_trace() -> Iterator[None]:
    """In this file, equal models are traced once: it is about what is planned of their graphs."""
    from traces import traced_once

    with traced_once():
        yield


@pytest.fixture(scope="module")
def one_first_trace() -> Iterator[None]:
    """In this file, equal models are traced once; what changes afterwards is traced as always.

    Equal programs are planned once: it is about modules that are split by some plan.
    """
    from traces import planned_once, traced_once

    with traced_once(again=False), planned_once():
        yield


@pytest.fixture(scope="module", autouse=True)
def _traced_once_after_tracing(request: pytest.FixtureRequest) -> None:
    """Have all tests of a file share its traces, where no test is about tracing."""
    if request.path.parent.name in _AFTER_TRACING:
        request.getfixturevalue("one_trace")
    elif request.path.parent.name in _AFTER_FIRST_TRACE:
        request.getfixturevalue("one_first_trace")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Let torch.compile begin anew, with its counters at 0, and leave nothing behind."""
    import torch
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def mesh_of_this_process(tmp_path: Path) -> Iterator[Any]:
    """Return a device mesh of this one process."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()
