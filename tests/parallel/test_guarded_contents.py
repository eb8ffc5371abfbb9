"""Guards on objects that many modules share: each is looked at once, and every change is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from autoparallel.graph.attribute_read import ABSENT, UNKNOWN, AttributeRead, Where
from autoparallel.parallel.frozen_values import equal, frozen
from autoparallel.parallel.guards import Guards


class Configuration:
    """Settings that all modules refer to."""

    def __init__(self) -> None:
        self.size, self.names, self.labels = 8, ["a", "b"], {0: "no", 1: "yes"}


class Other(Configuration):
    pass


class Configured(nn.Module):
    def __init__(self, config: Configuration) -> None:
        super().__init__()
        self.config = config


def guarded() -> tuple[Configuration, Guards]:
    config = Configuration()
    model = nn.Sequential(*(Configured(config) for _ in range(3)))
    reads = [AttributeRead(str(n), (), "config", Where.INSTANCE, UNKNOWN) for n in range(3)]
    return config, Guards(model, reads)


def test_a_shared_object_is_looked_at_once() -> None:
    config, guards = guarded()
    assert guards.hold()
    assert not guards.kept
    assert sum(getattr(each, "owner", None) is config for each, _ in guards.lists) == 1


def test_equal_values_are_right() -> None:
    config, guards = guarded()
    config.names = list(config.names)
    assert guards.hold()
    config.names.append("c")
    assert not guards.hold()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "value": lambda config: setattr(config, "size", 9),
    "type": lambda config: setattr(config, "size", 8.0),
    "new": lambda config: setattr(config, "more", 1),
    "gone": lambda config: delattr(config, "size"),
    "list": lambda config: config.names.reverse(),
    "dictionary": lambda config: config.labels.update({1: "maybe"}),
    "class": lambda config: setattr(config, "__class__", Other),
    "attributes": lambda config: setattr(config, "__dict__", {**vars(config), "size": 9}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change: str) -> None:
    config, guards = guarded()
    CHANGES[change](config)
    assert not guards.hold()


def test_a_class_is_looked_into_without_its_view() -> None:
    class Scaled(nn.Module):
        scale = 2.0

    class Derived(Scaled):
        pass

    module = Derived()
    guards = Guards(module, [AttributeRead("", (), "scale", Where.CLASS, 2.0)])
    assert not guards.mappings  # each costs twice as much as a dictionary
    assert guards.hold()
    for owner in (module, Derived):  # they had none of their own
        owner.scale = 2.0
        assert not guards.hold()
        del owner.scale
        assert guards.hold()
    Scaled.scale = 3.0
    assert not guards.hold()


def test_an_absence_that_others_may_end() -> None:
    """A forward that sets an attribute itself is right with both."""
    module = nn.Identity()
    read = AttributeRead("", (), "count", Where.INSTANCE, ABSENT, others=(1,))
    guards = Guards(module, [read])
    assert guards.hold()
    module.count = 1
    assert guards.hold()
    module.count = 2
    assert not guards.hold()


def test_a_function_under_many_decorators_stays_itself() -> None:
    """Decorators hold each other in cells, deeper than containers are looked into."""

    def decorated(function: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: function()

    settings = {"scale": 1.0}

    def scale() -> float:
        return settings["scale"]

    for _ in range(4):
        scale = decorated(scale)
    before = frozen(scale)
    assert equal(before, frozen(scale))
    settings["scale"] = 2.0
    assert not equal(before, frozen(scale))


def test_a_list_in_itself_is_compared_to_an_end() -> None:
    one: list[Any] = []
    other: list[Any] = []
    one.append((one,))
    other.append((other,))
    assert not equal(one, other)
