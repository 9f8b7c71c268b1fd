"""Apple's cut-cross-entropy by its own names: `linear_cross_entropy`, `LinearCrossEntropy` and what goes with them.

Signatures and results are those of its repository (github.com/apple/ml-cross-entropy, arXiv:2411.09009); the release
25.1.1 has fewer arguments. docs/other_names.md says what becomes of each of them.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from chunked_ce import functional
from chunked_ce.arguments import FLOATING, INDICES, check_flag, check_tensor, described, integer, is_integer, is_one_of
from chunked_ce.checks import check_keywords
from chunked_ce.keywords import Reduction
from chunked_ce.narrowing import not_none
from chunked_ce.options import ChunkOptions
from chunked_ce.parallel.groups import checked_group
from chunked_ce.parallel.vocab import VocabShard

__all__ = ["LinearCrossEntropy", "LinearCrossEntropyImpl", "VocabParallelOptions", "linear_cross_entropy"]


class LinearCrossEntropyImpl(enum.IntEnum):
    """Names of implementations there. Here all of them are one, exact but for ``CCE`` with its gradient filter."""

    CCE = enum.auto()
    TORCH_COMPILE = enum.auto()
    CCE_KAHAN_FULL_C = enum.auto()
    CCE_KAHAN_FULL_E = enum.auto()
    CCE_EXACT = enum.auto()
    CCE_KAHAN_FULL_C_FULL_E = enum.auto()
    CCE_KAHAN_FULL = enum.auto()


@dataclasses.dataclass
class VocabParallelOptions:
    """This rank's rows [start, stop) of the head, in a group of ranks (None: all) that hold all rows.

    With ``reduce_e_grad`` the gradient of ``e`` is summed over the group, without it is left as this rank's share.
    Unless made by `from_vocab`, it does not know the number of all rows, which costs one small all-reduce per call.
    """

    start: int
    stop: int
    group: dist.ProcessGroup | None = None
    reduce_e_grad: bool = True
    vocab_size: int | None = None
    """The rows on all ranks; None: the largest ``stop`` in the group."""

    @classmethod
    def from_vocab(
        cls, vocab_size: int, group: dist.ProcessGroup | None = None, reduce_e_grad: bool = True
    ) -> VocabParallelOptions:
        """Equal shares, the first ranks of the group with one row more where these do not divide the vocabulary."""
        vocab_size, group = integer("vocab_size", vocab_size), checked_group(group)
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        start, stop = (at * (vocab_size // ranks) + min(at, vocab_size % ranks) for at in (rank, rank + 1))
        return cls(start, stop, group, reduce_e_grad, vocab_size)

    for_vocab = from_vocab  # its name in earlier versions

    def shard(self, device: torch.device) -> VocabShard:
        """The same as a `chunked_ce.VocabShard`, for tensors on ``device``."""
        check_flag("reduce_e_grad", self.reduce_e_grad)
        group, total = checked_group(self.group), self.vocab_size
        if total is None:
            most = torch.tensor(integer("stop", self.stop), device=device)
            dist.all_reduce(most, dist.ReduceOp.MAX, group)
            total = int(most)
        input_grad: Literal["complete", "partial"] = "complete" if self.reduce_e_grad else "partial"
        return VocabShard(group, self.start, self.stop, total, input_grad=input_grad)


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    filter_eps: float | Literal["auto", "high"] | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    impl: str | LinearCrossEntropyImpl = LinearCrossEntropyImpl.CCE,
    vocab_parallel_options: VocabParallelOptions | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The cross-entropy of the logits ``e @ c.T + bias``: `chunked_ce.linear_cross_entropy`, which has the formula.

    It runs on every device. The loss is in float32 (float64 for float64 input), 0 where ignored, and 0 where no target
    counts (there: NaN). Gradients are summed in fp32 whatever ``accum_e_fp32`` and ``accum_c_fp32`` say.

    Args:
        e: hidden states (..., D).
        c: the head (V, D), or this rank's rows of it with ``vocab_parallel_options``.
        targets: class indices (...).
        bias: (V,).
        ignore_index, softcap, reduction: as there.
        shift: how many places ahead a token's target is, 0 <= shift < T: ``e[..., :-shift, :]`` predicts
            ``targets[..., shift:]``. True is 1. No shifted copy of ``e`` is made.
        return_lse: return ``(loss, lse)`` with the log-sum-exps, differentiable, 0 where ignored, in the shape of
            ``targets[..., shift:]``. Logits are then formed again in the backward: 8 N V D operations, not 6.
        filter_eps: the largest probability of vocabulary entries that may be left out of the gradients;
            ``"auto"`` (or ``"high"``) lets the dtype say, None leaves out none. See `ChunkOptions.gradient_filter`.
        filter_e_grad, filter_c_grad: here both gradients are filtered, or with one of them False neither.
        impl: a name of `LinearCrossEntropyImpl`, in lower case if it is a string; all but ``"cce"`` filter nothing.
        vocab_parallel_options: says which rows of the head this rank holds.

    Raises:
        ValueError, TypeError: an argument is not as described. Shapes that do not fit are reported with the names
            of `chunked_ce.linear_cross_entropy`: ``input``, ``linear_weight``, ``target``, ``linear_bias``.
        IndexError: a target is outside [0, V) and not ``ignore_index`` (on a GPU: a device-side assertion).

    >>> import torch
    >>> e, c = torch.eye(3, 4).unsqueeze(0), torch.eye(5, 4)
    >>> linear_cross_entropy(e, c, torch.tensor([[4, 1, 2]]), shift=True, reduction="none")
    tensor([[1.9048, 1.9048]])
    """
    for name, tensor, kind in (("e", e, FLOATING), ("c", c, FLOATING), ("targets", targets, INDICES)):
        check_tensor(name, tensor, kind)
    if bias is not None:
        check_tensor("bias", bias, FLOATING)
    check_keywords(reduction=reduction, ignore_index=ignore_index, softcap=softcap)
    for name, flag in (("accum_e_fp32", accum_e_fp32), ("accum_c_fp32", accum_c_fp32), ("return_lse", return_lse)):
        check_flag(name, flag)
    gradient_filter = _gradient_filter(_name_of(impl), filter_eps, filter_e_grad, filter_c_grad)
    vocab = None if vocab_parallel_options is None else vocab_parallel_options.shard(e.device)
    shift = _checked_shift(shift, targets)
    keywords: dict[str, Any] = {
        "linear_bias": bias,
        "ignore_index": ignore_index,
        "softcap": softcap,
        "vocab": vocab,
        "options": ChunkOptions(gradient_filter=gradient_filter),
    }
    target = _ahead(targets, shift, ignore_index) if shift else targets
    if not return_lse:
        loss = functional.linear_cross_entropy(e, c, target, reduction=reduction, **keywords)
        return _without_last(loss, shift) if reduction == "none" else loss
    found = functional.linear_statistics(e, c, target, outputs=("logprob", "lse"), **keywords)
    lse, loss = (_without_last(not_none(values), shift) for values in (found.lse, found.logprob))
    loss = -loss
    if reduction != "none":
        loss = loss.sum() if reduction == "sum" else loss.sum() / (target != ignore_index).sum().clamp(min=1)
    return loss, lse


