"""Layers written by hand: those of megatron_rules, and Megatron-Core's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from autoparallel.support.torch_private import multiply_all_, norms_of
from contenders.contender import AbsentError, Contender, Trained
from contenders.workloads import Workload

__all__ = ["BY_HAND", "clip_parts"]

KINDS = ("gpt", "bert", "llama")


def clip_parts(
    parameters: Iterable[Any], largest: float, is_split: Callable[[Any], bool]
) -> torch.Tensor:
    """Clip gradients of which some are parts, with one all-reduce, as Megatron's optimizer does.

    is_split: whether a parameter is a part of one, so that its squares are summed over the ranks.
    """
    some = [parameter for parameter in parameters if parameter.grad is not None]
    parts = [parameter.grad for parameter in some if is_split(parameter)]
    whole = [parameter.grad for parameter in some if not is_split(parameter)]
    with torch.no_grad():
        squares = torch.stack(norms_of(parts, 2.0, torch.float32)).square().sum()
        dist.all_reduce(squares)
        others = torch.stack(norms_of(whole, 2.0, torch.float32)).square().sum()
        total = (squares + others).sqrt()
        multiply_all_(parts + whole, torch.clamp(largest / (total + 1e-6), max=1.0))
    return total


def megatron_rules(workload: Workload, sequence_parallel: bool) -> Trained:
    """Return the model of this repository's hand-written layers.

    With sequence parallelism it keeps what it gathered, which is faster than to gather it again.
    """
    from megatron_rules.llama import ParallelLlama
    from megatron_rules.models import ParallelBert, ParallelGPT

    plain, inputs = workload.model(), workload.inputs()
    kind: Any = {"gpt": ParallelGPT, "bert": ParallelBert, "llama": ParallelLlama}[workload.kind]
    model = kind(plain.config, sequence_parallel=sequence_parallel, keep_gathered=True)
    model.load_plain(plain.state_dict())
    split = {
        id(getattr(module, name))
        for module in model.modules()
        for name in getattr(module, "splits", ())
    }

    def clip(parameters: Iterable[Any], largest: float) -> torch.Tensor:
        model.finish_gradients()
        return clip_parts(parameters, largest, lambda parameter: id(parameter) in split)

    return Trained(tuple(model.parameters()), lambda: model(**inputs).loss, clip)


def _use_cpu_for_cuda() -> None:
    """Let Megatron-Core have the CPU where it asks for CUDA, and torch's norm for its fused one."""
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)

    def norm_of(_: type, config: Any, hidden_size: int, eps: float, **__: Any) -> nn.LayerNorm:
        norm = nn.LayerNorm(hidden_size, eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = norm_of


def megatron_core(workload: Workload, sequence_parallel: bool) -> Trained:
    """Return NVIDIA's own GPT, on the CPU and without its fused kernels."""
    try:
        from megatron.core import parallel_state
        from megatron.core.distributed.finalize_model_grads import (
            _allreduce_non_tensor_model_parallel_grads as finish,
        )
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.models.gpt.gpt_model import GPTModel
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
        from megatron.core.transformer.transformer_config import TransformerConfig
    except ImportError as error:
        raise AbsentError(f"megatron-core is not installed: {error}") from error
    _use_cpu_for_cuda()
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
        model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=workload.layers,
        hidden_size=workload.hidden,
        num_attention_heads=workload.heads,
        tensor_model_parallel_size=dist.get_world_size(),
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        activation_func=partial(F.gelu, approximate="tanh"),
        attention_softmax_in_fp32=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="LayerNorm"),
        vocab_size=workload.vocabulary,
        max_sequence_length=workload.sequence,
        position_embedding_type="learned_absolute",
        share_embeddings_and_output_weights=True,
    )
    model.ddp_config = SimpleNamespace(use_megatron_fsdp=False)
    _load_core(model, workload)
    inputs, length = workload.inputs(), workload.sequence
    tokens, labels = inputs["input_ids"], inputs["labels"]
    future = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    positions = torch.arange(length).expand(workload.batch, length)

    def clip(parameters: Iterable[Any], largest: float) -> torch.Tensor:
        finish([model], config)
        return clip_parts(
            parameters, largest, lambda one: getattr(one, "tensor_model_parallel", False)
        )

    return Trained(
        tuple(model.parameters()),
        lambda: model(tokens, positions, future, labels=labels).mean(),
        clip,
    )


# Megatron-Core's names of modules, and the plain model's.
_NAMES = {
    "embedding.word_embeddings": "token_embedding",
    "embedding.position_embeddings": "position_embedding",
    "decoder.layers": "blocks",
    "decoder.final_layernorm": "final_norm",
    "input_layernorm": "attention_norm",
    "self_attention.linear_qkv": "attention.query_key_value",
    "self_attention.linear_proj": "attention.projection",
    "pre_mlp_layernorm": "feed_forward_norm",
    "mlp.linear_fc1": "feed_forward.expand",
    "mlp.linear_fc2": "feed_forward.contract",
}


@torch.no_grad()
def _load_core(model: nn.Module, workload: Workload) -> None:
    """Copy this rank's parts of the plain model's weights into Megatron-Core's."""
    plain = dict(workload.model().named_parameters())
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for theirs, parameter in model.named_parameters():
        name = theirs
        for core, bundled in _NAMES.items():
            name = name.replace(core, bundled)
        whole = plain[name]
        if "query_key_value" in name:
            # Its fused rows go head by head, ours all queries, all keys, all values.
            width = workload.hidden // workload.heads
            whole = whole.unflatten(0, (3, -1, width)).transpose(0, 1).flatten(0, 2)
        if parameter.shape != whole.shape:
            dim = next(d for d, size in enumerate(parameter.shape) if size != whole.shape[d])
            whole = whole.chunk(ranks, dim)[rank]
        parameter.copy_(whole)


BY_HAND = (
    Contender(
        "hand-tp", "hand-written", 2, KINDS, partial(megatron_rules, sequence_parallel=False)
    ),
    Contender(
        "hand-sp",
        "hand-written, sequence parallel",
        2,
        KINDS,
        partial(megatron_rules, sequence_parallel=True),
    ),
    Contender(
        "core-tp", "Megatron-Core", 2, ("gpt",), partial(megatron_core, sequence_parallel=False)
    ),
    Contender(
        "core-sp",
        "Megatron-Core, sequence parallel",
        2,
        ("gpt",),
        partial(megatron_core, sequence_parallel=True),
    ),
)
