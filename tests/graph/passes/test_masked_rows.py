"""Rows that a mask drops: split, models that leave them out give what the original gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from broad_cases import share_of
from torch import nn

import autoparallel

NODES, EDGES, WIDTH, CLASSES = 7, 17, 6, 5
Tensor = torch.Tensor


def summed(x: Tensor, links: Tensor, kept: Tensor) -> Tensor:
    """Messages along links to others, and from each node to itself; by the number of both."""
    own = torch.arange(x.shape[0]).view(1, -1).repeat(2, 1)
    links = torch.cat([links[:, links[0] != links[1]], own], dim=1)
    ones = torch.ones(links.shape[1], dtype=x.dtype)
    count = x.new_zeros(x.shape[0]).scatter_add_(0, links[1], ones)
    sent = x.index_select(0, links[0]) * (count**-0.5)[links[0], None]
    return torch.zeros_like(x).index_add(0, links[1], sent)


def attended(x: Tensor, links: Tensor, kept: Tensor) -> Tensor:
    """Weights of messages that are a softmax over the links that end in one node."""
    links = links[:, links[0] != links[1]]
    score = (x[links[0]] * x[links[1]]).sum(-1)
    at_most = score.new_zeros(x.shape[0])
    at_most = at_most.scatter_reduce(0, links[1], score.detach(), "amax", include_self=False)
    weight = (score - at_most[links[1]]).exp()
    total = torch.zeros(x.shape[0], dtype=x.dtype).scatter_add(0, links[1], weight)
    weight = weight / (total[links[1]] + 1e-16)
    places = links[1].view(-1, 1).expand(-1, x.shape[1])
    return torch.zeros_like(x).scatter_add(0, places, weight.unsqueeze(-1) * x[links[0]])


def far(x: Tensor, links: Tensor, kept: Tensor) -> Tensor:
    """One over distances, which are zero where a link leads back."""
    links = links[:, links[0] != links[1]]
    distance = (x[links[0]] - x[links[1]]).norm(dim=-1, keepdim=True)
    return torch.zeros_like(x).index_add(0, links[0], x[links[1]] / distance)


def written(x: Tensor, links: Tensor, kept: Tensor) -> Tensor:
    """The weight of a link that leads back takes the place of a node's own."""
    mask = links[0] != links[1]
    weights = x[links[0]].sum(-1)
    own = torch.ones(x.shape[0], dtype=x.dtype)
    own[links[0][~mask]] = weights[~mask]
    return x * own[:, None]


def from_the_end(x: Tensor, links: Tensor, kept: Tensor) -> Tensor:
    """Places that are counted from the end, of which -1 is the last."""
    weights = torch.ones(x.shape[0], dtype=x.dtype)
    places = -1 - torch.arange(x.shape[0])
    weights[places[kept]] = x[kept].sum(-1)
    return x * weights[:, None]


def placed(x: Tensor, links: Tensor, kept: Tensor) -> Tensor:
    """Places instead of a mask."""
    (places,) = torch.where(kept)
    return torch.zeros_like(x).index_add(0, places, x[places].exp())


def labelled(x: Tensor, links: Tensor, kept: Tensor) -> Tensor:
    """Labels that there are for some rows alone, and are no places of the others."""
    labels = torch.where(kept, torch.arange(x.shape[0]) % x.shape[1], -100)
    chosen = x.log_softmax(-1)[labels >= 0]
    return x - chosen.gather(1, labels[labels >= 0][:, None]).mean().nan_to_num()


def distant(x: Tensor, links: Tensor, kept: Tensor) -> Tensor:
    """One over lengths, which are zero where a row is dropped."""
    lengths = torch.where(kept[:, None], x, 0 * x).norm(dim=-1)
    return x + torch.cat([lengths[kept], 1 + lengths]).reciprocal().sum()


def mean(x: Tensor, links: Tensor, kept: Tensor) -> Tensor:
    return x + x[kept].square().mean()


def of_some(x: Tensor, links: Tensor, kept: Tensor) -> Tensor:
    """Numbers of a mask of all dims, of which the others have no logarithm."""
    return x + x[x > 0].log().sum()


def scored(x: Tensor, links: Tensor, kept: Tensor) -> Tensor:
    labels = torch.arange(x.shape[0]) % x.shape[1]
    return x * F.cross_entropy(x[kept], labels[kept])


