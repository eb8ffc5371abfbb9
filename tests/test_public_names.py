"""The package lists its public names, finds each of them, and their examples run."""

from __future__ import annotations

import doctest
import pkgutil
from typing import Any

import pytest

import autoparallel


def test_dir_lists_the_public_names() -> None:
    """Each of them is found, and has a docstring of its own."""
    assert dir(autoparallel) == sorted(autoparallel.__all__)
    assert set(autoparallel.__all__) == set(autoparallel._HOMES)
    for name in autoparallel.__all__:
        assert getattr(autoparallel, name).__doc__, name


def test_a_name_that_is_none_is_refused() -> None:
    """As every module does."""
    with pytest.raises(AttributeError, match="no attribute 'autoparalellize'"):
        _ = autoparallel.autoparalellize


@pytest.mark.parametrize("name", sorted(autoparallel.__all__))
def test_the_examples_of_docstrings_run(name: str) -> None:
    """What a docstring shows is what happens."""
    found: Any = getattr(autoparallel, name)
    for example in doctest.DocTestFinder(recurse=False).find(found, name, globs={}):
        results = doctest.DocTestRunner().run(example)
        assert results.failed == 0


def test_type_checkers_read_the_package() -> None:
    """The marker of PEP 561 is there, and it is package data."""
    assert pkgutil.get_data("autoparallel", "py.typed") is not None
