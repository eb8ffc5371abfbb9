"""The models that tests are about, tiny and with sizes that need not divide by the ranks."""

from __future__ import annotations

from typing import Any

import torch
import zoo
from torch import nn
from torch.overrides import TorchFunctionMode
from zoo import HEADS, HIDDEN, VOCABULARY

from autoparallel.train.models import GPT, Bert, BertConfig, GPTConfig

FAMILIES = ("mlp", "gpt", "bert", "hf-gpt2", "hf-bert", "hf-llama")
TRANSFORMERS = FAMILIES[1:]
LAYERS, BATCH, SEQUENCE = 2, 3, 10


class MLP(nn.Module):
    """An MLP has two products and a loss: 24 features, 40 inner ones, 7 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 40)
        self.second = nn.Linear(40, 24)
        self.head = nn.Linear(24, 16, bias=False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """x: (b, 24). labels: (b,) below 16."""
        logits = self.head(x + self.second(torch.relu(self.first(x))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def build(name: str, layers: int = LAYERS, **changes: Any) -> nn.Module:
    """Return the model in float64 and train mode, without dropout, always with the same weights."""
    torch.manual_seed(7)
    return _make(name, layers, **changes).double().train()


def _make(name: str, layers: int, **changes: Any) -> nn.Module:
    if name == "mlp":
        return MLP()
    sizes = {"layers": layers, "hidden": HIDDEN, "heads": HEADS, "vocabulary": VOCABULARY}
    sizes |= {"positions": 32, "dropout": 0.0} | changes
    if name == "gpt":
        return GPT(GPTConfig(**sizes))
    if name == "bert":
        return Bert(BertConfig(**sizes))
    return zoo.FAMILIES[name.removeprefix("hf-")].make(layers, 0.0)


def inputs_for(name: str, batch: int = BATCH, sequence: int = SEQUENCE) -> dict[str, Any]:
    """Return keyword arguments, with a real padding mask where the model takes one."""
    generator = torch.Generator().manual_seed(3)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    if name == "mlp":
        x = torch.randn(batch, 24, generator=generator, dtype=torch.float64)
        return {"x": x, "labels": draw(16, batch)}
    labels = draw(VOCABULARY, batch, sequence)
    labels[0, :3] = -100
    inputs = {"input_ids": draw(VOCABULARY, batch, sequence), "labels": labels}
    if name != "gpt":
        mask = torch.ones(batch, sequence, dtype=torch.long)
        mask[1, -2:] = 0
        inputs["attention_mask"] = mask
    return inputs


# Not those that make tensors: the tracer holds them to the type that they were told.
_CASTING = {torch.Tensor.to, torch.Tensor.type}
_CASTING |= {torch.softmax, torch.Tensor.softmax, nn.functional.softmax}
_CASTING |= {torch.log_softmax, torch.Tensor.log_softmax, nn.functional.log_softmax}
_CASTING |= {torch.sum, torch.Tensor.sum, torch.mean, torch.Tensor.mean}
_CASTING |= {torch.cumsum, torch.Tensor.cumsum}
_MAKING = {torch.zeros, torch.ones}


class Float64(TorchFunctionMode):
    """A Float64 mode turns casts to float32 into casts to float64, whichever function makes them.

    Hugging Face models cast norms and logits to float32 whatever their own type is, which would
    hide differences below 1e-7, and begin sums with zeros of torch's default type.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        def widen(item: Any) -> Any:
            return torch.float64 if item is torch.float32 else item

        if function is torch.Tensor.float:
            return args[0].double()
        if function in _CASTING:
            args = tuple(map(widen, args))
            kwargs = {key: widen(value) for key, value in (kwargs or {}).items()}
        elif function in _MAKING:
            kwargs = {"dtype": torch.float64, **(kwargs or {})}
        return function(*args, **(kwargs or {}))


def loss_and_logits(output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return loss and logits of a dict, a named tuple or a Hugging Face output."""
    if isinstance(output, dict):
        return output["loss"], output["logits"]
    return output.loss, output.logits


def relative_error(actual: torch.Tensor, expected: torch.Tensor, scale: float = 0.0) -> float:
    """Return |actual - expected| / |expected|. scale: the least norm to divide by."""
    norm = max(float(expected.norm()), scale, 1e-300)
    return float((actual - expected).norm()) / norm


def gradients_of(model: nn.Module, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return every parameter's gradient of the loss, tied ones under each of their names."""
    model.zero_grad()
    loss_and_logits(model(**inputs))[0].backward()
    named = model.named_parameters(remove_duplicate=False)
    return {path: p.grad.clone() for path, p in named if p.grad is not None}


def worst_gradient(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> tuple[float, str]:
    """Return the largest relative error over all gradients, and the name of its parameter.

    A gradient that is zero but for rounding is compared on the scale of the largest one.
    """
    missing = set(expected) ^ set(actual)
    if missing:
        return float("inf"), f"only on one side: {sorted(missing)}"
    largest = max(float(gradient.norm()) for gradient in expected.values())
    errors = {
        path: relative_error(actual[path], gradient, 1e-4 * largest)
        for path, gradient in expected.items()
    }
    worst = max(errors, key=lambda path: errors[path])
    return errors[worst], worst
