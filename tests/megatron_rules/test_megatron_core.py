"""The hand-written layers against Megatron-Core's own: same numbers, same collectives.

Megatron-Core runs on the CPU with gloo once what it asks of CUDA is answered for the CPU, and its
fused kernels are off. It is needed for these tests alone.
"""

from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from collective_counter import CollectiveCounter
from processes import run_processes
from torch import Tensor, nn

from autoparallel.train.models import GPTConfig
from megatron_rules import layers, regions
from megatron_rules.models import ParallelGPT

# The ranks import it, and no process that collects these tests: it takes seconds.
pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="needs megatron-core")

SEQUENCE, BATCH, HIDDEN, HEADS, LAYERS, VOCABULARY = 6, 3, 16, 4, 2, 100
ACTIVATION, TOKENS = SEQUENCE * BATCH * HIDDEN, SEQUENCE * BATCH
# Megatron-Core computes the loss in single precision, all else in the model's.
EXACT, SINGLE = 1e-12, 2e-6
CASES = {
    "copy": EXACT,
    "reduce": EXACT,
    "gather sequence": EXACT,
    "reduce-scatter sequence": EXACT,
    "scatter sequence": EXACT,
    "column": EXACT,
    "row": EXACT,
    "embedding": EXACT,
    "cross-entropy": SINGLE,
    "block": EXACT,
    "model": SINGLE,
}
# Megatron-Core's names, and ours.
NAMES = {
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


def use_cpu_for_cuda() -> None:
    """Let Megatron-Core have the CPU where it asks for CUDA. For a process of its own."""
    from megatron.core.tensor_parallel import random as megatron_random

    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def use_torch_norm() -> None:
    """Its norm without a GPU refuses sequence parallelism only because it doesn't mark its weights
    as pending; the fused one does. This one does as well."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    def make(_: type, config: Any, hidden_size: int, eps: float, **__: Any) -> nn.LayerNorm:
        norm = nn.LayerNorm(hidden_size, eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = make


def translate(name: str, value: Tensor) -> tuple[str, Tensor]:
    """Our name and order of a tensor of Megatron-Core's; ours pass unchanged.

    Its fused rows go head by head, ours all queries, all keys, all values.
    """
    if "linear_qkv" in name:
        value = value.unflatten(0, (-1, 3, HIDDEN // HEADS)).transpose(0, 1).flatten(0, 2)
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name, value


def record(
    call: Callable[[Tensor], Tensor],
    x: Tensor,
    module: nn.Module | None = None,
    finish: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Result, gradients and collectives of call(x), for an incoming gradient of the rank's own.

    module: whose parameters' gradients are wanted. finish: what sums the pending gradients.
    """
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    with CollectiveCounter() as forward:
        # A copy: Megatron-Core writes into the inputs of some functions.
        result = call(x.clone())
    # Unequal on the ranks: a sum of equal terms would hide a wrong factor.
    generator = torch.Generator().manual_seed(5 + torch.distributed.get_rank())
    incoming = torch.randn(result.shape, generator=generator).to(result)
    with CollectiveCounter() as backward:
        result.backward(incoming)
    with CollectiveCounter() as finishing:
        if finish is not None:
            finish()
    named = [] if module is None else module.named_parameters()
    gradients = dict(translate(name, p.grad) for name, p in named if p.grad is not None)
    if x.grad is not None:
        gradients["x"] = x.grad
    return {
        "tensors": {"result": result.detach(), **gradients},
        "forward": forward.counts,
        "backward": backward.counts,
        "finish": finishing.counts,
    }


def compare(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Errors relative to the largest number, and the collectives of both."""
    assert theirs["tensors"].keys() == ours["tensors"].keys()
    errors = {}
    for name, expected in theirs["tensors"].items():
        difference = (ours["tensors"][name] - expected).abs().max()
        errors[name] = (difference / expected.abs().max()).item()
    counts = {
        name: {key: dict(run[key]) for key in run if key != "tensors"}
        for name, run in (("theirs", theirs), ("ours", ours))
    }
    return {"errors": errors, **counts}


def fill(module: nn.Module) -> None:
    """Random parameters, also where the initialization is 0 or 1; each rank its own if split."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if getattr(parameter, "tensor_model_parallel", False):
                values *= 1 + torch.distributed.get_rank()
            parameter.copy_(values * 0.3)


def copy_weights(theirs: nn.Module, ours: nn.Module) -> None:
    """This rank's parts, from Megatron-Core's module to ours."""
    parameters = dict(ours.named_parameters())
    with torch.no_grad():
        for theirs_name, theirs_value in theirs.named_parameters():
            name, value = translate(theirs_name, theirs_value)
            parameters.pop(name).copy_(value)
    assert not parameters


def work(rank: int) -> dict[tuple[str, bool], Any]:
    """All comparisons, by case and by whether the sequence is split, in one start."""
    use_cpu_for_cuda()
    use_torch_norm()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    model_parallel_cuda_manual_seed(1)
    results = {}
    for sequence_parallel in (False, True):
        compared = {
            **compare_crossings(rank),
            **compare_layers(rank, sequence_parallel),
            **compare_models(rank, sequence_parallel),
        }
        results |= {(name, sequence_parallel): value for name, value in compared.items()}
    return results


def core_config(sequence_parallel: bool) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        params_dtype=torch.float64,
        pipeline_dtype=torch.float64,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        activation_func=lambda x: F.gelu(x, approximate="tanh"),
        attention_softmax_in_fp32=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
    )


def random_activation(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def compare_crossings(rank: int) -> dict[str, Any]:
    from megatron.core.tensor_parallel import mappings

    pairs = {
        "copy": (mappings.copy_to_tensor_model_parallel_region, regions.copy_to_tensor_parallel),
        "reduce": (
            mappings.reduce_from_tensor_model_parallel_region,
            regions.reduce_from_tensor_parallel,
        ),
        "gather sequence": (
            mappings.gather_from_sequence_parallel_region,
            regions.gather_from_sequence_parallel,
        ),
        "reduce-scatter sequence": (
            mappings.reduce_scatter_to_sequence_parallel_region,
            regions.reduce_scatter_to_sequence_parallel,
        ),
        "scatter sequence": (
            mappings.scatter_to_sequence_parallel_region,
            regions.scatter_to_sequence_parallel,
        ),
    }
    x = random_activation(SEQUENCE, BATCH, HIDDEN, seed=rank)
    return {
        name: compare(record(theirs, x), record(ours, x)) for name, (theirs, ours) in pairs.items()
    }


def compare_layers(rank: int, sequence_parallel: bool) -> dict[str, Any]:
    from megatron.core import tensor_parallel

    config = core_config(sequence_parallel)
    options = {"config": config, "init_method": nn.init.zeros_}
    own = {"sequence_parallel": sequence_parallel}
    whole = random_activation(SEQUENCE, BATCH, HIDDEN, seed=8)
    part = whole.chunk(2)[rank] if sequence_parallel else whole
    tokens = torch.arange(TOKENS).view(SEQUENCE, BATCH) * 37 % VOCABULARY

    column = tensor_parallel.ColumnParallelLinear(HIDDEN, 40, **options)
    row = tensor_parallel.RowParallelLinear(
        HIDDEN, 40, bias=True, input_is_parallel=True, skip_bias_add=False, **options
    )
    embedding = tensor_parallel.VocabParallelEmbedding(VOCABULARY, HIDDEN, **options)
    modules = {
        "column": (column, layers.ColumnParallelLinear(HIDDEN, 40, **own), part),
        "row": (row, layers.RowParallelLinear(HIDDEN, 40, **own), whole.chunk(2, dim=-1)[rank]),
        "embedding": (embedding, layers.VocabParallelEmbedding(VOCABULARY, HIDDEN), tokens),
    }
    results = {}
    for name, (theirs, ours, x) in modules.items():
        fill(theirs)
        copy_weights(theirs, ours.double())
        results[name] = compare(
            record(lambda x, module=theirs: first(module(x)), x, theirs),
            record(ours, x, ours),
        )
    logits = random_activation(SEQUENCE, BATCH, VOCABULARY // 2, seed=rank) * 5
    results["cross-entropy"] = compare(
        record(lambda x: tensor_parallel.vocab_parallel_cross_entropy(x, tokens).mean(), logits),
        record(lambda x: layers.vocab_parallel_cross_entropy(x, tokens, VOCABULARY), logits),
    )
    return results


def first(output: Any) -> Tensor:
    """Megatron-Core's linear layers and blocks return a pair."""
    return output[0] if isinstance(output, tuple) else output


def compare_models(rank: int, sequence_parallel: bool) -> dict[str, Any]:
    """A whole GPT of two blocks, and its first block alone."""
    from megatron.core.distributed.finalize_model_grads import (
        _allreduce_non_tensor_model_parallel_grads as finish_core,
    )
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    config = core_config(sequence_parallel)
    core = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="LayerNorm"),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE + 2,
        position_embedding_type="learned_absolute",
        share_embeddings_and_output_weights=True,
    ).double()
    fill(core)
    sizes = GPTConfig(LAYERS, HIDDEN, HEADS, VOCABULARY, positions=SEQUENCE + 2, dropout=0.0)
    ours = ParallelGPT(sizes, sequence_parallel=sequence_parallel).double()
    copy_weights(core, ours)

    future = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    positions = torch.arange(SEQUENCE).expand(BATCH, SEQUENCE)
    tokens = torch.arange(TOKENS).view(BATCH, SEQUENCE) * 37 % VOCABULARY
    labels = tokens.roll(-1, dims=1)
    whole = random_activation(SEQUENCE, BATCH, HIDDEN, seed=9)
    x = whole.chunk(2)[rank] if sequence_parallel else whole

    core.ddp_config = SimpleNamespace(use_megatron_fsdp=False)

    def finish() -> None:
        finish_core([core], config)

    results = {}
    results["block"] = compare(
        record(lambda x: first(core.decoder.layers[0](x, future)), x, core, finish),
        record(ours.blocks[0], x, ours, ours.finish_gradients),
    )
    core.zero_grad()
    ours.zero_grad()
    results["model"] = compare(
        record(
            lambda ids: core(ids, positions, future, labels=labels).mean(), tokens, core, finish
        ),
        record(lambda ids: ours(ids, labels).loss, tokens, ours, ours.finish_gradients),
    )
    return results


@pytest.fixture(scope="module")
def outcomes() -> list[dict[tuple[str, bool], Any]]:
    return run_processes(work, 2)


def test_nothing_is_left_out(outcomes: list[dict[tuple[str, bool], Any]]) -> None:
    for results in outcomes:
        assert {name for name, _ in results} == CASES.keys()


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence_parallel"])
@pytest.mark.parametrize("name", CASES)
def test_equals_megatron_core(
    outcomes: list[dict[tuple[str, bool], Any]], name: str, sequence_parallel: bool
) -> None:
    """Results, gradients of input and weights, and collectives of each pass, on both ranks."""
    for results in outcomes:
        outcome = results[name, sequence_parallel]
        too_large = {key: e for key, e in outcome["errors"].items() if not e < CASES[name]}
        assert not too_large
        assert outcome["ours"] == outcome["theirs"]


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence_parallel"])
def test_collectives_of_a_block_of_megatron_core(
    outcomes: list[dict[tuple[str, bool], Any]], sequence_parallel: bool
) -> None:
    """What the published numbers say, counted on its running block."""
    if sequence_parallel:
        expected = {
            "forward": {("all_gather", ACTIVATION): 2, ("reduce_scatter", ACTIVATION): 2},
            "backward": {("all_gather", ACTIVATION): 4, ("reduce_scatter", ACTIVATION): 2},
            "finish": {("all_reduce", 6 * HIDDEN): 1},
        }
    else:
        expected = {
            "forward": {("all_reduce", ACTIVATION): 2},
            "backward": {("all_reduce", ACTIVATION): 2},
            "finish": {},
        }
    for results in outcomes:
        assert results["block", sequence_parallel]["theirs"] == expected
