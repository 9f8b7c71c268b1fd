"""Transformers' `Trainer` saves on one rank, and a model with a sharded head can only be gathered by all of them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from chunked_ce.sharded.gathering import gathered
from chunked_ce.sharded.optimizers import sharded_states
from chunked_ce.sharded.rows import shardings_of

__all__ = ["follow_trainer"]

_FOLLOWED = "_gathers_sharded_heads"


def follow_trainer() -> None:
    """Let `Trainer`, once it is imported, gather a sharded head on all ranks before it saves."""
    trainer = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if trainer is None or _FOLLOWED in vars(trainer):
        return
    trainer.save_model = _gathering(trainer.save_model, lambda _: None)
    trainer._save_checkpoint = _gathering(
        trainer._save_checkpoint, lambda self: None if self.args.save_only_model else self.optimizer
    )
    setattr(trainer, _FOLLOWED, True)


def _gathering(save: Callable[..., Any], optimizer_of: Callable[[Any], Any]) -> Callable[..., Any]:
    @functools.wraps(save)
    def gather_and_save(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Engines save on all ranks.
        has_engine = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if has_engine or not any(map(shardings_of, self.model.modules())):
            return save(self, *args, **kwargs)
        with gathered(self.model, sharded_states(optimizer_of(self)), keep=self.args.should_save):
            return save(self, *args, **kwargs)

    return gather_and_save
