"""Habits with what is given to a model."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections import OrderedDict, UserDict, namedtuple
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, TensorDataset

import autoparallel

from .case import Case, whole
from .models import Scores, built, inputs, plain, rows, scores
from .registry import in_group

habit = in_group("Inputs")

Pair = namedtuple("Pair", "x y")


class Adding(Scores):
    """Adds what it finds in an input of some structure."""

    def forward(self, batch: Any, scale: Any = 1.0) -> torch.Tensor:
        y = [super(Adding, self).forward(x) for x in self.tensors(batch)]
        return torch.stack(y).sum(0).square().mean() * scale

    def tensors(self, batch: Any) -> list[torch.Tensor]:
        """Return the tensors of a batch."""
        if isinstance(batch, torch.Tensor):
            return [batch]
        if isinstance(batch, (dict, UserDict)):
            return [t for item in batch.values() for t in self.tensors(item)]
        if isinstance(batch, (list, tuple)):
            return [t for item in batch for t in self.tensors(item)]
        if dataclasses.is_dataclass(batch):
            return self.tensors(vars(batch))
        return []


@dataclasses.dataclass
class Batch:
    """An input as an object."""

    x: torch.Tensor
    name: str = "train"


def given(case: Case, *batches: Any) -> None:
    """Compare steps with batches, of which the first is the example."""

    def script(model: Any) -> Any:
        losses = [model(batch) for batch in batches]
        torch.stack(losses).sum().backward()
        return losses

    case.compare(script, lambda: built(Adding), (batches[0],))


@habit("nested dicts, lists and tuples of tensors")
def nested(case: Case) -> None:
    def batch(seed: int) -> Any:
        return {"a": inputs(seed=seed), "more": [{"b": (inputs(seed=seed + 5),)}]}

    given(case, batch(0), batch(1))


@habit("OrderedDict and namedtuple inputs")
def ordered(case: Case) -> None:
    def batch(seed: int) -> Any:
        return OrderedDict(a=Pair(inputs(seed=seed), inputs(seed=seed + 5)))

    given(case, batch(0), batch(1))


@habit("a UserDict, as Hugging Face's BatchEncoding is one")
def user_dict(case: Case) -> None:
    given(case, UserDict(a=inputs()), UserDict(a=inputs(seed=1)))


@habit("a dataclass as input")
def dataclass(case: Case) -> None:
    given(case, Batch(inputs()), Batch(inputs(seed=1)))


@habit("a dict with other keys than in the call before")
def other_keys(case: Case) -> None:
    given(case, {"a": inputs()}, {"a": inputs(), "b": inputs(seed=1)}, {"b": inputs(seed=1)})


@habit("a list with other lengths from call to call")
def other_length(case: Case) -> None:
    given(case, [inputs()], [inputs(), inputs(seed=1)], [inputs(seed=2)])


@habit("a Python number as argument, another one in each call")
def number(case: Case) -> None:
    def script(model: Any) -> Any:
        return [model(inputs(), scale=scale) for scale in (1.0, 2.0, 0.5, 3)]

    case.compare(script, lambda: built(Adding), {"batch": inputs(), "scale": 1.0})


@habit("a Python number as argument, forty different ones (a schedule)")
def many_numbers(case: Case) -> None:
    def script(model: Any) -> Any:
        return [model(inputs(), scale=1 / (step + 1)) for step in range(40)]

    case.compare(script, lambda: built(Adding), {"batch": inputs(), "scale": 1.0})


@habit("a number in a tensor of no dims as argument")
def scalar_tensor(case: Case) -> None:
    def script(model: Any) -> Any:
        return [model(inputs(), scale=torch.tensor(scale).double()) for scale in (1.0, 2.0)]

    case.compare(script, lambda: built(Adding), {"batch": inputs(), "scale": torch.tensor(1.0)})


@habit("a text or a truth value that decides what is computed")
def text(case: Case) -> None:
    class Choosing(Scores):
        def forward(self, x: torch.Tensor, kind: str, squared: bool = False) -> torch.Tensor:
            y = super().forward(x)
            y = y.mean() if kind == "mean" else y.sum()
            return y.square() if squared else y

    def script(model: Any) -> Any:
        return [model(inputs(), "mean"), model(inputs(), "sum"), model(inputs(), "sum", True)]

    case.compare(script, lambda: built(Choosing), (inputs(), "mean"))


@habit("a numpy array as input", refused=True)
def array(case: Case) -> None:
    class FromArray(Scores):
        def forward(self, x: Any) -> torch.Tensor:
            return super().forward(torch.from_numpy(x) if isinstance(x, np.ndarray) else x)

    model = case.split(built(FromArray), inputs())
    model(inputs().numpy())


@habit("an input of the wrong type: float32 into a float64 model")
def wrong_type(case: Case) -> None:
    case.compare(lambda model: model(inputs().float()), scores, inputs(), fails=True)


@habit("an input with a wrong number of features")
def wrong_size(case: Case) -> None:
    wrong = torch.ones(4, 7, dtype=torch.float64)
    case.compare(lambda model: model(wrong), scores, inputs(), fails=True)


@habit("an input on another device than the model")
def wrong_device(case: Case) -> None:
    case.compare(lambda model: model(inputs().to("meta")), scores, inputs(), fails=True)


@habit("labels out of range")
def wrong_labels(case: Case) -> None:
    case.compare(lambda model: model(inputs(), torch.full((6,), 77)), fails=True)


@habit("NaN and infinity in the inputs")
def not_finite(case: Case) -> None:
    x = inputs()
    x[0, 0], x[1, 1] = float("nan"), float("inf")
    model = case.split(scores(), inputs())
    torch.testing.assert_close(model(x), scores()(x), equal_nan=True)


@habit("inputs that are not contiguous, expanded, or views")
def views(case: Case) -> None:
    def script(model: Any) -> Any:
        x = inputs()
        return [model(t) for t in (x.t().contiguous().t(), x[:1].expand(6, 6), x[::2], x.flip(0))]

    case.compare(script, scores, inputs())


@habit("inputs with more batch dims than the example")
def more_dims(case: Case) -> None:
    case.compare(lambda model: model(inputs().view(2, 3, 6)), scores, inputs())


@habit("jagged nested tensors as inputs")
def jagged(case: Case) -> None:
    def script(model: Any) -> Any:
        x = torch.nested.nested_tensor([inputs(2), inputs(3, 1)], layout=torch.jagged)
        return model(x).values()

    case.compare(script, lambda: built(lambda: nn.Sequential(nn.Linear(6, 5))), inputs())


@habit("packed sequences through an LSTM")
def packed(case: Case) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTM(6, 8, batch_first=True)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return pad_packed_sequence(self.cell(packed)[0], batch_first=True)[0].square().mean()

    def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        return inputs(12, seed).view(3, 4, 6), torch.tensor([4, 2, 3])

    def script(model: Any) -> Any:
        loss = model(*batch(1))
        loss.backward()
        return loss

    case.compare(script, lambda: built(Recurrent), batch(0))


@habit("sparse inputs (COO)")
def sparse(case: Case) -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sparse.mm(x, self.weight) if x.is_sparse else x @ self.weight

    def script(model: Any) -> Any:
        y = model((inputs() * (inputs() > 0)).to_sparse())
        y.square().mean().backward()
        return y

    case.compare(script, lambda: built(Sparse), inputs())


class Bag(nn.Module):
    """A table of words, whose gradient may be sparse."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8, sparse=sparse, padding_idx=0)
        self.head = nn.Linear(8, 5)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(words).mean(1)).square().mean()


