"""Ops that are traced as others: the same values and gradients, split as whole."""

import copy

import pytest
import torch
from broad_cases import broad, one_of_each
from calls import fixed, ints, truth
from quick_links import QUICK_LINKS
from split_models import split_as_whole
from torch import nn
from torch.nn import functional as F

import autoparallel
from autoparallel.graph.graph import Sym
from autoparallel.support.module_copy import on_meta


class Model(nn.Module):
    """A layer with weights, then the function; a result that is no loss is made one."""

    def __init__(self, width, function):
        super().__init__()
        self.layer = nn.Linear(6, width)
        self.function = function

    def forward(self, x, *others):
        made = self.function(self.layer(x), *others)
        tensors = made if isinstance(made, tuple) else (made,)
        return sum(tensor.sin().sum() for tensor in tensors)


def ignoring(target):
    return torch.where(torch.arange(target.numel()).reshape(target.shape) % 3 == 0, -100, target)


def losses():
    target, soft = ignoring(ints(8)), fixed(8, 9).softmax(-1)
    weight = fixed(9).abs()
    for way in ("mean", "sum", "none"):
        plain = {"reduction": way}
        cases = {
            "cross_entropy": (lambda x, t, p=plain: F.cross_entropy(x, t, **p), target),
            "cross_entropy smoothed": (
                lambda x, t, p=plain: F.cross_entropy(x, t, label_smoothing=0.1, **p),
                target,
            ),
            "cross_entropy weighted": (
                lambda x, t, w, p=plain: F.cross_entropy(x, t, w, label_smoothing=0.1, **p),
                target,
                weight,
            ),
            "cross_entropy soft": (
                lambda x, t, w, p=plain: F.cross_entropy(x, t, w, label_smoothing=0.1, **p),
                soft,
                weight,
            ),
            "cross_entropy in the plane": (
                lambda x, t, p=plain: F.cross_entropy(x.reshape(2, 4, 9).mT, t, **p),
                target.reshape(2, 4),
            ),
            "nll_loss": (
                lambda x, t, w, p=plain: F.nll_loss(x.log_softmax(-1), t, w, **p),
                target,
                weight,
            ),
            "nll_loss in the plane": (
                lambda x, t, p=plain: F.nll_loss(x.reshape(2, 4, 9).log_softmax(2).mT, t, **p),
                target.reshape(2, 4),
            ),
            "mse_loss": (lambda x, y, p=plain: F.mse_loss(x, y, **p), fixed(8, 9)),
            "l1_loss": (lambda x, y, p=plain: F.l1_loss(x, y, **p), fixed(8, 9)),
            "smooth_l1_loss": (
                lambda x, y, p=plain: F.smooth_l1_loss(x, y, beta=0.4, **p),
                fixed(8, 9),
            ),
            "huber_loss": (lambda x, y, p=plain: F.huber_loss(x, y, delta=0.4, **p), fixed(8, 9)),
            "kl_div": (lambda x, y, p=plain: F.kl_div(x.log_softmax(-1), y, **p), soft),
            "kl_div log": (
                lambda x, y, p=plain: F.kl_div(x.log_softmax(-1), y.log(), log_target=True, **p),
                soft,
            ),
            "bce": (lambda x, y, p=plain: F.binary_cross_entropy(x.sigmoid(), y, **p), soft),
            "bce with logits": (
                lambda x, y, w, p=plain: F.binary_cross_entropy_with_logits(
                    x, y, weight=w, pos_weight=w + 1, **p
                ),
                soft,
                weight,
            ),
            "soft_margin_loss": (
                lambda x, y, p=plain: F.soft_margin_loss(x, y.sign(), **p),
                fixed(8, 9),
            ),
            "poisson_nll_loss": (lambda x, y, p=plain: F.poisson_nll_loss(x, y, **p), soft),
            "hinge_embedding_loss": (
                lambda x, y, p=plain: F.hinge_embedding_loss(x, y.sign(), **p),
                fixed(8, 9),
            ),
            "cosine_embedding_loss": (
                lambda x, y, t, p=plain: F.cosine_embedding_loss(x, y, t.sign(), 0.1, **p),
                fixed(8, 9),
                fixed(8),
            ),
            "triplet_margin_loss": (
                lambda x, y, z, p=plain: F.triplet_margin_loss(x, y, z, **p),
                fixed(8, 9),
                fixed(8, 9),
            ),
            "multilabel_soft_margin_loss": (
                lambda x, y, p=plain: F.multilabel_soft_margin_loss(x, y, **p),
                soft,
            ),
        }
        for name, case in cases.items():
            yield f"{name}, {way}", case


