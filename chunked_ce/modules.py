"""The functions as ``nn.Module``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, cast

from torch import Tensor, nn
from typing_extensions import TypeVar, Unpack, overload

from chunked_ce.arguments import check_flag
from chunked_ce.checks import check_class_weight, check_keywords, check_options, check_vocab
from chunked_ce.engine.loss_stats import LossStats
from chunked_ce.functional.target_losses import linear_cross_entropy
from chunked_ce.keywords import LossModuleKeywords, PerToken, PerTokenNumbers, Reduction
from chunked_ce.options import ChunkOptions
from chunked_ce.parallel.vocab import VocabShard
from chunked_ce.torch_options import TorchOptions, chunk_options

__all__ = ["LinearCrossEntropyLoss"]

_OfTensor = TypeVar("_OfTensor", default=Tensor)  # what a call returns for a tensor
_OfDepths = TypeVar("_OfDepths", default=Tensor)  # and for a list of depths


class LinearCrossEntropyLoss(nn.Module, Generic[_OfTensor, _OfDepths]):
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

    @overload
    def __init__(
        self: LinearCrossEntropyLoss[Tensor, Tensor],
        *,
        reduction: Literal["mean", "sum"] = "mean",
        return_stats: Literal[False] = False,
        **keywords: Unpack[LossModuleKeywords],
    ) -> None: ...

    @overload
    def __init__(
        self: LinearCrossEntropyLoss[tuple[Tensor, LossStats], tuple[Tensor, LossStats]],
        *,
        reduction: Literal["mean", "sum"] = "mean",
        return_stats: Literal[True],
        **keywords: Unpack[LossModuleKeywords],
    ) -> None: ...

    @overload
    def __init__(
        self: LinearCrossEntropyLoss[Tensor, list[Tensor]],
        *,
        reduction: Literal["none"],
        return_stats: Literal[False] = False,
        **keywords: Unpack[LossModuleKeywords],
    ) -> None: ...

    @overload
    def __init__(
        self: LinearCrossEntropyLoss[tuple[Tensor, LossStats], tuple[list[Tensor], LossStats]],
        *,
        reduction: Literal["none"],
        return_stats: Literal[True],
        **keywords: Unpack[LossModuleKeywords],
    ) -> None: ...

    def __init__(
        self,
        *,
        weight: Tensor | None = None,
        reduction: Reduction = "mean",
        ignore_index: int | None = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        vocab: VocabShard | None = None,
        options: ChunkOptions | TorchOptions | None = None,
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
        options = chunk_options(options)
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
        token_weight: PerTokenNumbers | None = None,  # as target
        num_tokens: float | Tensor | None = None,
        temperature: PerTokenNumbers | None = None,  # as target; None: the number given when the module was made
        linear_adapter: tuple[PerToken, Tensor] | None = None,  # (..., r) and (V, r)
    ) -> _OfTensor | _OfDepths:
        loss: Any = linear_cross_entropy(
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
        return cast("_OfTensor | _OfDepths", loss)

    if TYPE_CHECKING:  # that of `nn.Module` returns Any

        @overload
        def __call__(
            self,
            input: Tensor,
            linear_weight: Tensor,
            target: Tensor,
            linear_bias: Tensor | None = None,
            token_weight: Tensor | None = None,
            num_tokens: float | Tensor | None = None,
            temperature: Tensor | None = None,
            linear_adapter: tuple[Tensor, Tensor] | None = None,
        ) -> _OfTensor: ...

        @overload
        def __call__(
            self,
            input: Sequence[Tensor],
            linear_weight: Tensor,
            target: Sequence[Tensor],
            linear_bias: Tensor | None = None,
            token_weight: Sequence[Tensor | float] | None = None,
            num_tokens: float | Tensor | None = None,
            temperature: Sequence[Tensor | float] | None = None,
            linear_adapter: tuple[Sequence[Tensor], Tensor] | None = None,
        ) -> _OfDepths: ...

        def __call__(self, *args: Any, **keywords: Any) -> Any: ...

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in (self._maths | self._rest).items())