def scored_tokens(x: Tensor, links: Tensor, kept: Tensor) -> Tensor:
    """A mask of several dims, as of tokens."""
    tokens = x.view(1, *x.shape).expand(2, -1, -1)
    kept = torch.stack([kept, ~kept])
    labels = torch.arange(2 * x.shape[0]).view(2, -1) % x.shape[1]
    return x * F.cross_entropy(tokens[kept], labels[kept], reduction="sum")


def in_order(x: Tensor, links: Tensor, kept: Tensor) -> Tensor:
    return x + x[kept].cumsum(0).sum()


def counted(x: Tensor, links: Tensor, kept: Tensor) -> Tensor:
    chosen = x[kept]
    return x + chosen.sum() / chosen.shape[0]


def flat(x: Tensor, links: Tensor, kept: Tensor) -> Tensor:
    """Numbers of all rows in one vector."""
    return x + x[kept].flatten().square().sum()


def sorted_rows(x: Tensor, links: Tensor, kept: Tensor) -> Tensor:
    return x + x[kept].sort(0).values[0]


Step = Callable[[Tensor, Tensor, Tensor], Tensor]


class Net(nn.Module):
    """Two layers, with a step between rows in each."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.down = nn.Linear(WIDTH, CLASSES)
        self.step = step

    def forward(self, x: Tensor, links: Tensor, kept: Tensor) -> Tensor:
        for up in self.up:
            x = torch.relu(self.step(up(x), links, kept)) + x[:1]
        return self.down(x).square().mean()


def build(step: Step) -> Net:
    torch.manual_seed(0)
    return Net(step).double()


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    links = torch.randint(0, NODES, (2, EDGES), generator=generator)
    links[1, ::4] = links[0, ::4]  # these lead back
    kept = torch.arange(NODES) % 3 != 1
    x = torch.randn(NODES, WIDTH, generator=generator).double()
    return {"x": x, "links": links, "kept": kept}


STEPS = [summed, attended, far, written, from_the_end, placed, mean]
STEPS += [of_some, scored, scored_tokens, labelled, distant]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("step", share_of(STEPS, 4))
def test_rows_that_are_dropped_count_for_nothing(step: Step, world_size: int) -> None:
    """In one program, and no matter how many there are in a later call."""
    plan = autoparallel.make_plan(build(step), world_size, example_inputs=inputs())
    assert not plan.breaks
    others = inputs()
    others["kept"], others["links"] = ~others["kept"], others["links"][:, :-3]
    for given in (inputs(), others):
        split = autoparallel.simulate(build(step), plan=plan, example_inputs=given)
        model = build(step)
        loss = model(**given)
        loss.backward()
        torch.testing.assert_close(split.output, loss, rtol=1e-11, atol=1e-12)
        for path, own in model.named_parameters():
            torch.testing.assert_close(split.gradients[path], own.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("step", [written, of_some, labelled, distant])
def test_a_mask_that_keeps_no_row(step: Step) -> None:
    """Nothing is computed of rows that the forward never sees."""
    none = {**inputs(), "kept": torch.zeros(NODES, dtype=torch.bool)}
    none["links"] = torch.stack([torch.arange(EDGES), 1 + torch.arange(EDGES)]) % NODES
    plan = autoparallel.make_plan(build(step), 2, example_inputs=inputs())
    assert not plan.breaks
    split = autoparallel.simulate(build(step), plan=plan, example_inputs=none)
    model = build(step)
    loss = model(**none)
    loss.backward()
    torch.testing.assert_close(split.output, loss, rtol=1e-11, atol=1e-12)
    for path, own in model.named_parameters():
        torch.testing.assert_close(split.gradients[path], own.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("step", [in_order, counted, sorted_rows, flat])
def test_rows_that_are_more_than_rows_stay_python(step: Step) -> None:
    """Where the order or the number of those that are kept is part of the result."""
    plan = autoparallel.make_plan(build(step), 2, example_inputs=inputs())
    assert plan.breaks
    split = autoparallel.simulate(build(step), plan=plan, example_inputs=inputs())
    torch.testing.assert_close(split.output, build(step)(**inputs()), rtol=1e-11, atol=1e-12)