MEANS = [name for name, _ in losses() if name.endswith("mean") and "in the plane" not in name]


@pytest.mark.parametrize("name", [*broad(*MEANS[1:]), MEANS[0], "mse_loss, mean"])
def test_the_mean_of_a_loss_leaves_the_rows_to_the_inputs(name):
    """What counts the elements fixes no sizes: a torch.Size counted them, and each batch of another
    length was traced anew.
    """
    function, target, *rest = dict(losses())[name]
    inputs = (torch.zeros(8, 6), target, *rest)
    plan = autoparallel.make_plan(Model(9, function), 2, example_inputs=inputs)
    first = next(node.result for node in plan.captured.graph.nodes if node.kind == "input")
    assert isinstance(first.shape[0], Sym), str(plan.captured.graph)


def ctc(x, labels, score_lengths, lengths, **options):
    scores = torch.stack([x, x * 0.5, x.flip(0), x * 2, x + 1]).log_softmax(-1)
    return F.ctc_loss(scores, labels, score_lengths, lengths, **options)


def ctc_losses():
    lengths, labels = torch.tensor([5, 4, 5, 5, 3, 5, 5, 4]), ints(8, 3)
    count = torch.tensor([2, 1, 2, 3, 1, 2, 0, 1])
    for way in ("mean", "sum", "none"):
        yield (
            f"ctc_loss, {way}",
            (lambda x, *o, p=way: ctc(x, *o, reduction=p), labels, lengths, count),
        )
    # With one label of three, the last sequence is too short for its labels.
    impossible = torch.tensor([5, 4, 5, 5, 3, 5, 5, 1]), torch.tensor([2, 1, 2, 3, 1, 2, 0, 3])
    yield (
        "ctc_loss without infinity",
        (lambda x, *o: ctc(x, *o, zero_infinity=True, blank=0), labels, *impossible),
    )


def bags(x, index, **options):
    return F.embedding_bag(index, x, **options)


def others():
    yield "addmm", (lambda x, b, w: torch.addmm(b, x, w, beta=0.5, alpha=2), fixed(5), fixed(9, 5))
    yield "addmv", (lambda x, b, v: torch.addmv(b, x, v, beta=2), fixed(8), fixed(9))
    yield (
        "addbmm",
        (
            lambda x, b, w: torch.addbmm(b, x.reshape(2, 4, 9), w, alpha=2),
            fixed(4, 5),
            fixed(2, 9, 5),
        ),
    )
    yield "addr", (lambda x, a, b: torch.addr(x, a, b, alpha=0.5), fixed(8), fixed(9))
    yield "embedding_bag", (lambda x, i: bags(x, i), ints(5, 3, high=8))
    yield (
        "embedding_bag of sums",
        (
            lambda x, i, o, w: bags(
                x, i, offsets=o, mode="sum", per_sample_weights=w, include_last_offset=True
            ),
            ints(7, high=8),
            torch.tensor([0, 0, 4, 7]),
            fixed(7),
        ),
    )
    yield (
        "embedding_bag with padding",
        (
            lambda x, i: bags(x, i, padding_idx=2),
            ints(5, 3, high=8),
        ),
    )
    yield "weight_norm", (lambda x, g: torch._weight_norm(x, g, 1) * g, fixed(1, 9))
    yield "weight_norm of all", (lambda x, g: torch._weight_norm(x, g, -1), fixed(1, 1))
    yield "bilinear", (F.bilinear, fixed(8, 5), fixed(7, 9, 5), fixed(7))
    yield "cov", (lambda x: torch.cov(x),)
    yield "cov of the population", (lambda x: torch.cov(x.mT, correction=0),)
    yield "cov of one variable", (lambda x: torch.cov(x[0]),)
    yield "cov with weights", (lambda x, w: torch.cov(x, fweights=w), ints(9))
    yield "corrcoef", (lambda x: torch.corrcoef(x),)
    yield "hstack", (lambda x, y: torch.hstack([x, y, x]), fixed(8, 5))
    yield "kron", (torch.kron, fixed(2, 3))
    yield "tensordot", (lambda x, w: torch.tensordot(x, w, 1), fixed(9, 3, 2))
    yield "one_hot", (lambda x, t: x * F.one_hot(t, 9), ints(8))
    yield "channel dim", (lambda x: F.local_response_norm(x.reshape(2, 4, 9), 2),)
    yield "take_along_dim", (lambda x, i: x.take_along_dim(i, 1), ints(8, 3, high=9))
    yield "pairwise_distance", (F.pairwise_distance, fixed(8, 9))
    yield "quantile", (lambda x: torch.quantile(x, 0.3, dim=1),)
    yield "diff", (lambda x: torch.diff(x, dim=1),)
    yield "std_mean", (lambda x: torch.std_mean(x, 1),)
    yield "meshgrid", (lambda x: torch.meshgrid(x[0], x[1], indexing="ij"),)
    yield (
        "where with numbers",
        (lambda x, m: torch.where(m, x, 0.0) + x.masked_fill(m, 2), truth(9)),
    )
    yield "a mask of one value", (lambda x, m: written(x, m), truth(8, 9))


