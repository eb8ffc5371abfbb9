"""Loops over the experts that a token has chosen: a turn for every expert is traced, or refused."""

from __future__ import annotations

from collections.abc import Iterator

import expert_families
import pytest
import torch
from families import relative_error, worst_gradient
from torch import nn
from torch.nn import functional

import autoparallel
from autoparallel.capture.graph_breaks import trace
from autoparallel.errors import CaptureError
from autoparallel.graph.row_program import ROUTED
from autoparallel.mesh import Mesh
from autoparallel.options import Options
from autoparallel.planning.search import search
from autoparallel.rules.lookup import find_rule

WIDTH, EXPERTS, CHOICES = 4, 5, 2


class Routed(nn.Module):
    """Tokens with their experts, of which the last one is chosen by few. form: of the loop."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 6), nn.SiLU(), nn.Linear(6, WIDTH))
            for _ in range(EXPERTS)
        )
        self.named = nn.ModuleDict({f"expert_{at}": each for at, each in enumerate(self.experts)})
        self.up = nn.Parameter(torch.randn(EXPERTS, 6, WIDTH) / 2)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, 6) / 2)
        with torch.no_grad():
            self.gate.bias[-1] -= 0.4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(CHOICES, -1)
        # The last place of the tables' loop stands for experts of other ranks.
        with torch.no_grad():
            count = EXPERTS + (self.form == "tables")
            masks = functional.one_hot(chosen, num_classes=count).permute(2, 1, 0)
            used = torch.greater(masks.sum(dim=(-1, -2)), 0)
        loop = getattr(self, self.form)
        return loop(x, weights, masks, used).pow(2).sum()

    def listed(self, x, weights, masks, used):
        y = torch.zeros_like(x)
        for number in used.nonzero():
            choice, token = torch.where(masks[number].squeeze(0))
            rows = x[None, token].reshape(-1, WIDTH)
            made = self.experts[number](rows) * weights[token, choice, None]
            y.index_add_(0, token, made.to(x.dtype))
        return y

    def called(self, x, weights, masks, used):
        y = torch.zeros_like(x)
        for number in torch.where(used)[0]:
            choice, token = torch.where(masks[number])
            y[token] += self.named[f"expert_{number}"](x[token]) * weights[token, choice, None]
        return y

    def tables(self, x, weights, masks, used):
        y = torch.zeros_like(x)
        for number in used.nonzero():
            number = number[0]
            if number == EXPERTS:
                continue
            choice, token = torch.where(masks[number])
            rows = functional.silu(functional.linear(x[token], self.up[number]))
            made = functional.linear(rows, self.down[number])
            y.index_add_(0, token, made * weights[token, choice, None])
        return y

    # -- other loops: a turn more would do something

    def counted(self, x, weights, masks, used):
        y = torch.zeros_like(x)
        for place, number in enumerate(used.nonzero()):
            choice, token = torch.where(masks[number].squeeze(0))
            made = self.experts[place](x[token]) * weights[token, choice, None]
            y.index_add_(0, token, made)
        return y

    def collected(self, x, weights, masks, used):
        y = torch.zeros_like(x)
        norms = []
        for number in used.nonzero():
            choice, token = torch.where(masks[number].squeeze(0))
            made = self.experts[number](x[token]) * weights[token, choice, None]
            y.index_add_(0, token, made)
            norms.append(self.experts[number][0].weight.norm())
        return y + sum(norms)

    def dense(self, x, weights, masks, used):
        y = torch.zeros_like(x)
        for number in used.nonzero():
            y += self.experts[number](x)
        return y

    def crowded(self, x, weights, masks, used):
        y = torch.zeros_like(x)
        for number in torch.greater(masks.sum(dim=(-1, -2)), 1).nonzero():
            choice, token = torch.where(masks[number].squeeze(0))
            made = self.experts[number](x[token]) * weights[token, choice, None]
            y.index_add_(0, token, made)
        return y

    def shifted(self, x, weights, masks, used):
        y = torch.zeros_like(x)
        for number in used.nonzero():
            choice, token = torch.where(masks[number - 1].squeeze(0))
            made = self.experts[number](x[token]) * weights[token, choice, None]
            y.index_add_(0, token, made)
        return y

    def first(self, x, weights, masks, used):
        y = torch.zeros_like(x)
        for number in used.nonzero():
            choice, token = torch.where(masks[number].squeeze(0))
            made = self.experts[number](x[token]) * weights[token, choice, None]
            y.index_add_(0, token, made)
            if number > 1:
                break
        return y

    def late(self, x, weights, masks, used):
        y = torch.zeros_like(x)
        last = None
        for number in used.nonzero():
            choice, token = torch.where(masks[number].squeeze(0))
            made = self.experts[number](x[token]) * weights[token, choice, None]
            y.index_add_(0, token, made)
            last = number
        return y * self.up[last].sum()

    def one(self, y, x, weights, masks, number):
        """What a turn of an ordinary loop does."""
        choice, token = torch.where(masks[number].squeeze(0))
        y.index_add_(0, token, self.experts[number](x[token]) * weights[token, choice, None])

    def tallied(self, x, weights, masks, used):
        y, hits = torch.zeros_like(x), 0
        for number in used.nonzero():
            self.one(y, x, weights, masks, number)
            hits += 1
        return y / hits

    def remembered(self, x, weights, masks, used):
        y = torch.zeros_like(x)
        for number in used.nonzero():
            last = int(number)
            self.one(y, x, weights, masks, number)
        return y * last

    def listed_in_python(self, x, weights, masks, used):
        y, hits = torch.zeros_like(x), []
        for number in used.nonzero():
            self.one(y, x, weights, masks, number)
            hits.append(None)
        return y / len(hits)

    def kept_for_a_moment(self, x, weights, masks, used):
        y, self.hits = torch.zeros_like(x), 0
        for number in used.nonzero():
            self.one(y, x, weights, masks, number)
            self.hits += 1
        y = y / self.hits
        del self.hits
        return y

    def shared_with_a_function(self, x, weights, masks, used):
        y, hits = torch.zeros_like(x), 0

        def count():
            nonlocal hits
            hits += 1

        for number in used.nonzero():
            self.one(y, x, weights, masks, number)
            count()
        return y / hits

    def comprehended(self, x, weights, masks, used):
        y = torch.zeros_like(x)
        for number in [int(number) for number in used.nonzero()]:
            y += self.experts[number](x)
        return y

    def generated(self, x, weights, masks, used):
        def numbers():
            for number in used.nonzero():  # noqa: UP028  # another way to take the tensor apart
                yield number

        y, hits = torch.zeros_like(x), 0
        for number in numbers():
            self.one(y, x, weights, masks, number)
            hits += 1
        return y / hits

    def signed(self, x, weights, masks, used):
        """Numbers below zero hide others in a sum."""
        y, logits = torch.zeros_like(x), self.gate(x)
        table = (logits - logits.mean()).T
        for number in (table.sum(-1) > 0).nonzero():
            (token,) = torch.where(table[number].squeeze(0))
            y.index_add_(0, token, self.experts[number](x[token]))
        return y

    def compared(self, x, weights, masks, used):
        """A condition on the place takes all rows, or none."""
        y = torch.zeros_like(x)
        for number in used.nonzero():
            choice, token = torch.where(masks[number].squeeze(0))
            scale = self.up[number.squeeze(0) > 1].sum()
            made = self.experts[number](x[token]) * weights[token, choice, None]
            y.index_add_(0, token, made * scale)
        return y


def inputs(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(9, WIDTH, dtype=torch.float64, generator=generator)


def unused(x: torch.Tensor, model: Routed) -> set[int]:
    """The experts that no token chooses."""
    chosen = model.gate(x).topk(CHOICES, -1).indices
    return {*range(EXPERTS)} - {*chosen.flatten().tolist()}


def few() -> Iterator[torch.Tensor]:
    """Inputs that leave an expert out, and inputs that need all of them."""
    model = Routed("listed").double()
    found = [inputs(seed) for seed in range(40)]
    yield next(x for x in found if unused(x, model))
    yield next(x for x in found if not unused(x, model))


@pytest.mark.parametrize("form", ["listed", "called", "tables"])
def test_a_loop_over_chosen_experts_is_one_op(form: str) -> None:
    """Planned for inputs that leave an expert out, it is right for others too, on 2 and 3 ranks."""
    model = Routed(form).double()
    some, every = few()
    traced = autoparallel.make_plan(model, 1, example_inputs=(some,))
    assert not traced.breaks
    assert sum(op.target == ROUTED for op in traced.ops) == 1
    assert traced.captured is not None
    for world_size, x in ((2, some), (2, every), (3, every)):
        with expert_families.only("experts_summed", "experts_summed"):
            plan = search(traced.captured, traced.model, Mesh(tp=world_size), Options())
        model.zero_grad()
        expected = model(x)
        expected.backward()
        run = autoparallel.simulate(model, plan=plan, example_inputs=(x,))
        assert relative_error(run.output.detach(), expected.detach()) < 1e-10
        named = dict(model.named_parameters(remove_duplicate=False))
        gradients = {path: p.grad for path, p in named.items() if p.grad is not None}
        error, where = worst_gradient({path: run.gradients[path] for path in gradients}, gradients)
        assert error < 1e-10, where
        # An expert that had no turn has none; one that had a turn without tokens has zeros.
        others = [tensor for path, tensor in run.gradients.items() if path not in gradients]
        assert bool(others) == (x is some and form != "tables")
        assert not any(tensor.any() for tensor in others)


@pytest.mark.parametrize(
    ("form", "why"),
    [
        ("counted", "branches on the values|could not be traced"),
        ("collected", "what a turn computes is used after it|changes the variable norms"),
        ("dense", "it writes to more than the rows"),
        ("crowded", "it writes to more than the rows"),
        ("shifted", "it writes to more than the rows"),
        ("first", "it ends before all places"),
        ("late", "is used outside of its turn|changes the variable last"),
        ("tallied", "changes the variable hits"),
        ("remembered", "changes the variable last"),
        ("listed_in_python", "changes the variable hits"),
        ("kept_for_a_moment", "changes the variable self"),
        ("shared_with_a_function", "changes the variable hits"),
        ("comprehended", "."),
        ("generated", "."),
        ("signed", "it writes to more than the rows"),
    ],
)
def test_other_loops_over_places_are_refused(form: str, why: str) -> None:
    """A turn that a call does not take would count, write, return or choose something."""
    with pytest.raises(CaptureError, match=why):
        trace(Routed(form).double(), (inputs(0),), {}, known=find_rule)


def test_a_condition_on_a_place_is_no_place() -> None:
    model = Routed("compared").double()
    some, every = few()
    plan = autoparallel.make_plan(model, 2, example_inputs=(some,))
    assert not plan.breaks
    for x in (some, every):
        model.zero_grad()
        expected = model(x)
        expected.backward()
        run = autoparallel.simulate(model, plan=plan, example_inputs=(x,))
        assert relative_error(run.output.detach(), expected.detach()) < 1e-10
        named = model.named_parameters(remove_duplicate=False)
        gradients = {path: p.grad for path, p in named if p.grad is not None}
        error, where = worst_gradient({path: run.gradients[path] for path in gradients}, gradients)
        assert error < 1e-10, where


class Capped(Routed):
    """Each token has one expert, which takes the first tokens of a sequence and no more."""

    most = 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).max(-1)
        masks = functional.one_hot(chosen, EXPERTS)
        masks = masks * (masks.cumsum(-2) <= self.most)
        if self.form == "several":
            masks = self.gate(x) > 0
        tokens, masks = x.view(-1, WIDTH), masks.view(-1, 1, EXPERTS).permute(2, 1, 0)
        y = torch.zeros_like(tokens)
        weights = weights.view(-1, 1)
        for number in torch.greater(masks.sum(dim=(-1, -2)), 0).nonzero():
            choice, token = torch.where(masks[number].squeeze(0))
            rows = tokens[None, token].reshape(-1, WIDTH)
            made = self.named[f"expert_{number[0]}"](rows) * weights[token, choice, None]
            y.index_add_(0, token, made)
        return y.pow(2).sum() + self.gate(y.reshape(x.shape)).sum()


@pytest.mark.parametrize(("kernel", "world_size"), [("experts_summed", 3), ("experts_inner", 2)])
def test_what_an_expert_does_not_take_is_nobodys(kernel: str, world_size: int) -> None:
    model = Capped("listed").double()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 6, WIDTH, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        chosen = functional.one_hot(model.gate(x).argmax(-1), EXPERTS)
        assert (chosen.sum(1) > Capped.most).any()
    traced = autoparallel.make_plan(model, 1, example_inputs=(x,))
    assert not traced.breaks
    assert sum(op.target == ROUTED for op in traced.ops) == 1
    assert traced.captured is not None
    model(x).backward()
    named = dict(model.named_parameters(remove_duplicate=False))
    gradients = {path: p.grad for path, p in named.items() if p.grad is not None}
    with expert_families.only(*[kernel] * (world_size - 1)):
        plan = search(traced.captured, traced.model, Mesh(tp=world_size), Options())
    run = autoparallel.simulate(model, plan=plan, example_inputs=(x,))
    assert relative_error(run.output.detach(), model(x).detach()) < 1e-10
    error, where = worst_gradient({path: run.gradients[path] for path in gradients}, gradients)
    assert error < 1e-10, where


class Flagged(Routed):
    """Flags of the experts that a token takes are the numbers of experts, as a library has it: a
    token has an expert several times. Some numbers may be those of no expert.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.gate(x).softmax(-1)
        chosen = (weights > weights.mean(-1, keepdim=True)).long()
        if self.form == "none":
            chosen = chosen * 2 + self.gate(x).argmax(-1, keepdim=True)
        masks = functional.one_hot(chosen, EXPERTS + 2).permute(2, 1, 0)
        y = torch.zeros_like(x)
        for number in torch.greater(masks.sum(dim=(-1, -2)), 0).nonzero():
            if number >= EXPERTS:
                continue
            choice, token = torch.where(masks[number].squeeze(0))
            made = self.experts[number](x[token]) * weights[token, choice, None]
            if self.form == "written":
                y[token] += made
            else:
                y.index_add_(0, token, made)
        return y.pow(2).sum()


