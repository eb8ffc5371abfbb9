"""Libraries that split a model by a plan that its user, or the model's author, has written."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import clip_grad_norm_

from contenders.by_hand import clip_parts
from contenders.contender import AbsentError, Contender, Trained
from contenders.workloads import Workload

__all__ = ["LIBRARIES"]


class _Attention(nn.Module):
    """The plain model's attention with a product each for query, key and value.

    DTensor cannot split the rows of a fused one by heads; torch's own examples have three.
    """

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.width = whole.hidden // whole.heads
        weights = whole.query_key_value.weight.data.chunk(3)
        biases = whole.query_key_value.bias.data.chunk(3)
        self.query, self.key, self.value = (nn.Linear(whole.hidden, whole.hidden) for _ in range(3))
        for layer, weight, bias in zip(
            (self.query, self.key, self.value), weights, biases, strict=True
        ):
            layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
        self.projection = whole.projection

    def forward(self, x: torch.Tensor, mask: Any = None) -> torch.Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.projection(context.transpose(1, 2).flatten(-2))


class _Unembedding(nn.Module):
    """The output head, as a module that parallelize_module can name."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Any) -> Any:
        return F.linear(x, self.weight)


class _GPT(nn.Module):
    """The plain GPT with attention and head as above."""

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.token_embedding, self.position_embedding = (
            plain.token_embedding,
            plain.position_embedding,
        )
        self.blocks, self.final_norm = plain.blocks, plain.final_norm
        for block in self.blocks:
            block.attention = _Attention(block.attention)
        self.head = nn.Linear(plain.config.hidden, plain.config.vocabulary, bias=False)
        self.head.weight = self.token_embedding.weight

    def forward(self, input_ids: torch.Tensor) -> Any:
        positions = torch.arange(input_ids.shape[1])[None]
        x = self.token_embedding(input_ids) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.final_norm(x))


def dtensor(workload: Workload, sequence_parallel: bool) -> Trained:
    """Return the GPT split by torch's parallelize_module, as in torch's tutorial of it."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        loss_parallel,
        parallelize_module,
    )

    model, inputs = _GPT(workload.model()), workload.inputs()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    outside: Any = Shard(1) if sequence_parallel else Replicate()
    plan: dict[str, Any] = {
        "token_embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=outside),
        "position_embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=outside),
        "head": ColwiseParallel(
            input_layouts=outside, output_layouts=Shard(-1), use_local_output=False
        ),
    }
    norms: Any = {"final_norm": SequenceParallel()} if sequence_parallel else {}
    parallelize_module(model, mesh, {**plan, **norms})
    model.head.weight = model.token_embedding.weight  # tied again
    for block in model.blocks:
        layers: dict[str, Any] = {
            "attention.query": ColwiseParallel(),
            "attention.key": ColwiseParallel(),
            "attention.value": ColwiseParallel(),
            "attention.projection": RowwiseParallel(output_layouts=outside),
            "feed_forward.expand": ColwiseParallel(),
            "feed_forward.contract": RowwiseParallel(output_layouts=outside),
        }
        if sequence_parallel:
            gather: Any = partial(
                PrepareModuleInput,
                input_layouts=(outside,),
                desired_input_layouts=(Replicate(),),
                use_local_output=True,
            )
            layers |= {
                "attention": PrepareModuleInput(
                    input_layouts=(outside, None), desired_input_layouts=(Replicate(), None)
                ),
                "feed_forward": gather(),
                "attention_norm": SequenceParallel(),
                "feed_forward_norm": SequenceParallel(),
            }
        parallelize_module(block, mesh, layers)
    labels = inputs["labels"].flatten()

    class Loss:
        """A loss whose backward pass is under loss_parallel, too."""

        def __init__(self, value: Any) -> None:
            self.value = value

        def backward(self) -> None:
            with loss_parallel():
                self.value.backward()

        def __float__(self) -> float:
            return float(self.value.full_tensor())

    def loss() -> Any:
        with loss_parallel():
            logits = model(inputs["input_ids"])
            return Loss(F.cross_entropy(logits.flatten(0, 1), labels))

    return Trained(tuple(model.parameters()), loss, _clip_distributed)


def _clip_distributed(parameters: Any, largest: float) -> Any:
    """Clip as torch does; parameters that no plan names are plain tensors, in a call of their own.

    torch refuses to mix them with DTensors, so the norm is put together by hand.
    """
    from torch.distributed.tensor import DTensor
    from torch.nn.utils import clip_grads_with_norm_, get_total_norm

    some = [parameter for parameter in parameters if parameter.grad is not None]
    split = [p for p in some if isinstance(p, DTensor)]
    whole = [p for p in some if not isinstance(p, DTensor)]
    if not whole:
        return clip_grad_norm_(split, largest)
    norm: Any = get_total_norm([p.grad for p in split])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    total = (norm.square() + get_total_norm([p.grad for p in whole]).square()).sqrt()
    clip_grads_with_norm_(split, largest, total)
    clip_grads_with_norm_(whole, largest, total)
    return total


def hugging_face(workload: Workload) -> Trained:
    """Return Hugging Face's model with the plan that its authors wrote, tp_plan="auto"."""
    from transformers import AutoModelForCausalLM

    plain, inputs = workload.model(), workload.inputs()
    folder: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        plain.save_pretrained(folder[0])
    dist.barrier()
    model = AutoModelForCausalLM.from_pretrained(
        folder[0], tp_plan="auto", device_mesh=init_device_mesh("cpu", (dist.get_world_size(),))
    )
    model.train()
    return Trained(tuple(model.parameters()), lambda: model(**inputs).loss, _clip_distributed)


def deepspeed(workload: Workload) -> Trained:
    """Return the model as DeepSpeed's AutoTP splits it; torch's AdamW steps on its parameters."""
    try:
        import deepspeed as library
    except ImportError as error:
        raise AbsentError(f"deepspeed is not installed: {error}") from error
    model, inputs = workload.model(), workload.inputs()
    config = {
        "train_micro_batch_size_per_gpu": workload.batch,
        "tensor_parallel": {"autotp_size": dist.get_world_size()},
        "zero_optimization": {"stage": 0},
    }
    engine, *_ = library.initialize(model=model, config=config, dist_init_required=False)
    split = {
        id(parameter)
        for module in engine.module.modules()
        if type(module).__name__ in ("LinearLayer", "LinearAllreduce")
        for parameter in module.parameters(recurse=False)
        if parameter.dim() > 1
    }
    return Trained(
        tuple(engine.module.parameters()),
        lambda: engine.module(**inputs).loss,
        partial(clip_parts, is_split=lambda parameter: id(parameter) in split),
    )


LIBRARIES = (
    Contender(
        "dtensor-tp",
        "DTensor, parallelize_module",
        2,
        ("gpt",),
        partial(dtensor, sequence_parallel=False),
    ),
    Contender(
        "dtensor-sp",
        "DTensor, sequence parallel",
        2,
        ("gpt",),
        partial(dtensor, sequence_parallel=True),
    ),
    Contender("hf", 'Hugging Face, tp_plan="auto"', 2, ("llama",), hugging_face),
    Contender("deepspeed", "DeepSpeed AutoTP", 2, ("llama",), deepspeed),
)
