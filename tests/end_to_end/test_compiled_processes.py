"""torch.compile of split modules whose ranks are processes: one graph, and the same numbers."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
import zoo
from processes import run_processes
from torch._dynamo.utils import counters

import autoparallel
from autoparallel.mesh import Mesh
from autoparallel.support.pytree import flatten

WIDE = ["gpt", "bert", *(f"zoo/{name}" for name in zoo.FAMILIES)]


def compared(rank: int, names: tuple[str, ...], backend: str, options: dict[str, Any]) -> list[Any]:
    """Of each family: its name, whether all is the eager module's, graphs and breaks."""
    rows = []
    for name in names:
        torch._dynamo.reset()
        counters.clear()
        if name.startswith("zoo/"):
            family = name.removeprefix("zoo/")
            model, inputs = zoo.build(family, layers=2, dropout=0.1), zoo.inputs_for(family)
        else:
            drops = {} if name == "mlp" else {"dropout": 0.1}
            model, inputs = families.build(name, **drops), families.inputs_for(name)
        eager = autoparallel.autoparallelize(model, example_inputs=inputs, **options)
        module = autoparallel.apply_plan(model, eager.plan)
        compiled = torch.compile(module, backend=backend, fullgraph=True)
        found = [step(call, each, inputs) for call, each in ((eager, eager), (compiled, module))]
        equal = len(found[0]) == len(found[1]) and same_steps(*found)
        rows.append((name, equal, counters["stats"]["unique_graphs"], len(counters["graph_break"])))
    return rows


def same_steps(eager: list[torch.Tensor], compiled: list[torch.Tensor]) -> bool:
    """Return whether all tensors of two steps are equal but for rounding.

    Some gradients are rounding alone: attention does not depend on the bias of keys, which adds the
    same to all of a row's scores. What is so much smaller than the rest is nothing.
    """
    numbers = [t for t in eager if t.is_floating_point() and t.numel()]
    least = max(torch.finfo(t.dtype).eps * float(t.abs().max()) for t in numbers)
    return all(same(*pair, least) for pair in zip(eager, compiled, strict=True))


def same(eager: torch.Tensor, compiled: torch.Tensor, least: float) -> bool:
    """Return whether two tensors are equal but for rounding. least: what is less is none.

    A product adds up in an order that depends on how its operands lie in memory, and that is the
    compiler's choice: in an eager program a split dim may lie outermost.
    """
    if not eager.is_floating_point() or not eager.numel():
        return torch.equal(eager, compiled)
    if eager.abs().max() < least > compiled.abs().max():
        return eager.shape == compiled.shape
    most = 16 * torch.finfo(eager.dtype).eps * eager.abs().max()
    return eager.shape == compiled.shape and bool((eager - compiled).abs().max() <= most)


def step(call: Any, module: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """All tensors that two steps return, and all gradients, this rank's parts."""
    for _ in range(2):
        module.zero_grad()
        output = call(**inputs)
        loss = output["loss"] if isinstance(output, dict) else output.loss
        loss.backward()
    tensors = [*flatten(output)[0], *(p.grad for p in module.parameters() if p.grad is not None)]
    return [t.to_local() if hasattr(t, "to_local") else t for t in (x.detach() for x in tensors)]


def test_a_model_is_one_graph_on_two_ranks() -> None:
    rows = run_processes(compared, 2, ("mlp",), "aot_eager", {"world_size": 2})
    assert rows == [[("mlp", True, 1, 0)]] * 2


@pytest.mark.broad
def test_a_model_is_one_graph_on_several_axes() -> None:
    """Gradients are summed over one of them outside of the graph, in their bucket."""
    rows = run_processes(compared, 4, ("mlp",), "aot_eager", {"mesh": Mesh(dp=2, tp=2)})
    assert rows == [[("mlp", True, 1, 0)]] * 4


@pytest.mark.broad
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", WIDE)
def test_families_are_one_graph(name: str, world_size: int) -> None:
    rows = run_processes(compared, world_size, (name,), "aot_eager", {"world_size": world_size})
    assert rows == [[(name, True, 1, 0)]] * world_size
