"""Well-known heads, by their public configurations, and the head of a Transformers ``config.json``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

__all__ = ["HEADS", "KnownHead", "head_of"]


class KnownHead(NamedTuple):
    """An output projection."""

    hidden: int  # D
    vocab: int  # V
    source: str  # where the sizes come from


def _on_the_hub(hidden: int, vocab: int, repository: str) -> KnownHead:
    return KnownHead(hidden, vocab, f"https://huggingface.co/{repository}/blob/main/config.json")


HEADS = {
    "gpt2": _on_the_hub(768, 50257, "openai-community/gpt2"),
    "gemma-2-2b": _on_the_hub(2304, 256000, "google/gemma-2-2b"),
    "gemma-2-9b": _on_the_hub(3584, 256000, "google/gemma-2-9b"),
    "gemma-3-4b": _on_the_hub(2560, 262208, "google/gemma-3-4b-pt"),
    "llama-2-7b": _on_the_hub(4096, 32000, "meta-llama/Llama-2-7b-hf"),
    "llama-3-8b": _on_the_hub(4096, 128256, "meta-llama/Meta-Llama-3-8B"),
    "llama-3-70b": _on_the_hub(8192, 128256, "meta-llama/Meta-Llama-3-70B"),
    "llama-3.2-1b": _on_the_hub(2048, 128256, "meta-llama/Llama-3.2-1B"),
    "qwen-2.5-7b": _on_the_hub(3584, 152064, "Qwen/Qwen2.5-7B"),
    "qwen-3-0.6b": _on_the_hub(1024, 151936, "Qwen/Qwen3-0.6B"),
    "qwen-3-8b": _on_the_hub(4096, 151936, "Qwen/Qwen3-8B"),
    "mistral-nemo-12b": _on_the_hub(5120, 131072, "mistralai/Mistral-Nemo-Base-2407"),
    "phi-4": _on_the_hub(5120, 100352, "microsoft/phi-4"),
    "deepseek-v3": _on_the_hub(7168, 129280, "deepseek-ai/DeepSeek-V3"),
}

_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
_VOCAB = ("vocab_size", "n_vocab")


def head_of(arguments: argparse.Namespace) -> KnownHead | None:
    """The head that ``--model`` or ``--config`` names, None without either; ``ValueError`` with both."""
    if arguments.model and arguments.config:
        raise ValueError("--model and --config both give a head: use one of them")
    if arguments.model:
        return HEADS[arguments.model]
    return _head_of_config(arguments.config) if arguments.config else None


def _head_of_config(path: Path) -> KnownHead:
    """The head that a Transformers ``config.json`` describes, in ``text_config`` if there is one.

    Raises ``ValueError`` naming what is missing.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--config must be a readable JSON file: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"--config must hold a JSON object, {path} holds a {type(config).__name__}")
    inner = config.get("text_config")
    config |= inner if isinstance(inner, dict) else {}
    sizes = []
    for names in (_HIDDEN, _VOCAB):
        value = next((config[name] for name in names if name in config), None)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"--config must give one of {', '.join(names)} as an integer >= 1, {path} gives {value!r}")
        sizes.append(value)
    return KnownHead(*sizes, source=str(path))