def written(x, mask):
    made = x.clone()
    made[mask] = 0.5
    return made


class Normalized(nn.Module):
    """Batch norm with running statistics, of channels that a product makes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 9)
        self.norm = nn.BatchNorm1d(9)
        self.plain = nn.BatchNorm1d(9, affine=False, track_running_stats=False)

    def forward(self, x):
        return (self.plain(self.layer(x)) + self.norm(self.layer(x))).sin().sum()


@pytest.mark.parametrize("data_parallel", [False, True])
def test_batch_norm_takes_the_statistics_of_the_whole_batch(data_parallel):
    torch.manual_seed(0)
    model = Normalized().double()
    whole = copy.deepcopy(model)
    x = fixed(8, 6).requires_grad_()
    loss = whole(x)
    loss.backward()
    # With overlap, or where collectives start slowly, other plans of so small a model are as quick.
    options = {"data_parallel": data_parallel, "overlap": False, "hardware": QUICK_LINKS}
    plan = autoparallel.make_plan(model, 3, example_inputs=x, **options)
    split = autoparallel.simulate(model, 3, example_inputs=x, plan=plan)
    assert torch.allclose(split.output, loss, rtol=1e-10)
    for path, parameter in whole.named_parameters():
        assert torch.allclose(split.gradients[path], parameter.grad, rtol=1e-9, atol=1e-9), path
    for path, buffer in whole.named_buffers():
        assert torch.allclose(split.buffers[path], buffer, rtol=1e-10), path
    kernels = {op.kernels for op in plan.ops if "batch_norm" in op.target}
    assert kernels == ({("batch_norm_split",)} if data_parallel else {("",)})


class RunningInstances(nn.Module):
    """Running statistics that an op writes without saying so: of entries, and of the batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 9)
        self.norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x):
        y = self.norm(self.layer(x))
        y, mean, deviation = torch.native_batch_norm(
            y, None, None, self.mean, self.variance, self.training, 0.3, 1e-5
        )
        return y.sin().sum() + mean.sum() + deviation.sum()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("data_parallel", [*broad(False), True])
def test_statistics_that_are_written_on_the_side(data_parallel, training):
    """They are seen by whoever reads the memory, and do not keep the op whole."""
    torch.manual_seed(0)
    model = RunningInstances().double().train(training)
    whole, x = copy.deepcopy(model), fixed(5, 4, 6)
    split = split_as_whole(model, 3, x, atol=1e-10, data_parallel=data_parallel)
    plan = autoparallel.make_plan(model, 3, example_inputs=x, data_parallel=data_parallel)
    kinds = {op.target: op for op in plan.ops}
    if data_parallel:
        normal = kinds["aten.instance_norm.default"]
        assert normal.operands[0] != (autoparallel.Invariant(),)
    whole(x)
    assert set(split.buffers) >= {"mean", "variance", "norm.running_mean", "norm.running_var"}
    for path, buffer in split.buffers.items():
        torch.testing.assert_close(buffer, whole.get_buffer(path), rtol=1e-12, atol=1e-12)


