"""What lazy logits and sharded heads ask of Transformers' `Trainer`.

It saves on one rank, and a model with a sharded head can only be gathered by all of them. It smooths labels with
several statistics of the logits, each of which would be a pass over the head.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from chunked_ce.lazy.logits import LazyLogits
from chunked_ce.sharded.gathering import gathered
from chunked_ce.sharded.optimizers import sharded_states
from chunked_ce.sharded.rows import shardings_of

__all__ = ["follow_label_smoother", "follow_trainer"]

_FOLLOWED = "_gathers_sharded_heads"
_ONE_PASS = "_smooths_lazy_logits"


def follow_label_smoother() -> None:
    """Let Transformers' `LabelSmoother`, if a model of Transformers may use it, smooth lazy logits in one pass."""
    if "transformers.modeling_utils" not in sys.modules:
        return
    smoother = importlib.import_module("transformers.trainer_pt_utils").LabelSmoother
    if _ONE_PASS not in vars(smoother):
        smoother.__call__ = _in_one_pass(smoother.__call__)
        setattr(smoother, _ONE_PASS, True)


def _in_one_pass(smooth: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(smooth)
    def smooth_in_one_pass(
        self: Any,
        model_output: Any,
        labels: Tensor,  # (..., T) or (..., T, 1)
        shift_labels: bool = False,
        **keywords: Any,  # num_items_in_batch, which not every version has
    ) -> Tensor:
        logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
        if not isinstance(logits, LazyLogits) or keywords.keys() - {"num_items_in_batch"}:
            return smooth(self, model_output, labels, shift_labels, **keywords)
        if shift_labels:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        # As there: what is negative and not ignored is word 0.
        target = labels.clamp(min=0).masked_fill(labels == self.ignore_index, -100).flatten()
        count = keywords.get("num_items_in_batch")
        reduction = "mean" if count is None else "sum"
        loss = F.cross_entropy(logits.flatten(0, -2), target, reduction=reduction, label_smoothing=self.epsilon)
        if count is None:
            return loss
        return loss / (count.to(loss.device) if isinstance(count, Tensor) else count)

    return smooth_in_one_pass


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
