"""Options that the configurations of many families share: small sizes, in each library's words."""

from __future__ import annotations

from zoo_inputs import IMAGE, POSITIONS
from zoo_layers import CLASSES, HEADS, HIDDEN, VOCABULARY

__all__ = ["BOTH", "DECODER", "ENCODER", "EXPERTS", "GPT", "GROUPED", "INNER", "LAYERS", "PATCHES"]
__all__ += ["PICTURE", "SPECIAL", "STACK", "T5", "WORDS"]

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
PICTURE = {"image_size": IMAGE, "num_labels": CLASSES}
PICTURE |= {"problem_type": "single_label_classification"}
PATCHES = {**STACK, "image_size": IMAGE, "patch_size": 8}
