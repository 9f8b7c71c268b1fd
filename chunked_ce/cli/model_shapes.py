"""Shapes of well-known models, by their public configurations, and of any model by its ``config.json``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

__all__ = ["MODELS", "LatentAttention", "ModelShape", "read_config"]


class LatentAttention(NamedTuple):
    """The widths of attention with low-rank queries, keys and values (DeepSeek-V2, arXiv 2405.04434)."""

    query_rank: int
    value_rank: int
    plain: int  # of a head's query and key, without positions
    rotary: int  # and with
    value: int


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """A decoder: what its memory follows from. Without ``layers`` it is a head alone.

    >>> f"{MODELS['llama-3-8b'].parameters:,}"
    '8,030,261,248'
    """

    name: str
    source: str  # where the sizes come from
    hidden: int
    vocab: int
    layers: int = 0
    intermediate: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    tied: bool = False  # whether the head is the embedding
    gated: bool = True  # an MLP of three matrices, not two
    biases: bool = False  # of all linear layers and norms
    qkv_bias: bool = False
    qk_norm: bool = False
    norms: int = 2  # per layer, besides those of queries and keys
    positions: int = 0  # learned ones
    experts: int = 0
    active_experts: int = 0  # per token
    expert_intermediate: int = 0
    shared_intermediate: int = 0  # of the experts that every token passes
    dense_layers: int = 0  # of a mixture of experts: those that have an MLP instead
    latent: LatentAttention | None = None

    @property
    def head_parameters(self) -> int:
        """V * D."""
        return self.vocab * self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Those of tokens and positions: 0 for a head alone."""
        return (self.head_parameters + self.positions * self.hidden) if self.layers else 0

    @property
    def attention_parameters(self) -> int:
        """Of one layer."""
        d, heads = self.hidden, self.heads
        if self.latent:
            rank_q, rank_v, plain, rotary, value = self.latent
            query = rank_q * (d + 1 + heads * (plain + rotary)) if rank_q else d * heads * (plain + rotary)
            return query + d * (rank_v + rotary) + rank_v * (1 + heads * (plain + value)) + heads * value * d
        width, shared = heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        products = d * (2 * width + shared)
        return (
            products
            + (self.qkv_bias or self.biases) * (width + shared)
            + self.biases * d
            + self.qk_norm * 2 * self.head_dim
        )

    @property
    def mlp_parameters(self) -> int:
        """Of one layer that is no mixture of experts."""
        return (3 if self.gated else 2) * self.hidden * self.intermediate + self.biases * (
            self.intermediate + self.hidden
        )

    @property
    def experts_parameters(self) -> int:
        """Of one layer with a mixture of experts, router included."""
        matrices = 3 * self.hidden * (self.experts * self.expert_intermediate + self.shared_intermediate)
        return matrices + self.hidden * self.experts

    @property
    def layers_parameters(self) -> int:
        """Of all layers and the last norm."""
        mixtures = self.layers - self.dense_layers if self.experts else 0
        mlps = (self.layers - mixtures) * self.mlp_parameters + mixtures * self.experts_parameters
        norms = (self.norms * self.layers + 1) * self.hidden * (1 + self.biases) if self.layers else 0
        return self.layers * self.attention_parameters + mlps + norms

    @property
    def parameters(self) -> int:
        """All of them; a head that is tied to the embedding counts once."""
        own_head = 0 if self.tied and self.layers else self.head_parameters
        return self.layers_parameters + self.embedding_parameters + own_head


def _model(repository: str, shape: tuple[int, ...], **more: object) -> ModelShape:
    """``shape``: layers, hidden, intermediate, heads, kv_heads, head_dim, vocab."""
    names = ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab")
    source = f"https://huggingface.co/{repository}/blob/main/config.json"
    values: dict[str, object] = dict(zip(names, shape, strict=True)) | more
    return ModelShape(repository, source, **values)  # type: ignore[arg-type]


_QWEN25 = {"qkv_bias": True}
_QWEN3 = {"qk_norm": True}
_GEMMA2 = {"tied": True, "norms": 4}
_GEMMA3 = {"tied": True, "norms": 4, "qk_norm": True}

