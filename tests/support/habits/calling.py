"""Habits with calls: of the model, of its parts and methods, of tools that take it apart."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .case import Case, whole
from .models import Scores, blocks, built, inputs, plain, rows, scores
from .registry import in_group

habit = in_group("Calls")


def value(model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Return the loss of a call, after its backward pass."""
    loss = model(*args, **kwargs)
    loss.backward()
    return loss


@habit("positional, keyword and mixed arguments, and defaults")
def arguments(case: Case) -> None:
    def script(model: Any) -> Any:
        x, labels = rows(6, 0)
        return [
            value(model, x, labels),
            value(model, x=x, labels=labels),
            value(model, x, labels=labels),
            value(model, labels=labels, scale=2.0, x=x),
        ]

    case.compare(script)


@habit("a missing argument")
def missing(case: Case) -> None:
    case.compare(lambda model: model(rows(6, 0)[0]), fails=True)


@habit("an argument with a name that forward does not take")
def strange(case: Case) -> None:
    case.compare(lambda model: model(*rows(6, 0), mask=None), fails=True)


@habit("batches of other sizes, and a smaller last one")
def sizes(case: Case) -> None:
    case.compare(lambda model: [value(model, *rows(count, count)) for count in (6, 8, 3, 2, 7)])


@habit("a batch of one sample")
def one_sample(case: Case) -> None:
    case.compare(lambda model: [model(inputs(count)) for count in (4, 1)], scores, inputs())


@habit("an empty batch (0 samples)")
def empty(case: Case) -> None:
    def script(model: Any) -> Any:
        y = model(inputs(0))
        y.sum().backward()
        return y

    case.compare(script, scores, inputs())


