"""What holds for the collection of all tests."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pytest
from garbage import collect_rarely

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
    """All that the tests import has been imported: it stays."""
    collect_rarely()


@pytest.fixture(scope="module")
def one_trace() -> Iterator[None]:
    """In this file, equal models are traced once: it is about what is planned of their graphs."""
    from traces import traced_once

    with traced_once():
        yield
