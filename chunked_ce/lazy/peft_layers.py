"""What PEFT's layers have that the classes before them use: to a type checker their base, otherwise none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

__all__ = ["AdapterLayer", "LoraLayer", "TrainableTokensLayer"]

if TYPE_CHECKING:

    class AdapterLayer(nn.Module):
        """``BaseTunerLayer``."""

        active_adapters: list[str]
        disable_adapters: bool
        merged: bool

        def forward(self, *args: Any, **kwargs: Any) -> Any: ...

    class LoraLayer(AdapterLayer):
        """LoRA's ``Linear``."""

        lora_A: dict[str, Any]
        lora_B: dict[str, Any]
        lora_dropout: dict[str, nn.Module]
        lora_magnitude_vector: dict[str, Any]
        lora_variant: dict[str, Any]
        scaling: dict[str, float]

        def _cast_input_dtype(self, x: Tensor, dtype: Any) -> Tensor: ...

        def get_delta_weight(self, adapter: str) -> Tensor: ...

    class TrainableTokensLayer(AdapterLayer):
        """``TrainableTokensLayer``."""

        def forward_adapters(self, x: Any, active_adapters: list[str], *args: Any, **kwargs: Any) -> Any: ...

        def _check_overlapping_tokens(self, adapters: list[str]) -> None: ...

        def get_merged_weights(self, active_adapters: list[str]) -> Tensor: ...

else:
    AdapterLayer = LoraLayer = TrainableTokensLayer = object
