"""Random ops as functions of uniform and of normal numbers, the only ones that are drawn.

One way to draw then serves all of them: the number of each element is keyed by the element's place
in the whole tensor, so that it does not depend on how the tensor is split. The gradient with regard
to the numbers that describe a distribution, or that are overwritten, is zero, and not none.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from autoparallel.capture.decomposition_registry import decomposition

# Less than the least positive draw, which is 2^-24 in float32: keeps exponential numbers off 0.
_TINY = 2.0**-25


def _uniform(x: Any) -> Any:
    """Return a number in [0, 1) for each element of x, of whatever type the elements are."""
    return torch.rand_like(x, dtype=x.dtype if x.is_floating_point() else torch.float32)


def _after(drawn: Any, *described: Any) -> Any:
    """Return drawn numbers through which a gradient of zeros flows to those that describe their
    distribution, or that they overwrite: an optimizer tells zeros from no gradient.
    """
    for tensor in described:
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad and torch.is_grad_enabled():
            drawn = drawn + tensor.nan_to_num(0.0, 0.0, 0.0) * 0
    return drawn


@decomposition("aten.bernoulli.default")
def bernoulli(x: Any, *, generator: Any = None) -> Any:
    """1 with the probability that the element of x says, else 0."""
    return _after((_uniform(x) < x).to(x.dtype), x)


@decomposition("aten.bernoulli.p")
def bernoulli_p(x: Any, p: float, *, generator: Any = None) -> Any:
    """1 with probability p for every element, else 0; of x only shape and type are read."""
    return (_uniform(x) < p).to(x.dtype)


@decomposition("aten.bernoulli_.float", "aten.bernoulli_.Tensor")
def bernoulli_(x: Any, p: Any = 0.5, *, generator: Any = None) -> Any:
    """x becomes 1 with probability p, else 0."""
    return x.copy_(_after((_uniform(x) < p).to(x.dtype), x))


@decomposition("aten.uniform_.default")
def uniform_(x: Any, low: float = 0.0, high: float = 1.0, *, generator: Any = None) -> Any:
    """Each element of x becomes a number in [low, high), all equally likely."""
    return x.copy_(_after(torch.rand_like(x) * (high - low) + low, x))


@decomposition("aten.normal_.default")
def normal_(x: Any, mean: float = 0.0, std: float = 1.0, *, generator: Any = None) -> Any:
    """Each element of x becomes a normal number of this mean and standard deviation."""
    return x.copy_(_after(torch.randn_like(x) * std + mean, x))


@decomposition("aten.log_normal_.default")
def log_normal_(x: Any, mean: float = 1.0, std: float = 2.0, *, generator: Any = None) -> Any:
    """Each element of x becomes a number whose logarithm is normal, of this mean and deviation."""
    return x.copy_(_after((torch.randn_like(x) * std + mean).exp(), x))


def _exponential(x: Any) -> Any:
    """Return exponential numbers of rate 1, one for each element of x, none of them zero.

    By inversion: -log(1 - u) of a uniform u. log1p keeps the small ones exact.
    """
    return torch.log1p(-_uniform(x)).neg().clamp_min(_TINY)


@decomposition("aten.exponential_.default")
def exponential_(x: Any, rate: float = 1.0, *, generator: Any = None) -> Any:
    """Each element of x becomes the time to an event that happens at `rate`."""
    return x.copy_(_after(_exponential(x) / rate, x))


@decomposition("aten.geometric_.default")
def geometric_(x: Any, p: float, *, generator: Any = None) -> Any:
    """Each element of x becomes the number of trials up to the first success.

    p: the probability of a success. The number is an exponential one rounded up, as that exceeds n
    with probability (1 - p)^n at the rate -log(1 - p).
    """
    return x.copy_(_after((_exponential(x) / -math.log1p(-p)).ceil(), x))


@decomposition("aten.cauchy_.default")
def cauchy_(x: Any, median: float = 0.0, sigma: float = 1.0, *, generator: Any = None) -> Any:
    """Each element of x becomes a Cauchy number, by inversion: tan(pi (u - 1/2)) of a uniform u."""
    drawn = torch.tan((torch.rand_like(x) - 0.5) * math.pi) * sigma + median
    return x.copy_(_after(drawn, x))


def _normal(mean: Any, std: Any, example: Any) -> Any:
    """Return normal numbers in the shape and type of `example`."""
    plain = [item.detach() if isinstance(item, torch.Tensor) else item for item in (mean, std)]
    return _after(torch.randn_like(example) * plain[1] + plain[0], mean, std)


@decomposition("aten.normal.Tensor_Tensor")
def normal_of_both(mean: Any, std: Any, *, generator: Any = None) -> Any:
    """Normal numbers, each with a mean and a deviation of its own."""
    return _normal(mean, std, mean + std)


@decomposition("aten.normal.Tensor_float")
def normal_of_means(mean: Any, std: float = 1.0, *, generator: Any = None) -> Any:
    """Normal numbers of one deviation, each with a mean of its own."""
    return _normal(mean, std, mean)


@decomposition("aten.normal.float_Tensor")
def normal_of_deviations(mean: float, std: Any, *, generator: Any = None) -> Any:
    """Normal numbers of one mean, each with a deviation of its own."""
    return _normal(mean, std, std)


@decomposition("aten.normal.float_float")
def normal_of_size(
    mean: float, std: float, size: Any, *, generator: Any = None, **options: Any
) -> Any:
    """Normal numbers of one mean and one deviation in a tensor of this size."""
    return torch.randn(size, **options) * std + mean


def _whole_numbers(drawn: Any, low: int, high: int, dtype: torch.dtype) -> Any:
    """Return whole numbers low <= n < high, of uniform ones in [0, 1).

    drawn: in float64, whose 53 bits keep the numbers of all ranges up to 2^53 equally likely.
    """
    return ((drawn * (high - low)).floor() + low).to(dtype)


@decomposition("aten.randint.low")
def randint_low(low: int, high: int, size: Any, *, dtype: Any = torch.int64, **options: Any) -> Any:
    """Whole numbers low <= n < high in a tensor of this size."""
    drawn = torch.rand(size, dtype=torch.float64, **options)
    return _whole_numbers(drawn, low, high, dtype or torch.int64)


@decomposition("aten.randint.default")
def randint(high: int, size: Any, **options: Any) -> Any:
    """Whole numbers 0 <= n < high in a tensor of this size."""
    return randint_low(0, high, size, **options)


@decomposition("aten.randint_like.low_dtype")
def randint_like_low(x: Any, low: int, high: int, *, dtype: Any = None, **options: Any) -> Any:
    """Whole numbers low <= n < high in the shape of x."""
    return _whole_numbers(torch.rand_like(x, dtype=torch.float64), low, high, dtype or x.dtype)


@decomposition("aten.randint_like.default")
def randint_like(x: Any, high: int, **options: Any) -> Any:
    """Whole numbers 0 <= n < high in the shape of x."""
    return randint_like_low(x, 0, high, **options)


@decomposition("aten.randperm.default")
def randperm(count: Any, *, dtype: Any = torch.int64, **options: Any) -> Any:
    """The numbers below `count` in a random order: that of as many draws, sorted."""
    drawn = torch.rand((count,), dtype=torch.float64, **options)
    return drawn.sort(stable=True).indices.to(dtype or torch.int64)


@decomposition("aten.multinomial.default")
def multinomial(
    weights: Any, count: Any, replacement: bool = False, *, generator: Any = None
) -> Any:
    """Places in the last dim, drawn with probabilities that the weights are in proportion to.

    weights: [..., places]. count: of draws from each row. Without replacement: the places where an
    event of that rate happens first (Efraimidis & Spirakis 2006). With it: where a uniform number
    falls among the running sums.
    """
    weights = weights.detach()
    if not replacement:
        return (weights / _exponential(weights)).topk(count).indices
    sums = weights.cumsum(-1)
    drawn = torch.rand((*weights.shape[:-1], count), dtype=sums.dtype, device=sums.device)
    places = torch.searchsorted(sums, drawn * sums[..., -1:], right=True)
    # Rounding may take the product up to the last sum, behind which there is no place.
    return places.clamp_max(weights.shape[-1] - 1)


@decomposition("aten.native_dropout.default")
def native_dropout(x: Any, p: float, train: bool | None) -> Any:
    """x with some elements zeroed and the others scaled by 1 / (1 - p); and a mask of the others.

    p: the probability of a zero. train: None means yes.
    """
    if train is False:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    mask = _uniform(x) >= p
    return x * mask.to(x.dtype) * (0.0 if p == 1 else 1 / (1 - p)), mask


@decomposition("aten.rrelu.default")
def rrelu(
    x: Any, low: float = 0.125, high: float = 1 / 3, train: bool = False, generator: Any = None
) -> Any:
    """Leaky relu whose slope is drawn from [low, high) for every element; the mean of both if
    `train` is false.
    """
    if not train:
        return functional.leaky_relu(x, (low + high) / 2)
    return torch.where(x <= 0, x * (torch.rand_like(x) * (high - low) + low), x)


def _stacked(
    op: Any,
    x: Any,
    states: Any,
    weights: Any,
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """Recurrent layers on top of each other with dropout between them: one call for each.

    op: of the kind of layer. x: the inputs. states: the initial states, each [layers * directions,
    batch, features]; one tensor, or a pair for an LSTM. weights: of all layers, layer by layer.
    Without dropout the call is kept, as torch runs it at once. Returns what the op does: the
    outputs and the last states.
    """
    if layers == 1 or not (dropout and train):
        return NotImplemented
    many = isinstance(states, (list, tuple))
    directions, each = 1 + bidirectional, len(weights) // layers
    ends = []
    for layer in range(layers):
        starts = [
            state[layer * directions : (layer + 1) * directions]
            for state in (states if many else [states])
        ]
        inside = weights[layer * each : (layer + 1) * each]
        start = starts if many else starts[0]
        x, *end = op(x, start, inside, has_biases, 1, 0.0, train, bidirectional, batch_first)
        ends.append(end)
        if layer + 1 < layers:
            x = functional.dropout(x, dropout)
    return (x, *(torch.cat(parts) for parts in zip(*ends, strict=True)))


for _name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
    _op = getattr(torch.ops.aten, _name).input
    decomposition(f"aten.{_name}.input")(partial(_stacked, _op))