MODELS = {
    "gpt2": _model(
        "openai-community/gpt2",
        (12, 768, 3072, 12, 12, 64, 50257),
        tied=True,
        gated=False,
        biases=True,
        positions=1024,
    ),
    "gemma-2-2b": _model("google/gemma-2-2b", (26, 2304, 9216, 8, 4, 256, 256000), **_GEMMA2),
    "gemma-2-9b": _model("google/gemma-2-9b", (42, 3584, 14336, 16, 8, 256, 256000), **_GEMMA2),
    "gemma-2-27b": _model("google/gemma-2-27b", (46, 4608, 36864, 32, 16, 128, 256000), **_GEMMA2),
    "gemma-3-1b": _model("google/gemma-3-1b-pt", (26, 1152, 6912, 4, 1, 256, 262144), **_GEMMA3),
    "gemma-3-4b": _model("google/gemma-3-4b-pt", (34, 2560, 10240, 8, 4, 256, 262208), **_GEMMA3),
    "gemma-3-12b": _model("google/gemma-3-12b-pt", (48, 3840, 15360, 16, 8, 256, 262208), **_GEMMA3),
    "gemma-3-27b": _model("google/gemma-3-27b-pt", (62, 5376, 21504, 32, 16, 128, 262208), **_GEMMA3),
    "llama-2-7b": _model("meta-llama/Llama-2-7b-hf", (32, 4096, 11008, 32, 32, 128, 32000)),
    "llama-3-8b": _model("meta-llama/Meta-Llama-3-8B", (32, 4096, 14336, 32, 8, 128, 128256)),
    "llama-3-70b": _model("meta-llama/Meta-Llama-3-70B", (80, 8192, 28672, 64, 8, 128, 128256)),
    "llama-3.1-405b": _model("meta-llama/Llama-3.1-405B", (126, 16384, 53248, 128, 8, 128, 128256)),
    "llama-3.2-1b": _model("meta-llama/Llama-3.2-1B", (16, 2048, 8192, 32, 8, 64, 128256), tied=True),
    "llama-3.2-3b": _model("meta-llama/Llama-3.2-3B", (28, 3072, 8192, 24, 8, 128, 128256), tied=True),
    "qwen-2.5-0.5b": _model("Qwen/Qwen2.5-0.5B", (24, 896, 4864, 14, 2, 64, 151936), tied=True, **_QWEN25),
    "qwen-2.5-1.5b": _model("Qwen/Qwen2.5-1.5B", (28, 1536, 8960, 12, 2, 128, 151936), tied=True, **_QWEN25),
    "qwen-2.5-3b": _model("Qwen/Qwen2.5-3B", (36, 2048, 11008, 16, 2, 128, 151936), tied=True, **_QWEN25),
    "qwen-2.5-7b": _model("Qwen/Qwen2.5-7B", (28, 3584, 18944, 28, 4, 128, 152064), **_QWEN25),
    "qwen-2.5-14b": _model("Qwen/Qwen2.5-14B", (48, 5120, 13824, 40, 8, 128, 152064), **_QWEN25),
    "qwen-2.5-32b": _model("Qwen/Qwen2.5-32B", (64, 5120, 27648, 40, 8, 128, 152064), **_QWEN25),
    "qwen-2.5-72b": _model("Qwen/Qwen2.5-72B", (80, 8192, 29568, 64, 8, 128, 152064), **_QWEN25),
    "qwen-3-0.6b": _model("Qwen/Qwen3-0.6B", (28, 1024, 3072, 16, 8, 128, 151936), tied=True, **_QWEN3),
    "qwen-3-1.7b": _model("Qwen/Qwen3-1.7B", (28, 2048, 6144, 16, 8, 128, 151936), tied=True, **_QWEN3),
    "qwen-3-4b": _model("Qwen/Qwen3-4B", (36, 2560, 9728, 32, 8, 128, 151936), tied=True, **_QWEN3),
    "qwen-3-8b": _model("Qwen/Qwen3-8B", (36, 4096, 12288, 32, 8, 128, 151936), **_QWEN3),
    "qwen-3-14b": _model("Qwen/Qwen3-14B", (40, 5120, 17408, 40, 8, 128, 151936), **_QWEN3),
    "qwen-3-32b": _model("Qwen/Qwen3-32B", (64, 5120, 25600, 64, 8, 128, 151936), **_QWEN3),
    "qwen-3-30b-a3b": _model(
        "Qwen/Qwen3-30B-A3B",
        (48, 2048, 6144, 32, 4, 128, 151936),
        experts=128,
        active_experts=8,
        expert_intermediate=768,
        **_QWEN3,
    ),
    "mistral-7b": _model("mistralai/Mistral-7B-v0.3", (32, 4096, 14336, 32, 8, 128, 32768)),
    "mistral-nemo-12b": _model("mistralai/Mistral-Nemo-Base-2407", (40, 5120, 14336, 32, 8, 128, 131072)),
    "mixtral-8x7b": _model(
        "mistralai/Mixtral-8x7B-v0.1",
        (32, 4096, 14336, 32, 8, 128, 32000),
        experts=8,
        active_experts=2,
        expert_intermediate=14336,
    ),
    "phi-3-mini": _model("microsoft/Phi-3-mini-4k-instruct", (32, 3072, 8192, 32, 32, 96, 32064)),
    "phi-4": _model("microsoft/phi-4", (40, 5120, 17920, 40, 10, 128, 100352)),
    "deepseek-v3": _model(
        "deepseek-ai/DeepSeek-V3",
        (61, 7168, 18432, 128, 128, 192, 129280),
        experts=256,
        active_experts=8,
        expert_intermediate=2048,
        shared_intermediate=2048,
        dense_layers=3,
        latent=LatentAttention(1536, 512, 128, 64, 128),
    ),
}

