"""The model that ``--model`` or ``--config`` names: its head is what losses depend on."""

from __future__ import annotations

import argparse

from chunked_ce.cli.model_shapes import MODELS, ModelShape, read_config

__all__ = ["head_of"]


def head_of(arguments: argparse.Namespace) -> ModelShape | None:
    """The model that ``--model`` or ``--config`` names, None without either; ``ValueError`` with both."""
    if arguments.model and arguments.config:
        raise ValueError("--model and --config both give a model: use one of them")
    if arguments.model:
        return MODELS[arguments.model]
    return read_config(arguments.config) if arguments.config else None