@pytest.mark.parametrize("form", ["some", "none"])
@pytest.mark.parametrize(("kernel", "world_size"), [("experts_summed", 3), ("experts_inner", 2)])
def test_a_token_may_choose_an_expert_twice(form: str, kernel: str, world_size: int) -> None:
    model, x = Flagged(form).double(), inputs(1)
    traced = autoparallel.make_plan(model, 1, example_inputs=(inputs(0),))
    assert not traced.breaks
    assert sum(op.target == ROUTED for op in traced.ops) == 1
    assert traced.captured is not None
    with expert_families.only(*[kernel] * (world_size - 1)):
        plan = search(traced.captured, traced.model, Mesh(tp=world_size), Options())
    expected = model(x)
    expected.backward()
    named = model.named_parameters(remove_duplicate=False)
    gradients = {path: p.grad for path, p in named if p.grad is not None}
    run = autoparallel.simulate(model, plan=plan, example_inputs=(x,))
    assert relative_error(run.output.detach(), expected.detach()) < 1e-10
    error, where = worst_gradient({path: run.gradients[path] for path in gradients}, gradients)
    assert error < 1e-10, where


def test_rows_that_are_written_are_not_added() -> None:
    """Of several choices of one expert, one row is added, whichever comes last."""
    with pytest.raises(CaptureError, match="depends on the values"):
        trace(Flagged("written").double(), (inputs(0),), {}, known=find_rule)


def test_a_mask_of_several_experts_is_no_choice() -> None:
    """A row may be of more experts than there are choices, and stays the user's Python."""
    x = torch.randn(4, 6, WIDTH, dtype=torch.float64)
    with pytest.raises(CaptureError, match="depends on the values"):
        trace(Capped("several").double(), (x,), {}, known=find_rule)