def words(seed: int) -> torch.Tensor:
    """Return sequences of numbers of words."""
    return torch.randint(0, 16, (4, 5), generator=torch.Generator().manual_seed(seed))


@habit("nn.Embedding(sparse=True), trained with SGD")
def sparse_embedding(case: Case) -> None:
    def script(model: Any) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for seed in range(2):
            loss = model(words(seed))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
        return losses

    case.compare(script, lambda: built(Bag, True), words(0))


@habit("nn.Embedding(sparse=True), trained with SparseAdam")
def sparse_adam(case: Case) -> None:
    def script(model: Any) -> Any:
        optimizers = [
            torch.optim.SparseAdam([model.table.weight], lr=0.1),
            torch.optim.SGD(model.head.parameters(), lr=0.1),
        ]
        losses = []
        for seed in range(3):
            loss = model(words(seed))
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            losses += [loss, whole(model.table.weight.grad.coalesce().values())]
            for optimizer in optimizers:
                optimizer.zero_grad()
        return losses

    case.compare(script, lambda: built(Bag, True), words(0))


@habit("nn.Embedding(padding_idx=0), and indices as int32")
def padded(case: Case) -> None:
    def script(model: Any) -> Any:
        loss = model(words(1)) + model(words(2).int())
        loss.backward()
        return loss

    case.compare(script, lambda: built(Bag, False), words(0))


