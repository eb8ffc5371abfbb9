"""Places in dictionaries that are asked about together: every change is seen, at each question."""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

from autoparallel.support.seen_places import SeenPlaces


class Colour(enum.Enum):
    RED = 1


class Shouting(dict[str, Any]):
    """A dict that says otherwise than what it holds."""

    def __getitem__(self, key: str) -> Any:
        return "another"

    def __contains__(self, key: object) -> bool:
        return True


def held() -> tuple[dict[Any, Any], defaultdict[str, Any], Shouting, SeenPlaces]:
    plain: dict[Any, Any] = {"a": 1.5, "it's": [1], Colour.RED: "red", 3: None}
    counts: defaultdict[str, Any] = defaultdict(list, x=[2.5])
    loud = Shouting(y=3.5)
    places = SeenPlaces(missing="gone")
    for holder in (plain, counts, loud):
        for name, value in holder.items():
            places.add(holder, name, value)
        places.add_absent(holder, "new")
    return plain, counts, loud, places


CHANGES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "value": lambda plain, counts, loud: plain.update(a=float("1.5")),
    "member": lambda plain, counts, loud: plain.update({Colour.RED: "green"}),
    "quoted": lambda plain, counts, loud: plain.update({"it's": [1]}),
    "none": lambda plain, counts, loud: plain.update({3: 0}),
    "gone": lambda plain, counts, loud: plain.pop("a"),
    "default": lambda plain, counts, loud: counts.pop("x"),
    "loud": lambda plain, counts, loud: loud.update(y=float("3.5")),
    "new": lambda plain, counts, loud: plain.update(new=1),
    "new default": lambda plain, counts, loud: counts["new"],
    "new loud": lambda plain, counts, loud: loud.update(new=1),
}


@pytest.mark.parametrize("asked", range(4))
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change: str, asked: int) -> None:
    """Loops answer the first questions, and a function that is written then the later ones."""
    plain, counts, loud, places = held()
    assert all(places.same() for _ in range(asked))
    CHANGES[change](plain, counts, loud)
    sizes = len(plain), len(counts), len(loud)
    assert not places.same()
    assert (len(plain), len(counts), len(loud)) == sizes  # nothing is added by asking


@pytest.mark.parametrize("asked", range(4))
def test_what_is_there_now_can_become_what_is_expected(asked: int) -> None:
    plain, _, _, places = held()
    assert all(places.same() for _ in range(asked))
    plain["a"] = 2.5
    assert not places.same()
    assert places.now()[0] == 2.5
    places.see(0, plain["a"])
    assert places.same()
    assert places.same()
    del plain["a"]
    assert not places.same()
    assert places.now()[0] == "gone"


def test_no_places_are_the_same() -> None:
    places = SeenPlaces()
    assert places.same()
    assert places.same()
