"""PEFT's layers around an `LMHead`: what keeps its logits lazy, and a warning where nothing does."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from chunked_ce.lazy.classes import TokenAdapter, joined, without
from chunked_ce.lazy.head import LazyHead
from chunked_ce.lazy.logits import LazyLogits
from chunked_ce.lazy.peft_layers import AdapterLayer
from chunked_ce.sharded.low_rank import LowRankHead, formed
from chunked_ce.tracing import not_compiled

__all__ = ["follow_adapter", "unfollow_adapter"]


class OtherAdapter(AdapterLayer):
    """Goes before PEFT's other layers around an `LMHead`; some multiply by its weight themselves."""

    base_layer: LazyHead

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        calls = _training_calls(self.base_layer)
        if self.merged or self.disable_adapters:
            found = super().forward(*args, **kwargs)
        else:
            found = formed(self.base_layer, super().forward, *args, **kwargs)
        if not isinstance(found, LazyLogits):
            _warn_without_call(self, calls)
        return found


@not_compiled
def _training_calls(head: LazyHead) -> int:
    return head.record.activity(training=True).calls


@not_compiled
def _warn_without_call(adapter: OtherAdapter, calls: int) -> None:
    head = adapter.base_layer
    if head.training and _training_calls(head) == calls:
        name = next(one.__module__ for one in type(adapter).__mro__ if one.__module__.startswith("peft."))
        head.record.tell(
            "adapter",
            f"LMHead has no effect here: {name} multiplies by the weight of the head itself, which forms the logits. "
            "Adapt the head by LoRA, or leave it out of target_modules",
        )


def follow_adapter(module: nn.Module, head: LazyHead) -> None:
    """Let ``module`` call its head if it is PEFT's layer of trainable tokens or LoRA, so that the logits stay lazy."""
    if "peft" not in sys.modules or isinstance(module, (TokenAdapter, LowRankHead, OtherAdapter)):
        return
    from peft.tuners.lora.layer import Linear as Lora
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(module, TrainableTokensLayer):
        module.__class__ = joined(TokenAdapter, type(module))
    elif isinstance(module, Lora) and head.layout is None:
        module.__class__ = joined(LowRankHead, type(module))
    elif isinstance(module, BaseTunerLayer):
        module.__class__ = joined(OtherAdapter, type(module))


def unfollow_adapter(module: nn.Module) -> None:
    """Undo `follow_adapter`."""
    for front in (TokenAdapter, LowRankHead, OtherAdapter):
        module.__class__ = without(type(module), front, nn.Module)
