"""What an objective is: the loss of a token as a function of its row's statistics."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from chunked_ce.rows.statistics import STATISTICS, RowStatistics, weight_sum

__all__ = ["OBJECTIVES", "Objective", "Tokens"]

OBJECTIVES: dict[str, type[Objective]] = {}  # every class there is, by its key: module and name


def _dispatch_keys() -> tuple[torch._C.DispatchKeySet, torch._C.DispatchKeySet]:
    return torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


# The keys of a thread that is in no operator and no mode, whatever this one is in: within an operator, autograd is off.
with ThreadPoolExecutor(1) as _thread:
    _OUTSIDE = _thread.submit(_dispatch_keys).result()


class Tokens:
    """The facts about some tokens besides their rows; the tensors of ``per_token`` are attributes, (n,) each, and those
    of ``optional_per_token``, None if they were not given."""

    def __init__(
        self,
        vocab_size: int,
        weight_sum: Tensor | float,  # sum of the class weights
        target_weight: Tensor | None,  # (n,) class weight of each target
        tensors: dict[str, Tensor | None],  # (n,) each
    ) -> None:
        self.vocab_size, self.weight_sum, self.target_weight = vocab_size, weight_sum, target_weight
        self._tensors = tensors

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_tensors"][name]
        except KeyError:
            raise AttributeError(f"no tensor {name!r} was given for each token") from None

    def at(self, rows: slice) -> Tokens:
        weight = None if self.target_weight is None else self.target_weight[rows]
        tensors = {name: None if tensor is None else tensor[rows] for name, tensor in self._tensors.items()}
        return Tokens(self.vocab_size, self.weight_sum, weight, tensors)


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of a token as a function of a few statistics of its row of logits.

    A subclass is a frozen dataclass that defines `loss`. Its fields are plain numbers, strings, booleans or None, which
    it checks in ``__post_init__``, and perhaps ``class_weight``. It then runs with every source of logits, sharding,
    gradient way and backend. Its module and name stand for it in compiled and exported programs, so no other class may
    share them.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Focal(Objective):
    ...     "Focal loss (arXiv:1708.02002, equation 4)."
    ...     gamma: float = 2.0
    ...
    ...     def loss(self, rows, tokens):
    ...         return -((1 - rows.logprob.exp()) ** self.gamma) * rows.logprob
    """

    statistics: ClassVar[tuple[str, ...]] = ()
    """The statistics that `loss` reads besides ``log_sum`` and ``target``: names of `chunked_ce.rows.statistics`. The
    entropy needs ``"mean"``."""

    teacher_share: ClassVar[float] = 0.0
    """Of the teacher in the mixture that the statistic ``mixture_kl`` compares with."""

    # An objective with class weights (V,) has them as a field that is not compared; with an annotation, all had one.
    class_weight = cast("Tensor | None", None)

    key: ClassVar[str]  # in `OBJECTIVES`

    per_token: ClassVar[tuple[str, ...]] = ()
    """The tensors that `loss` reads for each token: keywords of `linear_loss`, in the shape of ``target``."""

    optional_per_token: ClassVar[tuple[str, ...]] = ()
    """More such tensors, which may be left out or None: ``tokens`` then has None for them."""

    ids: ClassVar[str | None] = None
    """Which tensor of ``per_token`` holds K ids per token, (..., K), at which the statistic ``"at_ids"`` reads the
    logits: int32 or int64 in [0, V), or ``ignore_index`` for padding. ``tokens`` has -1 for padding."""

    per_id: ClassVar[tuple[str, ...]] = ()
    """The tensors of ``per_token`` and ``optional_per_token`` that have a number for each of these ids, (..., K)."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "loss" in vars(cls) and "slopes" not in vars(cls):
            cls.slopes = Objective.slopes  # type: ignore[method-assign]  # those that a parent wrote out are of its own loss
        name = f"{cls.__module__}:{cls.__qualname__}"
        cls.key = name if name not in OBJECTIVES else f"{name}#{len(OBJECTIVES)}"  # of a class that is defined again
        OBJECTIVES[cls.key] = cls

    def loss(self, rows: RowStatistics, tokens: Tokens) -> Tensor:
        """The loss of each token (n,) before token weights, in differentiable torch operations.

        ``rows`` has ``logprob``, ``nll``, ``lse`` and the statistics, (n,) each; ``tokens`` has the tensors of
        ``per_token`` and ``optional_per_token``, (n,) each, ``vocab_size``, and of the class weights ``target_weight``
        (n,) and ``weight_sum``.
        `loss` sees some rows at a time, on a CPU in several threads at once, so the loss of a token must not depend on
        other tokens, or on other calls. The largest logit counts as a constant: statistics are relative to it, and
        ``maximum`` alone has no gradient.
        """
        raise NotImplementedError

    def slopes(self, rows: RowStatistics, tokens: Tokens) -> RowStatistics:
        """The derivatives of `loss` in the statistics, (n,) each; None where a statistic has no effect.

        By default autograd finds them, a few rows at a time; a frequently used objective writes them out.
        """
        named = rows.named()
        with torch._C._ForceDispatchKeyGuard(*_OUTSIDE), torch.enable_grad():
            leaves = {
                name: part.detach().requires_grad_() for name, part in named.items() if STATISTICS[name].differentiable
            }
            loss = self.token_loss(RowStatistics(**(named | leaves)), tokens)
            found = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True)
        slopes: dict[str, Any] = {"maximum": None} | dict(zip(leaves, found, strict=True))
        unused = {name: torch.zeros_like(rows.log_sum) for name in ("log_sum", "target") if slopes[name] is None}
        return RowStatistics(**(slopes | unused))

    def sums(self, rows: RowStatistics, tokens: Tokens) -> dict[str, Tensor]:
        """The numbers (n,), by name, of which `LossStats` has the sums over the tokens that count, besides its own."""
        return {}

    def token_loss(self, rows: RowStatistics, tokens: Tokens) -> Tensor:
        """`loss`, attached to the graph of the rows; ``ValueError`` unless it has one number for each row."""
        loss = self.loss(rows, tokens)
        if loss.shape != rows.log_sum.shape:
            shapes = f"{tuple(rows.log_sum.shape)}, one loss for each token, had {tuple(loss.shape)}"
            raise ValueError(f"the loss of {type(self).__name__} must have shape {shapes}")
        return loss if loss.requires_grad or not rows.log_sum.requires_grad else loss + 0 * rows.log_sum

    def without_tensors(self) -> Objective:
        """The same objective without class weights, which travel as a tensor of the call."""
        without: dict[str, Any] = {"class_weight": None}  # a field of the subclass
        return self if self.class_weight is None else dataclasses.replace(self, **without)

    def tensors(self, given: dict[str, Tensor], ignore_index: int) -> dict[str, Tensor | None]:
        """The tensors that were ``given`` for each token, and None for the optional ones that were not."""
        tensors: dict[str, Tensor | None] = dict.fromkeys(self.optional_per_token) | given
        if self.ids is not None:
            tensors[self.ids] = given[self.ids].where(given[self.ids] != ignore_index, -1)
        return tensors

    def losses(
        self,
        rows: RowStatistics,  # (N,) each, 0 where ignored
        target: Tensor,  # (N,)
        ignore_index: int,
        class_weight: Tensor | None,  # (V,)
        vocab_size: int,
        per_token: dict[str, Tensor],  # (N,) each, and the "_coefficient" of each loss
    ) -> Tensor:
        """The loss of each token times its coefficient, (N,), 0 where ignored."""
        tokens, counted = self._all_tokens(target, ignore_index, class_weight, vocab_size, per_token)
        return (self.token_loss(rows, tokens) * per_token["_coefficient"]).where(counted, 0)

    def counted_sums(
        self,
        rows: RowStatistics,  # (N,) each, 0 where ignored
        target: Tensor,  # (N,)
        ignore_index: int,
        class_weight: Tensor | None,  # (V,)
        vocab_size: int,
        per_token: dict[str, Tensor],  # (N,) each
    ) -> dict[str, Tensor]:
        """The numbers of `sums`, (N,) each, 0 where ignored."""
        if type(self).sums is Objective.sums:
            return {}
        tokens, counted = self._all_tokens(target, ignore_index, class_weight, vocab_size, per_token)
        sums = self.sums(rows.map(Tensor.double), tokens)
        return {name: values.where(counted, 0) for name, values in sums.items()}

    def _all_tokens(
        self,
        target: Tensor,
        ignore_index: int,
        class_weight: Tensor | None,
        vocab_size: int,
        per_token: dict[str, Tensor],
    ) -> tuple[Tokens, Tensor]:
        """The facts about all tokens, including ignored ones, and which of them count (N,)."""
        counted = target != ignore_index
        target_weight = None if class_weight is None else class_weight[target.where(counted, 0)]
        sum_of_weights = weight_sum(class_weight, vocab_size)
        return Tokens(vocab_size, sum_of_weights, target_weight, self.tensors(per_token, ignore_index)), counted