@habit("an index out of range")
def wrong_index(case: Case) -> None:
    case.compare(
        lambda model: model(words(1) + 99), lambda: built(Bag, False), words(0), fails=True
    )


@habit("a tensor subclass as input, with a __torch_function__ of its own")
def subclass(case: Case) -> None:
    class Tagged(torch.Tensor):
        pass

    def script(model: Any) -> Any:
        return model(inputs().as_subclass(Tagged)).as_subclass(torch.Tensor)

    case.compare(script, scores, inputs())


@habit("an nn.Parameter as input, which is trained (soft prompts)")
def parameter(case: Case) -> None:
    def script(model: Any) -> Any:
        prompt = nn.Parameter(inputs())
        optimizer = torch.optim.SGD([prompt], lr=0.1)
        losses = []
        for _ in range(2):
            loss = model(prompt).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss)
        return losses, prompt

    case.compare(script, scores, inputs(grad=True))


@habit("the same tensor for two arguments")
def same_tensor(case: Case) -> None:
    given(case, [inputs(), inputs(seed=1)], [inputs(seed=2)] * 2)


@habit("an input that forward writes to in place")
def written(case: Case) -> None:
    class Writing(Scores):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.mul_(2.0)
            return super().forward(x)

    def script(model: Any) -> Any:
        x = inputs()
        y = model(x)
        y.square().mean().backward()
        return y, x

    case.compare(script, lambda: built(Writing), inputs())


@habit("random numbers of forward's own: torch.rand_like, from one seed to the same result")
def random_forward(case: Case) -> None:
    class Noisy(Scores):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + torch.rand_like(x))

    model = case.split(built(Noisy), inputs())
    results = []
    for _ in range(2):
        autoparallel.manual_seed(model, 7)
        results.append([model(inputs()).detach() for _ in range(2)])
    case.same(results[0], results[1])
    assert not torch.equal(results[0][0], results[0][1])


@habit("a forward that branches on values: if x.sum() > 0")
def branch(case: Case) -> None:
    class Branching(Scores):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.tanh(self.up(x))
            return self.down(self.norm(hidden) if x.sum() > 0 else hidden)

    def script(model: Any) -> Any:
        values = [model(x).square().mean() for x in (inputs(), -inputs(), inputs().abs())]
        torch.stack(values).sum().backward()
        return values

    case.compare(script, lambda: built(Branching), inputs())


@habit("a forward with prints, logging and assertions on shapes")
def chatty(case: Case) -> None:
    class Chatty(Scores):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.dim() == 2, x.shape
            if x.shape[1] != 6:
                raise ValueError("six features are needed")
            return super().forward(x)

    def script(model: Any) -> Any:
        return model(inputs())

    case.compare(script, lambda: built(Chatty), inputs())


@habit("an error that forward raises for inputs it does not take")
def own_error(case: Case) -> None:
    class Careful(Scores):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[0] > 6:
                raise ValueError("at most six rows")
            return super().forward(x)

    case.compare(lambda model: model(inputs(7)), lambda: built(Careful), inputs(), fails=True)


@habit("label smoothing and class weights in the loss inside of forward")
def smoothing(case: Case) -> None:
    class Smooth(Scores):
        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            weight = torch.arange(1.0, 6.0, dtype=torch.float64)
            return F.cross_entropy(super().forward(x), labels, weight, label_smoothing=0.1)

    def script(model: Any) -> Any:
        loss = model(*rows(6, 1))
        loss.backward()
        return loss

    case.compare(script, lambda: built(Smooth), rows(6, 0))


@habit("a DataLoader with two worker processes")
def loader(case: Case) -> None:
    # Only a process that is no daemon may have children, and the launcher's are daemons.
    vars(multiprocessing.current_process())["_config"]["daemon"] = False

    def script(model: Any) -> Any:
        data = TensorDataset(*rows(12, 0))
        batches = DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context="fork")
        losses = [model(x, labels) for x, labels in batches]
        torch.stack(losses).sum().backward()
        return losses

    case.compare(script, plain)
