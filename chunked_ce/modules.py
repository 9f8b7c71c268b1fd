"""The functions as ``nn.Module``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from chunked_ce.arguments import check_flag
from chunked_ce.checks import check_class_weight, check_keywords, check_options, check_vocab
from chunked_ce.functional import LossStats, PerToken, linear_cross_entropy
from chunked_ce.options import ChunkOptions
from chunked_ce.parallel.vocab import VocabShard

__all__ = ["LinearCrossEntropyLoss"]


class LinearCrossEntropyLoss(nn.Module):
    """`chunked_ce.linear_cross_entropy` as a module: options are given when it is made, tensors at each call.

    Takes every keyword of the function but the tensors ``linear_bias``, ``linear_adapter``, ``token_weight`` and
    ``num_tokens``, and temperatures of tokens, which belong to a call. ``weight``, the class weights (V,), is a buffer
    that moves with the module.

    >>> import torch
    >>> loss = LinearCrossEntropyLoss(label_smoothing=0.1)
    >>> loss(torch.zeros(2, 4), torch.zeros(8, 4), torch.tensor([1, 2]))
    tensor(2.0794)
    """

    weight: Tensor | None

    def __init__(
        self,
        *,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int | None = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        vocab: VocabShard | None = None,
        options: ChunkOptions | None = None,
        return_stats: bool = False,
    ) -> None:
        super().__init__()
        self._maths: dict[str, Any] = {
            "reduction": reduction,
            "ignore_index": -100 if ignore_index is None else ignore_index,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "softcap": softcap,
            "logit_scale": logit_scale,
            "temperature": temperature,
        }
        check_keywords(**self._maths)
        check_options(options, reduction)
        check_vocab(vocab)
        check_flag("return_stats", return_stats)
        check_class_weight(weight)
        self._rest: dict[str, Any] = {"vocab": vocab, "options": options, "return_stats": return_stats}
        self.register_buffer("weight", weight, persistent=False)

    def forward(
        self,
        input: PerToken,  # (..., D)
        linear_weight: Tensor,  # (V, D)
        target: PerToken,  # (...)
        linear_bias: Tensor | None = None,  # (V,)
        token_weight: PerToken | None = None,  # as target
        num_tokens: float | Tensor | None = None,
        temperature: PerToken | None = None,  # as target; None: the number given when the module was made
        linear_adapter: tuple[PerToken, Tensor] | None = None,  # (..., r) and (V, r)
    ) -> Tensor | list[Tensor] | tuple[Tensor | list[Tensor], LossStats]:
        return linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=self.weight,
            token_weight=token_weight,
            num_tokens=num_tokens,
            linear_adapter=linear_adapter,
            **(self._maths if temperature is None else self._maths | {"temperature": temperature}),
            **self._rest,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in (self._maths | self._rest).items())
