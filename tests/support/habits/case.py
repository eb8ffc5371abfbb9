"""A row of the table is given a Case: it splits models and compares them with the unsplit ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import autoparallel
from autoparallel.parallel.module_state import state_of
from autoparallel.parallel.parameters import whole_tensor

from .models import plain, rows

__all__ = ["Case", "whole"]

# What sums in another order may differ by, relative and absolute, in each type.
_TOLERANCES = {
    torch.float64: (1e-9, 1e-11),
    torch.complex128: (1e-9, 1e-11),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (1e-2, 1e-2),
    torch.bfloat16: (5e-2, 2e-2),
}
_SCALARS = (int, str, bool, type(None), torch.Size, torch.dtype)


def whole(value: Any) -> Any:
    """Return the whole tensor of a DTensor, and everything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@dataclasses.dataclass
class Case:
    """What a row is given.

    world_size, rank: of this launch. folder: an empty one that all ranks see. made: the split
    modules so far. computed: the type that a row computes in, where it is not that of its tensors:
    gradients of float32 that were computed in bfloat16 are as near as those are.
    """

    world_size: int
    rank: int
    folder: Path
    made: list[nn.Module] = dataclasses.field(default_factory=list)
    computed: torch.dtype = torch.float64

    def split(self, model: nn.Module, example: Any, **options: Any) -> Any:
        """Return the model, split over the ranks of this launch. example: its example inputs."""
        size = None if "mesh" in options else self.world_size
        module = autoparallel.autoparallelize(model, size, example_inputs=example, **options)
        self.made.append(module)
        return module

    def compare(
        self,
        script: Callable[[Any], Any],
        build: Callable[[], nn.Module] = plain,
        example: Any = None,
        *,
        before: Callable[[Any], Any] = lambda model: None,
        fails: bool = False,
        **options: Any,
    ) -> Any:
        """Run a script with a model and with the same one split, and compare what comes of both.

        Values that the script returns, and afterwards every parameter, buffer and gradient, must be
        equal. build: makes the model, the same at every call. example: example inputs; those of
        `Classifier` by default. before: is done with the model before it is split. fails: the
        script is a mistake, for which the unsplit module raises an error: the split one must raise
        the same, or refuse. Returns the split module.
        """
        example = rows(6, 0) if example is None else example
        unsplit = build()
        before(unsplit)
        failure: Exception | None = None
        try:
            expected = script(unsplit)
        except Exception as error:
            if not fails:
                raise RuntimeError("it fails with the unsplit module") from error
            failure = error
        if fails and failure is None:
            raise RuntimeError("the unsplit module does not fail")
        source = build()
        before(source)
        model = self.split(source, example, **options)
        try:
            found = script(model)
        except autoparallel.AutoParallelError:
            raise
        except Exception as error:
            if failure is None or _first_line(error) != _first_line(failure):
                raise
            raise SameError(_first_line(error)) from error
        if failure is not None:
            raise AssertionError(f"the unsplit module raises {type(failure).__name__}: {failure}")
        self.same(found, expected)
        self.same_module(model, unsplit)
        return model

    def same(self, found: Any, expected: Any, place: str = "it") -> None:
        """Require equal values, in any containers. place: what is compared, for the message."""
        found, expected = whole(found), whole(expected)
        if isinstance(expected, torch.Tensor):
            assert isinstance(found, torch.Tensor), f"{place} is a {type(found).__name__}"
            rtol, atol = _TOLERANCES.get(expected.dtype, (0, 0))
            if expected.is_floating_point():
                rtol, atol = max((rtol, atol), _TOLERANCES[self.computed])
            torch.testing.assert_close(
                found.detach(),
                expected.detach(),
                rtol=rtol,
                atol=atol,
                msg=lambda text: f"{place}: {text}",
            )
            needs = (found.requires_grad, expected.requires_grad)
            assert needs[0] == needs[1], f"{place} requires_grad is {needs[0]}, not {needs[1]}"
        elif isinstance(expected, Mapping):
            assert list(found) == list(expected), f"{place} has the keys {list(found)}"
            for key in expected:
                self.same(found[key], expected[key], f"{place}[{key!r}]")
        elif isinstance(expected, (list, tuple)):
            assert len(found) == len(expected), f"{place} has {len(found)} items"
            for index, item in enumerate(expected):
                self.same(found[index], item, f"{place}[{index}]")
        elif dataclasses.is_dataclass(expected):
            self.same(vars(found), vars(expected), place)
        elif isinstance(expected, float):
            self.same(
                torch.tensor(found, dtype=torch.float64),
                torch.tensor(expected, dtype=torch.float64),
                place,
            )
        else:
            assert isinstance(expected, _SCALARS), f"{place}: cannot compare {type(expected)}"
            assert found == expected, f"{place} is {found!r}, not {expected!r}"

    def same_module(self, model: nn.Module, unsplit: nn.Module) -> None:
        """Require equal parameters, gradients and buffers, under the same names."""
        expected = dict(unsplit.named_parameters(remove_duplicate=False))
        found = dict(model.named_parameters(remove_duplicate=False))
        assert list(found) == list(expected), f"its parameters are {list(found)}"
        for path, parameter in expected.items():
            self.same(self.whole(model, path, found[path]), parameter, path)
            gradient = found[path].grad
            assert (gradient is None) == (parameter.grad is None), (
                f"the gradient of {path} is {'missing' if gradient is None else 'there'}"
            )
            if parameter.grad is not None:
                self.same(self.whole(model, path, gradient), parameter.grad, f"{path}.grad")
        self.same(dict(model.named_buffers()), dict(unsplit.named_buffers()), "buffers")

    def whole(self, model: nn.Module, path: str, tensor: Any) -> torch.Tensor:
        """Return the whole of a parameter or its gradient, whatever its layout."""
        state = model.__dict__.get("_autoparallel")
        if not isinstance(tensor, DTensor) or state is None:
            return whole(tensor).detach().requires_grad_(tensor.requires_grad)
        layout = state_of(model).layouts.get(path)
        if layout is None:
            return whole(tensor)
        value = whole_tensor(tensor, layout, state.ranks)
        return value.requires_grad_(tensor.requires_grad)

    @contextmanager
    def group(self) -> Iterator[None]:
        """Have a process group within, also in the launch of one rank, which has none otherwise."""
        if dist.is_initialized():
            yield
            return
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()

    def meet(self) -> None:
        """Wait until all ranks are here."""
        if dist.is_initialized():
            dist.barrier()


def _first_line(error: Exception) -> str:
    """Return an error's kind and the first line of its message, as of the unsplit module's class.

    Python's own message names the function that was called, which is that of another class.
    """
    line = str(error).split("\n")[0].replace("Parallel", "")
    return f"{type(error).__name__}: {line}"


class SameError(Exception):
    """The split module raised the same kind of error as the unsplit one."""