class Into(nn.Module):
    """Results that are written into buffers (out=), read before, between and after."""

    def __init__(self, function):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.function = function
        self.register_buffer("kept", torch.ones(6))
        self.register_buffer("places", torch.zeros(6, dtype=torch.long))

    def forward(self, x):
        loss = (self.layer(x) * self.kept.clone()).sum()
        for _ in range(2):
            with torch.no_grad():
                self.function(self, self.layer(x))
            loss = loss + (self.layer(x) * self.kept.clone() + self.places.clone()).square().sum()
        return loss


INTO = {
    "one": lambda m, y: F.normalize(y[0] + m.kept, dim=0, out=m.kept),
    "several": lambda m, y: torch.max(y, 0, out=(m.kept, m.places)),
    "another type": lambda m, y: torch.add(m.places, 3, out=m.kept),
    "a view": lambda m, y: torch.mul(y[0, :3], 2.0, out=m.kept[:3]),
}


@pytest.mark.parametrize("name", INTO)
def test_results_that_are_written_into_buffers(name):
    torch.manual_seed(0)
    model, x = Into(INTO[name]).double(), fixed(4, 6)
    whole = copy.deepcopy(model)
    split = split_as_whole(model, 2, x, atol=1e-10)
    whole(x)
    for path, buffer in whole.named_buffers():
        torch.testing.assert_close(split.buffers[path], buffer, rtol=1e-12, atol=1e-12)


def test_fresh_memory_is_the_same_on_every_rank():
    """Its numbers are nobody's business, but ranks must not differ in them."""

    class Fresh(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            y = self.layer(x)
            made = (y.new_empty_strided((2, 3), (1, 2)), torch.empty_strided((2, 3), (1, 2)))
            return y.sum(), *made, torch.empty_permuted((2, 3), (1, 0))

    made = autoparallel.simulate(Fresh(), 2, example_inputs=torch.ones(4, 6))
    assert made.apart == 0.0
    assert all(not tensor.any() for tensor in made.output[1:])


def test_a_mean_of_narrow_numbers_does_not_overflow():
    """A sum of 16 bits ends at 65504; the mean of as many ones is one."""

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(300, dtype=torch.float16))

        def forward(self, x):
            made = x * self.weight
            return made.mean() + F.mse_loss(made, torch.zeros_like(made))

    x = torch.ones(400, 300, dtype=torch.float16)
    made = autoparallel.simulate(Mean(), 2, example_inputs=x, data_parallel=True)
    assert made.output.dtype == torch.float16
    assert made.output == 2


CASES = {**dict(losses()), **dict(ctc_losses()), **dict(others())}
# Losses differ in what they sum; how they are reduced is one way for all.
BROAD = [name for name in CASES if name.endswith((", sum", ", none"))]
BROAD += [name for name in CASES if name not in BROAD][1::2]


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize(
    "name",
    one_of_each(CASES, lambda name: name not in BROAD),
)
def test_split_equals_whole(name):
    function, *inputs = CASES[name]
    torch.manual_seed(0)
    model = Model(9, function).double()
    split_as_whole(model, 3, fixed(8, 6), *inputs, data_parallel=True)


class EachToken(nn.Module):
    """A loss that is not reduced at once, with classes that nothing can be of."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        scores = self.inner(x)
        scores = scores.masked_fill(torch.arange(5, device=x.device) == 4, float("-inf"))
        each = F.cross_entropy(scores, labels, reduction="none")
        weights = torch.arange(1.0, 6.0, dtype=x.dtype, device=x.device)
        weighed = F.cross_entropy(scores, labels, weights)
        return each.square().mean() + weighed


@pytest.mark.parametrize("meta", [False, True])
def test_losses_of_each_token(meta: bool) -> None:
    """Also where the plan is made without weights: torch gets their shape wrong there."""
    torch.manual_seed(0)
    model = EachToken().double()
    x, labels = torch.randn(7, 6, dtype=torch.float64), torch.randint(0, 4, (7,))
    like = on_meta(model) if meta else model
    plan = autoparallel.make_plan(like, 3, example_inputs=(x, labels))
    split_as_whole(model, 3, x, labels, plan=plan)
