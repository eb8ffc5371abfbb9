"""Families of encoders of text, and of encoders with decoders."""

from __future__ import annotations

from functools import partial
from typing import Any

from family_makers import Family, hugging_face
from family_options import BOTH, ENCODER, INNER, LAYERS, T5, WORDS
from zoo_inputs import POSITIONS, Inputs, pairs, tokens
from zoo_layers import HEADS, HIDDEN, VOCABULARY

__all__ = ["FAMILIES"]

unpadded = partial(tokens, False)
long_text = partial(tokens, True, 16)
even_text = partial(tokens, False, 16)


def long_pairs() -> Inputs:
    """Return source and target, the source long enough for attention that is sparse."""
    return {**long_text(), "labels": pairs()["labels"]}


def unpadded_pairs() -> Inputs:
    """Return source and target; ProphetNet's masks of padding overflow in float64."""
    return {key: value for key, value in pairs().items() if key != "attention_mask"}


def encoder(name: str, prefix: str, **options: Any) -> Family:
    """Return the family of {prefix}ForMaskedLM with {prefix}Config."""
    make = hugging_face(f"{prefix}ForMaskedLM", f"{prefix}Config", **{**ENCODER, **options})
    return Family(name, "transformers", "encoder", make, tokens)


def both(name: str, prefix: str, **options: Any) -> Family:
    """Return the family of {prefix}ForConditionalGeneration with {prefix}Config."""
    make = hugging_face(f"{prefix}ForConditionalGeneration", f"{prefix}Config", **options)
    return Family(name, "transformers", "encoder and decoder", make, pairs)


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
    Family(
        "nystromformer",
        "transformers",
        "landmark attention",
        hugging_face(
            "NystromformerForMaskedLM",
            "NystromformerConfig",
            **ENCODER,
            segment_means_seq_len=16,
            num_landmarks=16,
            conv_kernel_size=5,
        ),
        long_text,
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
        router_jitter_noise=0.0,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    ),
    Family(
        "bigbird-pegasus",
        "transformers",
        "encoder and decoder",
        hugging_face(
            "BigBirdPegasusForConditionalGeneration",
            "BigBirdPegasusConfig",
            **BOTH,
            max_position_embeddings=POSITIONS,
            attention_type="block_sparse",
            block_size=2,
            num_random_blocks=1,
        ),
        long_pairs,
    ),
)
FAMILIES = (*_ENCODERS, *_BOTHS)
