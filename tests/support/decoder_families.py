"""Families of decoders: attention, experts, state spaces, linear attention, recurrences."""

from __future__ import annotations

from functools import partial
from typing import Any

from family_makers import Family, Make, hugging_face
from family_options import DECODER, EXPERTS, GPT, GROUPED, INNER, LAYERS, WORDS
from zoo_inputs import POSITIONS, tokens
from zoo_layers import HEADS, HIDDEN

__all__ = ["FAMILIES"]

unpadded = partial(tokens, False)


def decoder(name: str, prefix: str, kind: str = "decoder", **options: Any) -> Family:
    """Return the family of {prefix}ForCausalLM with {prefix}Config."""
    return Family(name, "transformers", kind, _causal(prefix, options), tokens)


def _causal(prefix: str, options: dict[str, Any]) -> Make:
    return hugging_face(f"{prefix}ForCausalLM", f"{prefix}Config", **options)


def state(name: str, prefix: str, kind: str = "state space", **options: Any) -> Family:
    """Return the family of a recurrent {prefix}ForCausalLM, of texts of one length."""
    return Family(name, "transformers", kind, _causal(prefix, options), unpadded)


_DECODERS = (
    decoder(
        "gpt-neo",
        "GPTNeo",
        **WORDS,
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        num_heads=HEADS,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        max_position_embeddings=POSITIONS,
        use_cache=False,
    ),
    decoder("gpt-bigcode", "GPTBigCode", **GPT),
    decoder("codegen", "CodeGen", **GPT, rotary_dim=4),
    decoder(
        "mpt",
        "Mpt",
        **WORDS,
        d_model=HIDDEN,
        n_heads=HEADS,
        n_layers=LAYERS,
        max_seq_len=POSITIONS,
        use_cache=False,
    ),
    Family(
        "ctrl",
        "transformers",
        "decoder",
        hugging_face("CTRLLMHeadModel", "CTRLConfig", **GPT, dff=INNER),
        tokens,
    ),
    decoder("olmo2", "Olmo2", **GROUPED),
    decoder("cohere", "Cohere", **GROUPED, use_qk_norm=True),
    decoder("gemma2", "Gemma2", **GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=4),
    decoder("phi3", "Phi3", **GROUPED),
    decoder("stablelm", "StableLm", **GROUPED),
    decoder("nemotron", "Nemotron", **GROUPED),
    decoder("biogpt", "BioGpt", **DECODER),
    decoder("diffllama", "DiffLlama", **GROUPED),
    decoder("glm4", "Glm4", **GROUPED, head_dim=8),
    decoder(
        "gpt-oss",
        "GptOss",
        "experts",
        **{**EXPERTS, "intermediate_size": HIDDEN},
        head_dim=8,
        sliding_window=4,
    ),
    decoder(
        "qwen2-moe",
        "Qwen2Moe",
        "experts",
        **GROUPED,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=HIDDEN,
        shared_expert_intermediate_size=HIDDEN,
    ),
    decoder(
        "jetmoe",
        "JetMoe",
        "experts",
        **WORDS,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_key_value_heads=4,
        kv_channels=8,
        intermediate_size=HIDDEN,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=8,
        use_cache=False,
    ),
    decoder("granite-moe", "GraniteMoe", "experts", **EXPERTS),
    decoder(
        "deepseek-v2",
        "DeepseekV2",
        "experts",
        **{**DECODER, "num_key_value_heads": HEADS},
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=HIDDEN,
    ),
    Family(
        "llama4",
        "transformers",
        "experts",
        hugging_face(
            "Llama4ForCausalLM",
            "Llama4TextConfig",
            **EXPERTS,
            head_dim=8,
            intermediate_size_mlp=INNER,
            attention_chunk_size=8,
        ),
        tokens,
    ),
    decoder("minimax", "MiniMax", "linear attention", **EXPERTS, head_dim=8, block_size=4),
)
_STATES = (
    state(
        "mamba2",
        "Mamba2",
        **WORDS,
        hidden_size=HIDDEN,
        num_heads=16,
        head_dim=8,
        state_size=8,
        num_hidden_layers=LAYERS,
        n_groups=2,
        chunk_size=4,
        use_cache=False,
    ),
    state(
        "falcon-mamba",
        "FalconMamba",
        **WORDS,
        hidden_size=HIDDEN,
        state_size=4,
        num_hidden_layers=LAYERS,
        use_cache=False,
    ),
    state(
        "jamba",
        "Jamba",
        "state space, attention and experts",
        **GROUPED,
        num_experts=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=8,
        use_mamba_kernels=False,
    ),
    state(
        "bamba",
        "Bamba",
        "state space and attention",
        **GROUPED,
        attn_layer_indices=[1],
        mamba_n_heads=16,
        mamba_d_head=8,
        mamba_n_groups=2,
        mamba_d_state=8,
        mamba_chunk_size=4,
    ),
    state(
        "recurrent-gemma",
        "RecurrentGemma",
        "gated recurrence and attention",
        **{**GROUPED, "num_hidden_layers": 3},
        lru_width=HIDDEN,
        attention_window_size=4,
        head_dim=8,
    ),
    state(
        "xlstm",
        "xLSTM",
        "matrix recurrence",
        **WORDS,
        hidden_size=HIDDEN,
        embedding_dim=HIDDEN,
        num_hidden_layers=LAYERS,
        num_blocks=LAYERS,
        num_heads=4,
        chunk_size=8,
        use_cache=False,
    ),
    state(
        "qwen3-next",
        "Qwen3Next",
        "linear attention and experts",
        **GROUPED,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=HIDDEN,
        shared_expert_intermediate_size=HIDDEN,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
    ),
    state(
        "lfm2",
        "Lfm2",
        "short convolution and attention",
        **GROUPED,
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    ),
)
FAMILIES = (*_DECODERS, *_STATES)
