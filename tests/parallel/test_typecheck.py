"""The type system of spmd_types accepts what is emitted, and refuses it with a conversion gone."""

from __future__ import annotations

import re
from collections.abc import Iterator

import attends
import expert_families
import image_decoder
import pytest
import spmd_types
import torch
import torch.distributed as dist
from broad_cases import share_of
from families import TRANSFORMERS, build, inputs_for
from forced_kernels import only_by
from torch.testing._internal.distributed.fake_pg import FakeStore

import autoparallel
from autoparallel.mesh import Mesh
from autoparallel.parallel.typecheck import typecheck_plan

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def fake_processes() -> Iterator[None]:
    """Rank 0 of two that do not exist."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("name", share_of(TRANSFORMERS, 3))
@pytest.mark.usefixtures("fake_processes", "one_trace")
def test_types_fit_and_a_planted_error_does_not(name: str, sequence_parallel: bool) -> None:
    """Each conversion in turn is replaced by its operand, each product that is summed over ranks by
    the part of it: every one is missed. With sequence parallelism each is waited for, so that it is
    a call of its own.
    """
    model, inputs = build(name, layers=1).float(), inputs_for(name)
    plan = autoparallel.make_plan(
        *(model, 2),
        example_inputs=inputs,
        sequence_parallel=sequence_parallel,
        overlap=not sequence_parallel,
    )
    sources: list[str] = []

    def keep(source: str) -> str:
        sources.append(source)
        return source

    typecheck_plan(model, plan, (), inputs, alter=keep)
    conversion, summed = r"= (overlap\.)?convert\((\w+),.*", r", group=\w+\)"
    lines = sources[0].splitlines()
    conversions = [line for line in lines if re.search(f"{conversion}|{summed}", line)]
    assert conversions
    for line in conversions:
        broken = re.sub(summed, ")", re.sub(conversion, r"= \2", line))
        # Where a split dim is joined or cut, the shapes do not fit either.
        with pytest.raises((spmd_types.SpmdTypeError, RuntimeError)) as caught:
            typecheck_plan(
                model, plan, (), inputs, alter=lambda s, o=line, n=broken: s.replace(o, n)
            )
        if not re.search(r"\bS\d", line.partition("tp,")[2]):
            assert isinstance(caught.value, spmd_types.SpmdTypeError)


@pytest.mark.parametrize("kind", ["experts_exchanged", "experts_summed", "experts_inner"])
@pytest.mark.usefixtures("fake_processes", "one_trace")
def test_types_of_split_experts_fit(kind: str) -> None:
    model, inputs = expert_families.build("listed"), expert_families.inputs_for()
    with expert_families.only(kind):
        plan = autoparallel.make_plan(model, mesh=Mesh(ep=2), example_inputs=inputs)
    assert any(kind in op.kernels for op in plan.ops)
    typecheck_plan(model, plan, (), inputs)


@pytest.mark.parametrize(
    "kernel", ["attention_ring", "attention_queries", "convolution_edges", "resample_edges"]
)
@pytest.mark.usefixtures("fake_processes")
def test_types_of_exchanged_parts_fit(kernel: str) -> None:
    if "attention" in kernel:
        model, inputs = attends.case("causal")
        arguments: tuple[torch.Tensor, ...] = tuple(inputs.values())
    else:
        model = image_decoder.Decoder((4, 2), groups=2, blocks=1)
        arguments = (torch.ones(1, 4, 3, 4), torch.ones(1, 3, 6, 8))
    with only_by(kernel, ranks=2):
        plan = autoparallel.make_plan(model, mesh=Mesh(cp=2), example_inputs=arguments)
    assert any(kernel in op.kernels for op in plan.ops)
    typecheck_plan(model, plan, arguments, {})


@pytest.fixture
def four_fake_processes() -> Iterator[None]:
    """Rank 0 of four that do not exist."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("data_parallel", [False, True])
@pytest.mark.usefixtures("four_fake_processes", "one_trace")
def test_types_fit_on_two_axes(data_parallel: bool) -> None:
    """A sum over one of the axes that is left out is missed, whatever the other axis does."""
    model, inputs = build("bert", layers=1).float(), inputs_for("bert")
    plan = autoparallel.make_plan(
        model, mesh=Mesh(dp=2, tp=2), example_inputs=inputs, data_parallel=data_parallel
    )
    sources: list[str] = []

    def keep(source: str) -> str:
        sources.append(source)
        return source

    typecheck_plan(model, plan, (), inputs, alter=keep)
    sums = [line for line in sources[0].splitlines() if re.search(r"= convert\(.*p, P, ", line)]
    assert sums or data_parallel
    for line in sums:
        broken = re.sub(r"= convert\((\w+),.*", r"= \1", line)
        with pytest.raises((spmd_types.SpmdTypeError, RuntimeError)):
            typecheck_plan(
                model, plan, (), inputs, alter=lambda s, o=line, n=broken: s.replace(o, n)
            )
