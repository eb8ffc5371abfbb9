"""Families of language models: decoders, encoders, both, state spaces, experts, recurrences."""

from __future__ import annotations

from functools import partial
from typing import Any

from family_makers import Family, Make, hugging_face
from zoo_inputs import POSITIONS, Inputs, pairs, tokens
from zoo_layers import HEADS, HIDDEN, VOCABULARY

__all__ = ["FAMILIES"]

LAYERS, INNER = 2, 4 * HIDDEN
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
WORDS = {"vocab_size": VOCABULARY, **SPECIAL}
STACK = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
STACK |= {"intermediate_size": INNER}
ENCODER = {**WORDS, **STACK, "max_position_embeddings": POSITIONS}
DECODER = {**ENCODER, "use_cache": False}
GROUPED = {**DECODER, "num_key_value_heads": HEADS // 2}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2, "num_local_experts": 8}
GPT = {**WORDS, "n_embd": HIDDEN, "n_head": HEADS, "n_layer": LAYERS, "n_positions": POSITIONS}
GPT |= {"use_cache": False}
BOTH = {
    **WORDS,
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "decoder_start_token_id": 1,
    "use_cache": False,
}
T5 = {**WORDS, "d_model": HIDDEN, "d_kv": 8, "d_ff": INNER, "num_layers": LAYERS}
T5 |= {"num_decoder_layers": LAYERS, "num_heads": HEADS, "use_cache": False}
T5 |= {"decoder_start_token_id": 2}
unpadded = partial(tokens, False)
long_text = partial(tokens, True, 16)
even_text = partial(tokens, False, 16)


def unpadded_pairs() -> Inputs:
    """Return source and target; ProphetNet's masks of padding overflow in float64."""
    return {key: value for key, value in pairs().items() if key != "attention_mask"}


def decoder(name: str, prefix: str, kind: str = "decoder", **options: Any) -> Family:
    """Return the family of {prefix}ForCausalLM with {prefix}Config."""
    return Family(name, "transformers", kind, _causal(prefix, options), tokens)


def _causal(prefix: str, options: dict[str, Any]) -> Make:
    return hugging_face(f"{prefix}ForCausalLM", f"{prefix}Config", **options)


def encoder(name: str, prefix: str, **options: Any) -> Family:
    """Return the family of {prefix}ForMaskedLM with {prefix}Config."""
    make = hugging_face(f"{prefix}ForMaskedLM", f"{prefix}Config", **{**ENCODER, **options})
    return Family(name, "transformers", "encoder", make, tokens)


def both(name: str, prefix: str, **options: Any) -> Family:
    """Return the family of {prefix}ForConditionalGeneration with {prefix}Config."""
    make = hugging_face(f"{prefix}ForConditionalGeneration", f"{prefix}Config", **options)
    return Family(name, "transformers", "encoder and decoder", make, pairs)


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
_ENCODERS = (
    Family(
        "distilbert",
        "transformers",
        "encoder",
        hugging_face(
            "DistilBertForMaskedLM",
            "DistilBertConfig",
            **WORDS,
            dim=HIDDEN,
            n_layers=LAYERS,
            n_heads=HEADS,
            hidden_dim=INNER,
            max_position_embeddings=POSITIONS,
        ),
        tokens,
        drops=True,
    ),
    encoder("electra", "Electra", embedding_size=24),
    encoder("mpnet", "MPNet"),
    Family(
        "funnel",
        "transformers",
        "encoder",
        hugging_face(
            "FunnelForMaskedLM",
            "FunnelConfig",
            **WORDS,
            block_sizes=[1, 1],
            num_decoder_layers=1,
            d_model=HIDDEN,
            n_head=HEADS,
            d_head=8,
            d_inner=INNER,
        ),
        long_text,
    ),
    Family(
        "longformer",
        "transformers",
        "encoder",
        hugging_face("LongformerForMaskedLM", "LongformerConfig", **ENCODER, attention_window=4),
        long_text,
    ),
    encoder("convbert", "ConvBert", embedding_size=HIDDEN, conv_kernel_size=3),
    encoder("squeezebert", "SqueezeBert", embedding_size=HIDDEN),
    encoder(
        "mobilebert",
        "MobileBert",
        embedding_size=32,
        true_hidden_size=32,
        intra_bottleneck_size=32,
        num_attention_heads=4,
    ),
    Family(
        "fnet",
        "transformers",
        "Fourier mixing",
        hugging_face("FNetForMaskedLM", "FNetConfig", **ENCODER),
        unpadded,
    ),
    Family("nystromformer", "transformers", "landmark attention",
           hugging_face("NystromformerForMaskedLM", "NystromformerConfig", **ENCODER,
        segment_means_seq_len=16,
        num_landmarks=16,
        conv_kernel_size=5), long_text
    ),
    encoder(
        "modernbert",
        "ModernBert",
        local_attention=4,
        layer_types=["full_attention", "sliding_attention"],
        cls_token_id=0,
        sep_token_id=1,
    ),
    encoder("roformer", "RoFormer", embedding_size=HIDDEN),
    encoder("ibert", "IBert", quant_mode=True),
    encoder("esm", "Esm", position_embedding_type="rotary", mask_token_id=4),
    Family(
        "canine",
        "transformers",
        "encoder of characters",
        hugging_face(
            "CanineForTokenClassification",
            "CanineConfig",
            **{**ENCODER, "vocab_size": 16},
            num_hash_functions=2,
            num_hash_buckets=64,
            local_transformer_stride=8,
            num_labels=VOCABULARY,
        ),
        long_text,
    ),
    Family(
        "reformer",
        "transformers",
        "hashed attention, reversible",
        hugging_face(
            "ReformerModelWithLMHead",
            "ReformerConfig",
            **WORDS,
            attention_head_size=8,
            attn_layers=["local", "lsh"],
            axial_pos_embds=False,
            feed_forward_size=INNER,
            hash_seed=1,
            hidden_size=HIDDEN,
            is_decoder=True,
            local_attn_chunk_length=4,
            lsh_attn_chunk_length=4,
            num_buckets=4,
            max_position_embeddings=POSITIONS,
            num_attention_heads=HEADS,
            use_cache=False,
        ),
        even_text,
    ),
    Family(
        "perceiver",
        "transformers",
        "latents",
        hugging_face(
            "PerceiverForMaskedLM",
            "PerceiverConfig",
            vocab_size=VOCABULARY,
            num_latents=8,
            d_latents=HIDDEN,
            d_model=32,
            num_self_attends_per_block=2,
            max_position_embeddings=11,
            qk_channels=HIDDEN,
            v_channels=HIDDEN,
        ),
        tokens,
    ),
)
_BOTHS = (
    both("m2m-100", "M2M100", **BOTH, max_position_embeddings=POSITIONS),
    both(
        "pegasus-x",
        "PegasusX",
        **BOTH,
        max_position_embeddings=POSITIONS,
        block_size=4,
        num_global_tokens=4,
    ),
    Family(
        "prophetnet",
        "transformers",
        "encoder and decoder",
        hugging_face(
            "ProphetNetForConditionalGeneration",
            "ProphetNetConfig",
            **WORDS,
            hidden_size=HIDDEN,
            encoder_ffn_dim=INNER,
            decoder_ffn_dim=INNER,
            num_encoder_layers=LAYERS,
            num_decoder_layers=LAYERS,
            num_encoder_attention_heads=HEADS,
            num_decoder_attention_heads=HEADS,
            ngram=2,
            max_position_embeddings=POSITIONS,
            decoder_start_token_id=1,
            use_cache=False,
        ),
        unpadded_pairs,
    ),
    Family(
        "led",
        "transformers",
        "encoder and decoder",
        hugging_face(
            "LEDForConditionalGeneration",
            "LEDConfig",
            **BOTH,
            attention_window=4,
            max_encoder_position_embeddings=POSITIONS,
            max_decoder_position_embeddings=POSITIONS,
        ),
        pairs,
    ),
    both(
        "longt5",
        "LongT5",
        **T5,
        local_radius=3,
        global_block_size=4,
        encoder_attention_type="transient-global",
    ),
    both(
        "switch-transformers",
        "SwitchTransformers",
        **T5,
        num_experts=4,
        expert_capacity=64,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    ),
    both(
        "bigbird-pegasus",
        "BigBirdPegasus",
        **BOTH,
        max_position_embeddings=POSITIONS,
        attention_type="block_sparse",
        block_size=2,
        num_random_blocks=1,
    ),
)
FAMILIES = (*_DECODERS, *_STATES, *_ENCODERS, *_BOTHS)
