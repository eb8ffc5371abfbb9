"""Random ops: the same numbers however the model is split, and the distribution that torch has."""

import pytest
import torch
from broad_cases import broad, share_of
from releases import lstm_states
from split_models import split_as_whole
from torch import nn
from torch.nn import functional as F

import autoparallel

ROWS, WIDTH = 60, 90


class Model(nn.Module):
    """What `function` makes of a tensor that has a gradient, beside a loss."""

    def __init__(self, function):
        super().__init__()
        self.layer = nn.Linear(6, WIDTH)
        self.function = function

    def forward(self, x):
        hidden = self.layer(x)
        made = self.function(hidden)
        return hidden.square().sum(), made


def ones(x):
    return torch.ones_like(x)


EXACT = {
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "rand": lambda x: torch.rand(x.shape) + x.new_zeros(WIDTH),
    "randn": lambda x: torch.randn(WIDTH) + torch.zeros_like(x),
    "bernoulli": lambda x: torch.bernoulli(ones(x) * 0.3),
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(0.3),
    "uniform_": lambda x: torch.empty_like(x).uniform_(-1, 3),
    "normal_": lambda x: torch.empty_like(x).normal_(2, 3),
    "randint": lambda x: torch.randint(2, 9, x.shape).float(),
    "randint_like": lambda x: torch.randint_like(x, 2, 9),
    "randperm": lambda x: torch.randperm(WIDTH).to(x) + torch.zeros_like(x),
    "native_dropout": lambda x: torch.native_dropout(ones(x), 0.3, True)[0],
    "dropout": lambda x: F.dropout(ones(x), 0.3, True),
    "dropout1d": lambda x: F.dropout1d(ones(x)[:, :, None], 0.3, True),
    "dropout2d": lambda x: F.dropout2d(ones(x)[:, :, None, None], 0.3, True),
    "alpha_dropout": lambda x: F.alpha_dropout(ones(x), 0.3, True),
    "rrelu": lambda x: F.rrelu(-ones(x), 0.1, 0.5, True),
    "multinomial": lambda x: torch.multinomial(ones(x), 70).float(),
    "multinomial again": lambda x: torch.multinomial(ones(x), 70, True).float(),
    "normal of means": lambda x: torch.normal(ones(x) * 2, 3.0),
    "normal of both": lambda x: torch.normal(ones(x) * 2, ones(x) * 3),
    "normal of size": lambda x: torch.normal(2.0, 3.0, (WIDTH,)) + torch.zeros_like(x),
}
CLOSE = {
    "exponential_": lambda x: torch.empty_like(x).exponential_(2.0),
    "geometric_": lambda x: torch.empty_like(x).geometric_(0.3),
    "log_normal_": lambda x: torch.empty_like(x).log_normal_(0.1, 0.2),
    "cauchy_": lambda x: torch.empty_like(x).cauchy_().clamp(-5, 5),
    "gumbel_softmax": lambda x: F.gumbel_softmax(ones(x), hard=True).detach(),
}


def run(function, world_size, **options):
    torch.manual_seed(0)
    model = Model(function)
    x = torch.randn(ROWS, 6)
    made = autoparallel.simulate(model, world_size, example_inputs=x, **options)
    return made.output[1]


@pytest.mark.parametrize("name", share_of([*EXACT, *CLOSE], 3))
def test_numbers_do_not_depend_on_the_plan(name):
    """And their mean and deviation are those of torch's own."""
    function = {**EXACT, **CLOSE}[name]
    whole = run(function, 1)
    assert whole.isfinite().all()
    split = run(function, 3, data_parallel=True)
    if name in EXACT:
        assert torch.equal(split, whole)
    else:
        assert torch.allclose(split, whole, rtol=1e-5)
    ours = whole.double()
    torch.manual_seed(1)
    theirs = torch.stack([function(torch.zeros(ROWS, WIDTH)).double() for _ in range(20)])
    few = ours.numel() if ours.unique().numel() > WIDTH else WIDTH
    error = theirs.std() / few**0.5
    assert (ours.mean() - theirs.mean()).abs() <= 5 * error + 1e-12
    assert (ours.std() / theirs.std() - 1).abs() < (0.1 if few > WIDTH else 0.5)


DESCRIBED = {
    "bernoulli": lambda p: torch.bernoulli(p),
    "normal": lambda p: torch.normal(p, p),
    "overwritten": lambda p: (p * 1).normal_(),
    "overwritten by others": lambda p: (p * 1).exponential_() * 0 + (p * 1).bernoulli_(0.5),
}


@pytest.mark.parametrize("name", DESCRIBED)
def test_what_describes_a_distribution_gets_zeros(name):
    """Torch gives them a gradient, and an optimizer tells it from none: it decays the weights."""

    class Described(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)
            # Numbers that are not finite get zeros as well.
            self.register_buffer("shift", torch.tensor([0.0] * 5 + [torch.inf]))

        def forward(self, x):
            chances = self.layer(x).sigmoid()
            if name.startswith("over"):
                chances = chances + self.shift
            return DESCRIBED[name](chances).sum()

    torch.manual_seed(0)
    model, x = Described().double(), torch.randn(4, 6, dtype=torch.float64)
    model(x).backward()
    plan = autoparallel.make_plan(model, 2, example_inputs=x)
    assert not plan.breaks
    made = autoparallel.simulate(model, plan=plan, example_inputs=x)
    assert made.output.isfinite()
    for path, parameter in model.named_parameters():
        assert not parameter.grad.any()
        assert torch.equal(made.gradients[path], parameter.grad), path


def test_two_ops_draw_different_numbers():
    made = run(lambda x: torch.rand_like(x) - torch.rand_like(x), 1)
    assert made.abs().min() >= 0
    assert made.std() > 0.3


def test_normal_numbers_are_normal():
    """Moments up to the fourth, and no correlation between neighbours."""
    made = run(torch.randn_like, 1).double()
    assert made.mean().abs() < 0.05
    assert (made.square().mean() - 1).abs() < 0.08
    assert made.pow(3).mean().abs() < 0.2
    assert (made.pow(4).mean() - 3).abs() < 0.5
    assert (made[:, 1:] * made[:, :-1]).mean().abs() < 0.05


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(nn.LSTM, {"bidirectional": True, "proj_size": 4}, marks=lstm_states),
        *broad((nn.GRU, {"bidirectional": True, "batch_first": True})),
        (nn.RNN, {"nonlinearity": "relu", "bias": False}),
    ],
)
def test_recurrent_layers_with_dropout_in_between(kind, options):
    """Taken apart, with a probability that drops nothing, they are torch's own."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.first = kind(6, 8, 3, dropout=1e-12, **options), nn.Linear(6, 6)

        def forward(self, x):
            y, states = self.body(self.first(x))
            states = states if isinstance(states, tuple) else (states,)
            return y.square().sum() + sum((s * (i + 1)).sum() for i, s in enumerate(states))

    torch.manual_seed(0)
    model = Recurrent().double().train()
    x = torch.randn(5, 4, 6, dtype=torch.float64)
    split_as_whole(model, 2, x, data_parallel=True, atol=1e-10)