class LinearCrossEntropy(nn.Module):
    """`linear_cross_entropy` as a module, with its options as attributes.

    >>> import torch
    >>> LinearCrossEntropy(shift=1)(torch.zeros(2, 3, 4), torch.eye(8, 4), torch.ones(2, 3, dtype=torch.int64))
    tensor(2.0794)
    """

    def __init__(
        self,
        ignore_index: int = -100,
        softcap: float | None = None,
        reduction: Reduction = "mean",
        shift: bool | int = 0,
        filter_eps: float | Literal["auto", "high"] | None = "auto",
        accum_e_fp32: bool = False,
        accum_c_fp32: bool = False,
        filter_e_grad: bool = True,
        filter_c_grad: bool = True,
        impl: str | LinearCrossEntropyImpl = LinearCrossEntropyImpl.CCE,
        return_lse: bool = False,
    ) -> None:
        super().__init__()
        check_keywords(reduction=reduction, ignore_index=ignore_index, softcap=softcap)
        _gradient_filter(_name_of(impl), filter_eps, filter_e_grad, filter_c_grad)
        self.ignore_index, self.softcap, self.reduction, self.shift = ignore_index, softcap, reduction, shift
        self.filter_eps, self.accum_e_fp32, self.accum_c_fp32 = filter_eps, accum_e_fp32, accum_c_fp32
        self.filter_e_grad, self.filter_c_grad, self.impl = filter_e_grad, filter_c_grad, impl
        self.return_lse = return_lse

    def forward(
        self, e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        options = {name: value for name, value in vars(self).items() if name in _OPTIONS}
        return linear_cross_entropy(e, c, targets, bias, **options)


_OPTIONS = LinearCrossEntropy.__init__.__annotations__.keys() - {"return"}


def _name_of(impl: object) -> str:
    names = [one.name.lower() for one in LinearCrossEntropyImpl]
    name = impl.name.lower() if isinstance(impl, LinearCrossEntropyImpl) else impl
    if not isinstance(name, str) or name not in names:
        raise ValueError(f"impl must be one of {', '.join(map(repr, names))}, was {described(impl)}")
    return name


def _gradient_filter(
    impl: str, filter_eps: Any, filter_e_grad: object, filter_c_grad: object
) -> float | Literal["auto"] | None:
    """`ChunkOptions.gradient_filter` for the arguments that concern it."""
    check_flag("filter_e_grad", filter_e_grad)
    check_flag("filter_c_grad", filter_c_grad)
    chosen: float | Literal["auto"] | None = "auto"
    if not is_one_of(filter_eps, ("auto", "high")):
        try:
            chosen = ChunkOptions(gradient_filter=filter_eps).gradient_filter
        except ValueError:
            allowed = "None, 'auto', 'high' or in [0, 1)"
            raise ValueError(f"filter_eps must be {allowed}, was {described(filter_eps)}") from None
    return chosen if impl == "cce" and filter_e_grad and filter_c_grad else None


def _checked_shift(shift: object, targets: Tensor) -> int:
    if not isinstance(shift, bool) and not is_integer(shift):
        raise TypeError(f"shift must be True, False or an integer, was {described(shift)}")
    if not shift:
        return 0
    length = targets.shape[-1] if targets.dim() else 0
    if not 0 < shift < length:
        raise ValueError(f"shift must be in [0, {length}), the length of a sequence, was {described(shift)}")
    return int(shift)


def _ahead(targets: Tensor, shift: int, ignore_index: int) -> Tensor:
    """The targets that are ``shift`` places ahead, (..., T), ignored where there are none."""
    ahead = torch.full_like(targets, ignore_index)
    ahead[..., :-shift] = targets[..., shift:]
    return ahead


def _without_last(values: Tensor, shift: int) -> Tensor:
    return values[..., :-shift] if shift else values