class Words(nn.Module):
    """An embedding, attention over the sequence, and scores."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 16)

    def get_input_embeddings(self) -> nn.Module:
        """Return the table of words, as Hugging Face's models do."""
        return self.embedding

    def encode(self, words: torch.Tensor) -> torch.Tensor:
        """Return the features before the head."""
        x = self.embedding(words)
        return self.attention(x, x, x, need_weights=False)[0]

    def forward(self, words: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        y = self.head(self.encode(words))
        if lengths is not None:
            kept = torch.arange(words.shape[1])[None] < lengths[:, None]
            y = y * kept[..., None]
        return y


def words(count: int = 4, length: int = 5, seed: int = 0) -> torch.Tensor:
    """Return sequences of numbers of words."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, (count, length), generator=generator)


def language() -> Words:
    return built(Words)


@habit("sequences of other lengths")
def lengths(case: Case) -> None:
    def script(model: Any) -> Any:
        return [value(lambda w: model(w).square().mean(), words(3, n)) for n in (5, 7, 2, 1)]

    case.compare(script, language, words())


@habit("an optional argument: None in some calls, a tensor in others")
def optional(case: Case) -> None:
    def script(model: Any) -> Any:
        limits = torch.tensor([1, 5, 3, 2])
        return [model(words()), model(words(), limits), model(words(), None)]

    case.compare(script, language, words())


@habit("a submodule called by itself: model.head(features)")
def submodule(case: Case) -> None:
    def script(model: Any) -> Any:
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return value(lambda: model.head(x).square().mean())

    case.compare(script, language, words())


@habit("another method than forward: model.encode(words)")
def method(case: Case) -> None:
    case.compare(lambda model: value(lambda: model.encode(words()).mean()), language, words())


@habit("model.get_input_embeddings()(ids)")
def input_embeddings(case: Case) -> None:
    def script(model: Any) -> Any:
        return value(lambda: model.get_input_embeddings()(words()).square().mean())

    case.compare(script, language, words())


@habit("a weight read outside: F.linear(x, model.head.weight)")
def weight_outside(case: Case) -> None:
    def script(model: Any) -> Any:
        x = torch.ones(3, 8, dtype=torch.float64)
        return value(lambda: F.linear(x, model.head.weight).square().mean())

    case.compare(script, language, words())


@habit("forward called without hooks: model.forward(x)")
def forward(case: Case) -> None:
    case.compare(lambda model: value(lambda: model.forward(*rows(6, 0))))


@habit("the signature of forward, the class of the model, isinstance")
def signature(case: Case) -> None:
    def script(model: Any) -> Any:
        names = list(inspect.signature(model.forward).parameters)
        return names, isinstance(model, type(plain())), hasattr(model, "up"), len(model._modules)

    case.compare(script)


@habit("named_modules, children, get_submodule, get_parameter, apply")
def tree(case: Case) -> None:
    def script(model: Any) -> Any:
        seen: list[str] = []
        model.apply(lambda module: seen.append(str(type(module).__name__)[-6:]))
        names = [name for name, _ in model.named_modules()]
        same = model.get_submodule("blocks.0.up") is model.blocks[0].up
        parameter = model.get_parameter("head.weight")
        return names, same, tuple(parameter.shape), len(seen), len(list(model.children()))

    case.compare(script, blocks, inputs())


@habit("print(model)")
def printed(case: Case) -> None:
    case.compare(lambda model: str(model).replace("Parallel", ""), blocks, inputs())


@habit("a criterion outside, on returned scores: F.cross_entropy(model(x), labels)")
def criterion(case: Case) -> None:
    def script(model: Any) -> Any:
        return value(lambda: F.cross_entropy(model(inputs()), torch.tensor([0, 1, 2, 3, 4, 0])))

    case.compare(script, scores, inputs())


@habit("a criterion outside on scores of many classes, which stay split")
def criterion_large(case: Case) -> None:
    def build() -> Any:
        return built(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4096)))

    def script(model: Any) -> Any:
        y = model(inputs(64))
        loss = F.cross_entropy(y, torch.arange(64) * 60)
        loss.backward()
        return loss, y[:2], y.argmax(-1)

    case.compare(script, build, inputs(64))


@habit("metrics on scores: argmax, topk, (prediction == labels).float().mean()")
def metrics(case: Case) -> None:
    def script(model: Any) -> Any:
        y = model(inputs())
        right = (y.argmax(-1) == torch.tensor([0, 1, 2, 3, 4, 0])).float().mean()
        return right.item(), y.topk(2).indices, y.softmax(-1)

    case.compare(script, scores, inputs())


@habit("scores beside a loss, as numpy and as a list: scores.detach().numpy(), tolist()")
def numbers(case: Case) -> None:
    def script(model: Any) -> Any:
        y = model(inputs()).detach()
        return torch.from_numpy(y.numpy()), y.tolist(), [float(v) for v in y[0]]

    case.compare(script, scores, inputs())


@dataclasses.dataclass
class Result:
    """An output as an object."""

    loss: torch.Tensor
    scores: torch.Tensor | None = None


class Returning(Scores):
    """Returns its scores in the structure that is asked for."""

    def forward(self, x: torch.Tensor, kind: str = "dict") -> Any:
        y = super().forward(x)
        loss = y.square().mean()
        made: dict[str, Any] = {
            "dict": {"loss": loss, "scores": y},
            "tuple": (loss, (y, None), [x]),
            "dataclass": Result(loss, y),
            "sizes": (loss, x.shape[0], y.shape),
            "constants": (loss, 3, "text", True),
            "same": (loss, x, x),
            "none": None,
        }
        return made[kind]


def returned(case: Case, kind: str) -> Any:
    """Compare an output in a structure, in batches of two sizes."""
    shown = {}

    def script(model: Any) -> Any:
        results = [model(inputs(count), kind=kind) for count in (6, 4)]
        shown[model] = results[0]
        return results

    model = case.compare(script, lambda: built(Returning), {"x": inputs(), "kind": kind})
    return shown[model]


@habit("returning a dict")
def returns_dict(case: Case) -> None:
    assert returned(case, "dict").keys() == {"loss", "scores"}


@habit("returning nested tuples and lists, with None in them")
def returns_tuple(case: Case) -> None:
    assert isinstance(returned(case, "tuple"), tuple)


@habit("returning a dataclass")
def returns_dataclass(case: Case) -> None:
    assert isinstance(returned(case, "dataclass"), Result)


@habit("returning sizes: x.shape[0], y.shape")
def returns_sizes(case: Case) -> None:
    returned(case, "sizes")


@habit("returning numbers, texts and truth values")
def returns_constants(case: Case) -> None:
    returned(case, "constants")


@habit("returning an input, the same tensor twice")
def returns_input(case: Case) -> None:
    result = returned(case, "same")
    assert result[1] is result[2]


@habit("returning None")
def returns_none(case: Case) -> None:
    assert returned(case, "none") is None


@habit("torch.compile(model)")
def compiled(case: Case) -> None:
    def script(model: Any) -> Any:
        # Without a compiler of C++: what is tested is that Dynamo takes the module.
        return value(torch.compile(model, backend="aot_eager"), *rows(6, 0))

    case.compare(script)


@habit("model.compile()")
def compiled_in_place(case: Case) -> None:
    def script(model: Any) -> Any:
        model.compile(backend="aot_eager")
        return value(model, *rows(6, 0))

    case.compare(script)


@habit("torch.compile(model) before splitting")
def compiled_before(case: Case) -> None:
    def build() -> Any:
        return torch.compile(plain(), backend="aot_eager")

    case.compare(lambda model: value(model, *rows(6, 0)), build)


@habit("torch.jit.trace of the split module")
def jit_traced(case: Case) -> None:
    def script(model: Any) -> Any:
        # Its check would run the module again and compare.
        return torch.jit.trace(model, (inputs(),), check_trace=False)(inputs(seed=1))

    case.compare(script, scores, inputs())


@habit("torch.jit.script of the split module")
def jit_scripted(case: Case) -> None:
    case.compare(lambda model: torch.jit.script(model)(inputs(seed=1)), scores, inputs())


@habit("torch.export.export of the split module")
def exported(case: Case) -> None:
    def script(model: Any) -> Any:
        return torch.export.export(model, (inputs(),)).module()(inputs(seed=1))

    case.compare(script, scores, inputs())


@habit("torch.fx.symbolic_trace of the split module")
def symbolic(case: Case) -> None:
    def script(model: Any) -> Any:
        return torch.fx.symbolic_trace(model)(inputs(seed=1))

    case.compare(script, scores, inputs())


@habit("torch.profiler around a step, and record_function inside")
def profiled(case: Case) -> None:
    def script(model: Any) -> Any:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            return value(model, *rows(6, 0))

    case.compare(script)


@habit("the split module as a part of a larger one that is not split")
def inside_other(case: Case) -> None:
    def script(model: Any) -> Any:
        torch.manual_seed(1)
        around = nn.Sequential(model, nn.Linear(5, 2).double())
        y = around(inputs())
        y.square().mean().backward()
        return y, around[1].weight.grad

    case.compare(script, scores, inputs())


@habit("splitting a module that is split already", refused=True)
def twice(case: Case) -> None:
    case.split(case.split(scores(), inputs()), inputs())


@habit("a model of which only a part is split: model.body = autoparallelize(model.body)")
def part_split(case: Case) -> None:
    def run(model: Any) -> Any:
        y = model.head(model.body(inputs()))
        y.square().mean().backward()
        return y

    def build() -> Any:
        torch.manual_seed(2)
        made = nn.Module()
        made.body = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8)).double()
        made.head = nn.Linear(8, 5).double()
        return made

    model, unsplit = build(), build()
    model.body = case.split(model.body, inputs())
    case.same(run(model), run(unsplit))
    case.same(whole(model.head.weight.grad), unsplit.head.weight.grad)
    case.same_module(model.body, unsplit.body)
