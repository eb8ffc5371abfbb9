"""What a forward leaves in attributes, in lists and in objects is there after a split call too."""

from __future__ import annotations

import collections
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from broad_cases import share_of
from split_ranks import as_unsplit
from torch import nn
from torch.utils.checkpoint import checkpoint

import autoparallel
from autoparallel.capture import export
from autoparallel.capture.attribute_writes import Attributes
from autoparallel.capture.equal_blocks import token_of
from autoparallel.capture.export import capture
from autoparallel.errors import CaptureError
from autoparallel.parallel.frozen_values import equal, frozen

X = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(6, 8)


class Net(nn.Module):
    """Two products that leave something behind between them."""

    def __init__(self, leave: Callable[[Any, torch.Tensor], None]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.leave = nn.Linear(8, 12), nn.Linear(12, 8), leave
        self.box: list[Any] = []
        self.table: dict[str, Any] = {"first": 1.0}
        self.queue: collections.deque[Any] = collections.deque([1.0], maxlen=2)
        self.context = types.SimpleNamespace(kept=[], scale=2.0, seen=None)
        self.a.shared = self.context  # type: ignore[assignment]
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.a(x) * self.context.scale
        self.leave(self, hidden)
        loss: torch.Tensor = self.b(hidden).square().mean()
        return loss


class Context:
    def __init__(self) -> None:
        self.scale, self.seen = 1.0, None


def fill(box: Any, *items: Any) -> None:
    box.clear()
    box.extend(items)


# What is left, and how it is seen afterwards.
LEFT: dict[str, tuple[Callable[[Any, torch.Tensor], Any], Callable[[Any], Any]]] = {
    "a list that is filled": (
        lambda m, h: fill(m.box, h.sum(), h.tanh().mean()),
        lambda m: list(m.box),
    ),
    "a new list": (
        lambda m, h: setattr(m, "new", [h.sum(), {"mean": h.mean(), "name": "hidden"}]),
        lambda m: [m.new[0], m.new[1]["mean"], m.new[1]["name"] == "hidden"],
    ),
    "a tuple of a size and a tensor": (
        lambda m, h: setattr(m, "new", (h.shape[0], h.mean())),
        lambda m: list(m.new),
    ),
    "a size": (lambda m, h: setattr(m, "new", h.shape[0]), lambda m: m.new),
    "a list of numbers": (lambda m, h: setattr(m, "new", [1, 2]), lambda m: m.new),
    "an item of a dict": (
        lambda m, h: m.table.update(first=h.mean(), second=3.0),
        lambda m: [m.table["first"], m.table["second"]],
    ),
    "a dict that is filled": (
        lambda m, h: (m.table.clear(), m.table.update(other=h.mean())),
        lambda m: [sorted(m.table) == ["other"], m.table["other"]],
    ),
    "a queue": (lambda m, h: fill(m.queue, h.mean()), lambda m: list(m.queue)),
    "an object": (
        lambda m, h: setattr(m.context, "seen", h.mean()),
        lambda m: [m.context.seen, m.context is m.a.shared],
    ),
    "a list in an object": (
        lambda m, h: fill(m.context.kept, h.mean(), h.sum()),
        lambda m: [*m.context.kept, m.context is m.a.shared],
    ),
}


@pytest.mark.parametrize("kind", share_of(LEFT, 3))
def test_what_is_left_is_seen_after_each_call(kind: str) -> None:
    """It can go into the loss, other inputs leave other values, and settings stay the user's."""
    leave, see = LEFT[kind]

    def script(model: Any) -> Any:
        for scale, rows in ((1.0, 6), (2.0, 4)):
            model.context.scale = 2.0 + scale
            loss = model(X[:rows] * scale)
            seen = see(model)
            tensors = seen if isinstance(seen, list) else [seen]
            loss = loss + sum(t.square().sum() for t in tensors if isinstance(t, torch.Tensor))
            loss.backward()
            yield loss
            yield tensors
            assert model.context.scale == 2.0 + scale

    assert not capture(Net(leave), (X,), {}).part
    as_unsplit(Net(leave), 2, (X,), script)


def test_a_list_that_the_caller_keeps_is_not_filled_again() -> None:
    """A forward that makes a new list at each call leaves the one before as it was."""

    def script(model: Any) -> Any:
        model(X)
        first = model.new
        model(2 * X)
        yield [first[0], model.new[0]]

    as_unsplit(Net(LEFT["a new list"][0]), 2, (X,), script)


def test_a_list_that_was_full_before_and_is_emptied_between_calls() -> None:
    model = Net(LEFT["a list that is filled"][0])
    with torch.no_grad():
        model(X)

    def script(model: Any) -> Any:
        for _ in range(2):
            model.box.clear()
            model(X)
            yield list(model.box)

    as_unsplit(model, 2, (X,), script)


@pytest.mark.parametrize(
    "leave",
    [
        lambda m, h: m.box.append(h),
        lambda m, h: setattr(m, "new", types.SimpleNamespace(mean=h.mean())),
        lambda m, h: setattr(m, "new", {1, 2}),
        lambda m, h: setattr(m, "new", m.b),
        lambda m, h: delattr(m, "box"),
    ],
    ids=["grows", "new-object", "set", "module", "deletes"],
)
def test_what_could_not_be_left_again_is_refused(leave: Any) -> None:
    """Such a module stays the user's Python."""
    with pytest.raises(CaptureError, match=r"changes its attribute (box|new)|the modules in it"):
        capture(Net(leave), (X,), {})


@pytest.mark.parametrize("kind", ["namespace", "object", "dict"])
def test_what_is_beside_a_place_that_is_written_is_still_guarded(kind: str) -> None:
    """A forward reads and writes one object: the first changes a program, the second does not."""
    make: Any = {
        "namespace": lambda: types.SimpleNamespace(scale=1.0, seen=None),
        "object": Context,
        "dict": lambda: {"scale": 1.0, "seen": None},
    }[kind]
    get = dict.get if kind == "dict" else getattr
    put: Any = dict.__setitem__ if kind == "dict" else setattr

    def leave(model: Any, hidden: torch.Tensor) -> None:
        put(model.kept, "seen", hidden.mean() * get(model.kept, "scale"))

    model: Any = Net(leave)
    model.kept = make()

    def script(model: Any) -> Any:
        for scale in (1.0, 2.0, 2.0):
            put(model.kept, "scale", scale)
            loss = model(X)
            yield [loss, get(model.kept, "seen")]
        state = vars(model).get("_autoparallel")
        return None if state is None else sum(len(entries) for entries in state.entries.values())

    assert as_unsplit(model, 1, (X,), script) == 2


def test_a_forward_may_register_hooks_for_itself_once() -> None:
    """As models do that collect their hidden states: the trace has what the hooks do."""

    def leave(model: Any, hidden: torch.Tensor) -> None:
        if not model.b._forward_pre_hooks:
            model.b.register_forward_pre_hook(lambda _, args: (args[0] * 2,))

    def script(model: Any) -> Any:
        model(X)
        for scale in (1.0, 2.0):
            loss = model(X * scale)
            loss.backward()
            yield loss

    assert not capture(Net(leave), (X,), {}).part
    as_unsplit(Net(leave), 2, (X,), script)


def test_an_op_in_an_attribute_is_the_same_when_it_was_called() -> None:
    """Torch's ops keep caches, which are no state of a model's."""
    before = frozen(functools.partial(torch.ops.aten.cosh.default, torch.ones(2)))
    tensor = before[2][1][0]
    torch.ops.aten.cosh.default(torch.ones(3, device="meta"))
    vars(torch.ops.aten.cosh.default)["seen"] = 1
    try:
        after = frozen(functools.partial(torch.ops.aten.cosh.default, tensor))
        assert equal(before[1], after[1])
    finally:
        del vars(torch.ops.aten.cosh.default)["seen"]


def test_nothing_is_written_where_nothing_changes() -> None:
    model = Net(LEFT["a list that is filled"][0])
    before = Attributes(model)
    model.box = list(model.box)
    assert before.written().places == ()


def test_a_function_of_torch_is_the_same_when_it_was_called() -> None:
    """Torch remembers things in attributes of its functions; no depth tells two looks apart."""
    run = functools.partial(checkpoint, use_reentrant=False)
    values = (run, checkpoint, [run], [[run]], [[[run]]])
    vars(checkpoint.__wrapped__).pop("__dynamo_disable", None)
    before = [token_of(value, {}, depth=3) for value in values]
    run(torch.sin, X)
    after = [token_of(value, {}, depth=3) for value in values]
    assert after == before


class KeepsTheType(nn.Module):
    """It sets an attribute before it reads it. lazy: another one in its first call alone."""

    scale = 1.0

    def __init__(self, lazy: bool = False) -> None:
        super().__init__()
        self.layer, self.lazy = nn.Linear(4, 4), lazy

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.given = x.dtype
        if self.lazy:
            self.scale, self.lazy = 2.0, False
        return (self.layer(x) * self.scale).to(self.given)


def test_what_a_forward_sets_before_it_reads_it_need_not_be_there() -> None:
    model, x = KeepsTheType(), torch.ones(2, 4)
    plan = autoparallel.make_plan(model, 2, example_inputs=(x,))
    assert not plan.breaks
    output = autoparallel.simulate(model, plan=plan, example_inputs=(x,)).output
    torch.testing.assert_close(output, model(x))


def test_what_the_first_call_alone_sets_is_guarded_in_the_second() -> None:
    model, x = KeepsTheType(lazy=True), torch.ones(2, 4)
    expected = model.layer(x)
    split = autoparallel.autoparallelize(model, 1, example_inputs=(x,))
    for scale in (2.0, 3.0):
        torch.testing.assert_close(split(x), expected * scale)
        split.scale = 3.0


class Noting(nn.Module):
    """Notes the type of its input before it reads the note; or reads the note of the last call."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.linear, self.first = nn.Linear(4, 4), first
        self.kind: torch.dtype | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.first:
            self.kind = x.dtype
        scale = 2.0 if self.kind is not None else 1.0
        self.kind = x.dtype
        return self.linear(x.to(self.kind)) * scale


@pytest.mark.parametrize("first", [True, False])
def test_what_is_set_before_it_is_read_needs_no_second_trace(
    monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """The next call is the same, as it reads nothing that this one has left."""
    twice: list[bool] = []
    original = export._exported

    def noted(*args: Any, **kwargs: Any) -> Any:
        twice.append(kwargs.get("twice", False))
        return original(*args, **kwargs)

    monkeypatch.setattr(export, "_exported", noted)
    if first:
        captured = capture(Noting(first), (torch.ones(2, 4),), {})
        assert [str(place) for place in captured.left] == ["kind"]
    else:
        with pytest.raises(CaptureError, match="goes another way"):
            capture(Noting(first), (torch.ones(2, 4),), {})
    assert any(twice) != first


class Structure(nn.Module):
    """Says how long the words are, and how often they were joined; begins anew at each call."""

    def begin(self, x: torch.Tensor) -> None:
        self.length, self.joined = x.shape[1], 1

    def join(self, x: torch.Tensor) -> torch.Tensor:
        self.joined *= 2
        return x[:, : self.length // self.joined] / self.joined


class Joining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.structure, self.layers = Structure(), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.structure.begin(x)
        for layer in self.layers:
            x = self.structure.join(layer(x))
        return x.square().mean()


def test_sizes_that_are_set_anew_and_changed_are_those_of_each_call() -> None:
    """They are in the program, and are left where they are in a call of the user's own."""

    def script(model: nn.Module) -> Any:
        for length in (8, 12):
            loss = model(torch.linspace(-1, 1, 2 * length * 8).double().reshape(2, length, 8))
            loss.backward()
            yield loss, torch.tensor([model.structure.length, model.structure.joined])

    torch.manual_seed(0)
    model = Joining()
    as_unsplit(model, 2, (torch.linspace(-1, 1, 128).double().reshape(2, 8, 8),), script)
    plan = autoparallel.make_plan(Joining(), 2, example_inputs=torch.ones(2, 8, 8).double())
    assert not plan.breaks