_SIZES = {  # by field: the names in a configuration
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "vocab": ("vocab_size", "n_vocab"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "kv_heads": ("num_key_value_heads", "n_kv_heads", "multi_query_group_num"),
    "head_dim": ("head_dim", "kv_channels"),
    "intermediate": ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "active_experts": ("num_experts_per_tok", "moe_topk"),
    "expert_intermediate": ("moe_intermediate_size",),
    "shared_intermediate": ("shared_expert_intermediate_size",),
    "dense_layers": ("first_k_dense_replace",),
}
_NEEDED = ("hidden", "vocab")
# By `model_type`: what a configuration file leaves out, because it is the same for all models of the type.
_TIED = (
    "gpt2",
    "gpt_neo",
    "gpt_bigcode",
    "falcon",
    "mpt",
    "starcoder2",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "opt",
    "bloom",
    "cohere",
    "cohere2",
    "smollm3",
)
_PLAIN_MLP = (
    *("gpt2", "gpt_neo", "gpt_neox", "gptj", "gpt_bigcode", "codegen", "opt", "phi", "bloom", "starcoder2"),
    *("falcon", "mpt", "persimmon", "nemotron", "apertus"),
)
_NO_BIASES = ("falcon", "gptj", "codegen", "mpt", "nemotron", "apertus")
# Layers without attention, by the names that configurations of hybrid models give them, or by fields of their own.
_NO_ATTENTION = ("mamba", "mamba2", "linear_attention", "conv", "recurrent", "rwkv", "moe", "mlp")
_HYBRID_FIELDS = ("attn_layer_period", "hybrid_override_pattern", "lru_width", "mamba_d_state", "ssm_cfg")
_QKV_BIAS = ("qwen2", "qwen2_moe", "qwen2_vl_text", "qwen2_5_vl_text")
_QK_NORM = ("qwen3", "qwen3_moe", "gemma3", "gemma3_text", "olmo2")
_FOUR_NORMS = ("gemma2", "gemma3", "gemma3_text", "glm4")


def read_config(path: Path) -> ModelShape:
    """The model that a Transformers ``config.json`` describes, in ``text_config`` if there is one.

    Raises ``ValueError`` naming what is missing. Without a number of layers, or with layers that have no attention, it
    is a head alone.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--config must be a readable JSON file: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"--config must hold a JSON object, {path} holds a {type(config).__name__}")
    inner = config.get("text_config")
    config |= inner if isinstance(inner, dict) else {}
    found: dict[str, int] = {}
    for field, names in _SIZES.items():
        value = next((config[name] for name in names if config.get(name) is not None), None)
        if field not in _NEEDED and (value is None or (value == 0 and "experts" in field)):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < (field != "dense_layers"):
            raise ValueError(f"--config must give one of {', '.join(names)} as an integer >= 1, {path} gives {value!r}")
        found[field] = value
    return _completed(str(path), found, config)


def _completed(path: str, found: dict[str, int], config: Mapping[str, object]) -> ModelShape:
    kind = str(config.get("model_type", ""))
    if not found.get("layers") or not found.get("heads") or _is_hybrid(config):
        return ModelShape(path, path, found["hidden"], found["vocab"])
    sizes = {"intermediate": 4 * found["hidden"], "kv_heads": found["heads"], "head_dim": 0} | found
    if kind == "falcon" and config.get("multi_query") and not config.get("new_decoder_architecture"):
        sizes["kv_heads"] = 1
    sizes["head_dim"] = sizes["head_dim"] or found["hidden"] // found["heads"]
    if "experts" in found:
        sizes = {"active_experts": 1, "expert_intermediate": sizes["intermediate"]} | sizes
        shared = config.get("n_shared_experts")
        if isinstance(shared, int):
            sizes.setdefault("shared_intermediate", shared * sizes["expert_intermediate"])
    plain = kind in _PLAIN_MLP
    learned = config.get("n_positions") if kind == "gpt2" else None
    return ModelShape(
        path,
        path,
        **sizes,
        tied=bool(config.get("tie_word_embeddings", kind in _TIED)),
        gated=not plain,
        biases=plain and kind not in _NO_BIASES,
        qkv_bias=bool(config.get("attention_bias")) or kind in _QKV_BIAS,
        qk_norm=kind in _QK_NORM,
        norms=4 if kind in _FOUR_NORMS else 2,
        positions=learned if isinstance(learned, int) else 0,
        latent=_latent(config),
    )


def _is_hybrid(config: Mapping[str, object]) -> bool:
    """Whether some layers have no attention: how many parameters and activations they have is not known here."""
    kinds = config.get("layer_types") or config.get("layers_block_type")
    named = isinstance(kinds, list) and any(kind in _NO_ATTENTION for kind in kinds)
    return named or any(config.get(name) for name in _HYBRID_FIELDS)


def _latent(config: Mapping[str, object]) -> LatentAttention | None:
    names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    if not config.get("kv_lora_rank"):
        return None
    sizes = [config.get(name) or 0 for name in names]
    return LatentAttention(*(size if isinstance(size, int) else 0 for size in sizes))
