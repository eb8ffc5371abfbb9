"""The package lists its public names, and finds each of them."""

from __future__ import annotations

import pkgutil

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


def test_type_checkers_read_the_package() -> None:
    """The marker of PEP 561 is there, and it is package data."""
    assert pkgutil.get_data("autoparallel", "py.typed") is not None
