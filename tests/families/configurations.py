"""Tiny configurations of any model of Transformers, made from the names of their fields."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedConfig

from tests.families.exceptions import CONFIGURATIONS

VOCAB, WIDTH, HEADS = 1021, 32, 4  # no other size is a multiple of the prime number

# The first pattern that matches the whole name of a field says its value, which is never above the usual one; None
# leaves the field as it is.
INTEGERS = {
    "num_kv_shared_layers|num_hash_layers|first_k_dense_replace|num_dense_layers|num_nextn_predict_layers": 0,
    "(type|modality|token_type|segment|language).*vocab.*": None,
    ".*hash_byte_group_vocab": 64,
    "mamba_d_head": 2 * WIDTH // HEADS,
    "(mamba_)?chunk_size|max_2d_position_embeddings|conv_dim": 16,
    "state_size|mamba_d_state|.*_state_dim|ssm_state_size": 4,
    "head_dim|d_kv|.*_head_dim|d_head|dim_head|attention_head_size|rotary_dim|kv_channels": WIDTH // HEADS,
    ".*_rank|rank": 8,
    ".*bottleneck.*size": WIDTH,
    "n_inner|d_inner|.*d_ff|dff|dim_ff|ffn_dim|.*_inter_size": 2 * WIDTH,
    ".*(intermediate|ffn|feed_?forward|mlp).*(size|dim)": 2 * WIDTH,
    "(.*_)?(num_key_value_heads|num_kv_heads|n_kv_heads|kv_n_heads)": 2,
    ".*heads?|num_head": HEADS,
    ".*(layers?|depth|num_blocks)": 2,
    "(.*_)?(local_|routed_)?experts|moe_num_experts|num_experts_.*": 4,
    "num_experts_per_tok|moe_k|.*top_?k|.*experts_per_tok.*": 2,
    "(num|topk)_(expert_)?group|n_groups?|topk_group": 1,
    ".*hidden_size_(global|per_layer_input)": WIDTH,
    ".*(hidden|embed|model|proj|output|feature).*(size|dim|dimension)": WIDTH,
    "d_model|dim|width|n_embd|emb_dim|.*_dim|.*_hidden_size.*|codevector_dim": WIDTH,
    ".*max.*position.*|n_positions|max_seq_len|n_ctx|seq_length|max_(source|target)_positions|context_length": 128,
    "num_filters": 2,
    ".*(image|img)_size|resolution": 16,
    ".*patch_size": 4,
    ".*(channels|filters)": WIDTH,
}
VOCABULARIES = "(src_|tgt_|text_|decoder_|encoder_|mel_)?vocab_size(_per_layer_input)?|n_vocab|num_embeddings"
UNSET = {"head_dim": WIDTH // HEADS, "num_key_value_heads": HEADS, "vocab_size": VOCAB}


def small(cls: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """A configuration of this class with few and narrow layers."""
    given = CONFIGURATIONS.get(cls.__name__, {}) | changes
    try:
        start = vars(cls())
    except Exception:  # there is no configuration without arguments
        start = vars(cls(**given))
    values = dict(given)
    if "kv_lora_rank" in start:  # latent attention has no groups of heads
        values.setdefault("num_key_value_heads", HEADS)
    for name in cls.__dataclass_fields__.keys() - values.keys():
        value = start.get(name)
        if isinstance(value, PreTrainedConfig):
            values[name] = small(type(value))
        elif (found := smaller(name, value)) != value:
            values[name] = found
    config = cls(**values)
    if "mrope_section" in getattr(cls, "ignore_keys_at_rope_validation", ()) and "rope_parameters" not in given:
        set_sections(config)
    return config


def smaller(name: str, value: Any) -> Any:
    if re.fullmatch(".*(drop|mask_time_prob|mask_feature_prob|jitter|noise).*", name) and isinstance(value, float):
        return 0.0
    if name == "use_cache":
        return False
    if value is None and name in UNSET:
        return UNSET[name]
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if re.fullmatch(".*(token|bos|eos|pad|sep|cls|start|end|patch)_?(id|index|idx)", name):
        return token_id(name, value)
    if re.fullmatch(VOCABULARIES, name):
        return VOCAB
    for pattern, number in INTEGERS.items():
        if re.fullmatch(pattern, name):
            return value if number is None else min(value, number)
    return value


def set_sections(config: PreTrainedConfig) -> None:
    """Divide the rotated entries of a head among time, height and width."""
    rope = dict(config.rope_parameters or {})
    width = getattr(config, "head_dim", None) or WIDTH // HEADS
    half = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
    config.rope_parameters = rope | {"mrope_section": [half - 2 * (half // 4), half // 4, half // 4]}


def token_id(name: str, value: int) -> int:
    """The usual id, or one for it among the last words of a small vocabulary."""
    special = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1}
    for start, number in special.items():
        if re.fullmatch(f"{start}_(token_)?(id|index|idx)", name):
            return number
    return value if value < VOCAB // 2 else VOCAB - 1 - value % 200
