"""Modes and subclasses that watch calls can be told and left."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from autoparallel.support import torch_private


def test_modes_can_be_left() -> None:
    """A Function's passes are run without the modes that are at work around them."""
    with torch_private.FakeTensorMode() as mode:
        with torch_private.without_modes():
            assert torch_private.current_dispatch_mode() is None
            assert type(torch.ones(2)) is torch.Tensor
        assert torch_private.current_dispatch_mode() is mode
    seen: list[object] = []

    class Counts(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Counts():
        with torch_private.without_function_modes():
            torch.ones(2)
        assert not seen
        torch.ones(2)
        assert seen == [torch.ones]


def test_functions_of_subclasses_can_be_left_out() -> None:
    """The hot path reads attributes of split tensors without asking their class."""
    seen: list[object] = []

    class Counts(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    tensor = torch.ones(2).as_subclass(Counts)
    seen.clear()
    with torch_private.without_function_overrides():
        assert not tensor.requires_grad
        assert not seen
        # Hooks of the user's run within, and compute with such tensors.
        with torch_private.with_function_overrides():
            assert not tensor.requires_grad
        assert len(seen) == 1
        assert not tensor.requires_grad
    assert len(seen) == 1
    assert not tensor.requires_grad
    assert len(seen) == 2


def test_the_innermost_modes_are_told() -> None:
    """None outside of all modes, and the one that was entered last inside."""

    class Ops(torch_private.TorchDispatchMode):  # type: ignore[name-defined, misc]
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            return function(*args, **(kwargs or {}))

    class Calls(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            return function(*args, **(kwargs or {}))

    assert torch_private.current_dispatch_mode() is None
    assert torch_private.current_function_mode() is None
    with Ops() as ops, Ops() as inner, Calls() as calls:
        assert torch_private.current_dispatch_mode() is inner is not ops
        assert torch_private.current_function_mode() is calls


def test_tensors_inside_a_function_transform_are_recognized() -> None:
    seen = []

    def look(x):
        seen.append(torch_private.is_functorch_wrapped_tensor(x))
        seen.append(torch_private.in_function_transform())
        return x * 2

    torch.func.vmap(look)(torch.ones(3))
    look(torch.ones(3))
    assert seen == [True, True, False, False]


def test_outside_of_transforms() -> None:
    """A value that is computed outside is a constant for the transform."""

    def square(x: torch.Tensor) -> torch.Tensor:
        assert torch_private.in_function_transform()
        with torch_private.outside_transforms():
            assert not torch_private.in_function_transform()
            scale = torch.ones(()) * 3
        return scale * x * x

    x = torch.tensor(2.0)
    assert float(torch.func.grad(square)(x)) == 12.0
    assert float(torch.func.jvp(square, (x,), (x,))[1]) == 24.0
    with torch_private.outside_transforms():
        assert not torch_private.in_function_transform()


def test_transforms_can_be_run_by_another() -> None:
    """By whatever name they were imported, and the next one as torch runs it."""
    ran: list[str] = []

    def run(original, function, *args, **kwargs):
        ran.append(original.__name__)
        return original(function, *args, **kwargs)

    x = torch.ones(2)
    with torch_private.replaced_transforms(run):
        assert torch.equal(torch.vmap(torch.sin)(x), x.sin())
        torch.func.grad(torch.sum)(x)
        torch.func.jvp(torch.sin, (x,), (x,))
        # Others, such as one that loads data, have torch's own.
        with ThreadPoolExecutor(1) as threads:
            assert torch.equal(threads.submit(torch.vmap(torch.sin), x).result(), x.sin())
    torch.vmap(torch.sin)(x)
    assert ran == ["vmap_impl", "grad_impl", "grad_and_value_impl", "_jvp_with_argnums"]


def test_plain_ops_of_a_transform() -> None:
    """They write to nothing, and of modes around it the user's alone see it run."""
    seen: list[object] = []

    class Counts(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    def squares(x):
        made = torch.empty_like(x)
        made[:] = torch.vmap(torch.square)(x)
        return [made]

    x = torch.arange(3.0)
    with Counts():
        torch_private.plain_ops_of(squares, [x])
    assert torch.square in seen
    Counts.__module__ = "torch.fx"
    with Counts():
        before = len(seen)
        program = torch_private.plain_ops_of(squares, [x])
        assert len(seen) == before
        assert torch_private.current_function_mode() is not None
    assert torch.equal(program(x)[0], x.square())
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not any(name.split(".")[1].endswith("_") for name in names), names


def test_modes_of_the_users_are_told() -> None:
    """Not those of torch, such as that of a default device, whose device is told."""

    class Sees(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    class SeesOps(torch_private.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    assert torch_private.users_function_modes() == torch_private.users_dispatch_modes() == []
    assert torch_private.default_device_kind() == "cpu"
    with torch.device("meta"), Sees() as one, torch_private.FakeTensorMode(), SeesOps() as other:
        assert torch_private.users_function_modes() == [one]
        assert torch_private.users_dispatch_modes() == [other]
        assert torch_private.default_device_kind() == "meta"
