"""Models of other layers than transformers: the same losses and gradients split as whole."""

import pytest
import torch
from broad_cases import broad
from split_models import split_as_whole
from torch import nn
from torch.nn import functional as F


class Convolutions(nn.Module):
    """Plain, grouped and biased convolutions, pooling, group and batch norm."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, bias=False)
        self.groups = nn.GroupNorm(4, 8)
        self.second = nn.Conv2d(8, 15, 3)
        self.batch = nn.BatchNorm2d(15)
        self.depthwise = nn.Conv2d(15, 15, 3, groups=15, padding=1)
        self.head = nn.Linear(15, 7)

    def forward(self, x, labels):
        x = F.relu(self.groups(self.first(x)))
        x = F.max_pool2d(F.relu(self.batch(self.second(x))), 2)
        x = F.adaptive_avg_pool2d(self.depthwise(x), 1).flatten(1)
        return F.cross_entropy(self.head(x), labels)


class Mixture(nn.Module):
    """Einsum attention, a recurrent layer, gates, look-ups by index, and losses of three kinds."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(19, 12)
        self.query = nn.Linear(12, 24, bias=False)
        self.key = nn.Linear(12, 24, bias=False)
        self.recurrent = nn.GRU(12, 12, batch_first=True)
        self.gate = nn.Linear(12, 48)
        self.down = nn.Linear(24, 12)
        self.head = nn.Linear(12, 19)

    def forward(self, tokens, labels):
        x = self.embedding(tokens)
        batch, length = tokens.shape
        query = self.query(x).view(batch, length, 4, 6)
        key = self.key(x).view(batch, length, 4, 6)
        scores = torch.einsum("bshd,bthd->bhst", query, key)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        values = x.unsqueeze(1).repeat(1, 4, 1, 1)
        x = x + torch.einsum("bhst,bhtd->bsd", weights, values)
        x = x + self.recurrent(x)[0] + self.down(F.glu(self.gate(x)))
        chosen = x.index_select(1, torch.tensor([0, 2]))
        some = x[torch.arange(batch), labels[:, 0] % 3]
        loss = F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())
        loss = loss + F.mse_loss(some, chosen.mean(1))
        return loss + F.binary_cross_entropy_with_logits(chosen, torch.sigmoid(chosen).detach())


class Stops(nn.Module):
    """Gradients stop in regions of torch.no_grad, also where these compute nothing."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(9, 12)
        self.second = nn.Linear(12, 7)

    def forward(self, x, labels):
        x = self.first(x)
        with torch.no_grad():
            same = x.reshape(x.shape).contiguous()
            gate = torch.sigmoid(x * 2)
            with torch.enable_grad():
                inner = x.sin()
            seventh = self.second.weight[labels % 7] + 1
        x = x * same + gate * (x > 0) + inner
        return F.cross_entropy(self.second(x + seventh), labels)


class Spectral(nn.Module):
    """A Fourier neural operator: products of the lowest frequencies, written to slices of zeros;
    steps, single places and conjugated numbers are written, too.
    """

    def __init__(self):
        super().__init__()
        self.lift = nn.Linear(4, 6)
        self.weight = nn.Parameter(torch.randn(6, 6, 3, dtype=torch.complex64))
        self.head = nn.Linear(6, 7)

    def forward(self, x, labels):
        frequencies = torch.fft.rfft(self.lift(x).transpose(1, 2))
        mixed = torch.zeros_like(frequencies)
        mixed[..., :3] = torch.einsum("bis,ios->bos", frequencies[..., :3], self.weight)
        mixed[:, ::2, -1] = frequencies[:, ::2, 1].conj()
        mixed[:, 1] = mixed[:, 2] * 2
        x = torch.fft.irfft(mixed, n=x.shape[1]).transpose(1, 2)
        return F.cross_entropy(self.head(x).mean(1), labels)


class SharedKeys(nn.Module):
    """Attention that is given its keys, in a model whose Python decides by values: the numbers of
    heads are sizes of its inputs.
    """

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.out = nn.Linear(8, 24), nn.Linear(24, 8)

        def forward(self, x, key, value):
            query = self.query(x).unflatten(-1, (4, 6)).transpose(1, 2)
            y = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
            return self.out(y.transpose(1, 2).flatten(2))

    def __init__(self):
        super().__init__()
        self.both, self.attention = nn.Linear(8, 24), self.Attention()

    def forward(self, x, labels):
        if x.sum().item() > 1e9:
            return x.sum()
        key, value = self.both(x).unflatten(-1, (4, 6)).transpose(1, 2).chunk(2, 1)
        return F.cross_entropy(self.attention(x, key, value).mean(1), labels)


class Transformed(nn.Module):
    """Forces by torch.func.grad: the graph has what it computes, forward and backward."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(8, 16), nn.Linear(16, 7)
        self.energy = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 1))

    def forward(self, x, labels):
        forces = torch.func.grad(lambda h: self.energy(h).sum())(self.encoder(x))
        return F.cross_entropy(self.head(forces).mean(1), labels)


def sample(kind):
    torch.manual_seed(3)
    if kind is Spectral:
        return torch.randn(5, 10, 4, dtype=torch.float64), torch.randint(0, 7, (5,))
    if kind in (SharedKeys, Transformed):
        return torch.randn(5, 6, 8, dtype=torch.float64), torch.randint(0, 7, (5,))
    if kind is Stops:
        return torch.randn(5, 9, dtype=torch.float64), torch.randint(0, 7, (5,))
    if kind is Convolutions:
        return torch.randn(5, 3, 12, 12, dtype=torch.float64), torch.randint(0, 7, (5,))
    return torch.randint(0, 19, (4, 5)), torch.randint(0, 19, (4, 5))


KINDS = [Convolutions, Mixture, Stops, Spectral, SharedKeys, Transformed]
# double() would make complex weights real.
WIDE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("data_parallel", [*broad(False), True])
@pytest.mark.parametrize("world_size", [*broad(2), 3])
@pytest.mark.parametrize("kind", KINDS)
def test_split_equals_whole(kind, world_size, data_parallel):
    inputs = sample(kind)
    model = kind()
    model._apply(lambda tensor: tensor.to(WIDE.get(tensor.dtype, tensor.dtype)))
    # Where everything may be split, nothing has to be: models as small as these would stay whole.
    weight = 4096.0 if data_parallel else None
    split = split_as_whole(
        model, world_size, *inputs, data_parallel=data_parallel, product_weight=weight
    )
    assert split.collectives
