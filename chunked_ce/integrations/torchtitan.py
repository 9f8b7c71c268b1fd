"""torchtitan's loss, from hidden states and the head: one line of a config registry.

from chunked_ce.integrations.torchtitan import ChunkedCrossEntropyLoss

Trainer.Config(loss=ChunkedCrossEntropyLoss.Config(), ...)
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import spmd_types as spmd
import torch
import torchtitan.components.loss as titan
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torchtitan.config import CompileConfig
from torchtitan.distributed.spmd_types import current_spmd_mesh, spmd_mesh_size

from chunked_ce.arguments import described, number
from chunked_ce.checks import check_keywords
from chunked_ce.engine.loss_stats import LossStats
from chunked_ce.functional import linear_cross_entropy
from chunked_ce.narrowing import not_none
from chunked_ce.options import ChunkOptions
from chunked_ce.parallel.vocab import VocabShard

__all__ = ["ChunkedCrossEntropyLoss"]

_TP = "tp"  # torchtitan's name of the ranks that share a vocabulary
_MTP = "torchtitan.models.deepseek_v3.mtp"


class ChunkedCrossEntropyLoss(titan.ChunkedLossWrapper):
    """Cross-entropy whose logits never exist as a whole, with torchtitan's protocol of a loss.

    It is called with ``(hidden states, labels, global_valid_tokens)`` and returns ``(loss, metrics)``: the sum of the
    losses of this rank's tokens, divided by ``global_valid_tokens``. To the trainer it is a ``ChunkedLossWrapper``, so
    that the model leaves its head to the loss. Here one call of the head takes all tokens: FSDP2 gathers it and reduces
    its gradient once, and chunks need not divide the sequence.

    The vocabulary may be sharded by tensor parallelism, with any of torchtitan's SPMD backends. An ``MTPDecoder`` gives
    hidden states of several depths, which one pass takes together.

    Metrics, if ``metrics`` asks for them, are plain tensors of this rank, to be summed over ranks and micro-batches
    (``/max``: their maximum): ``accuracy/frac``, ``entropy/mean`` in nats, both divided by ``global_valid_tokens``, and
    ``lse/max``, the largest log-sum-exp. torchtitan's own trainer drops the metrics of every loss.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(titan.BaseLoss.Config):
        label_smoothing: float = 0.0
        """In [0, 1]."""

        z_loss: float = 0.0
        """Factor of the squared log-sum-exp, >= 0."""

        mtp_scale: float = 0.3
        """Factor of the mean of the losses of the further depths of an ``MTPDecoder``, >= 0."""

        metrics: bool = False
        """Whether to return metrics; not with several depths."""

        chunk_size: int | None = None
        """Tokens in a chunk; None: as many as fit into ``memory_budget``."""

        memory_budget: int | None = None
        """Bytes that a chunk's logits may take; None: by device, vocabulary and width."""

        gradients: Literal["auto", "forward", "backward"] = "auto"
        """When gradients are computed: ``"forward"`` is the fastest, ``"backward"`` needs the least memory."""

        logits_dtype: Literal["float32"] | None = None
        """``"float32"``: logits of bf16 factors are not rounded to bf16."""

        gradient_filter: float | None = None
        """Skip words at most this likely in the gradients, which are approximate then; None: exact."""

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        check_keywords(label_smoothing=config.label_smoothing, z_loss=config.z_loss)
        self.mtp_scale = number("mtp_scale", config.mtp_scale)
        if not 0 <= self.mtp_scale < float("inf"):
            raise ValueError(f"mtp_scale must be finite and >= 0, was {described(config.mtp_scale)}")
        if config.logits_dtype not in (None, "float32"):
            raise ValueError(f"logits_dtype must be None or 'float32', was {described(config.logits_dtype)}")
        self.metrics = config.metrics
        self.keywords = {
            "label_smoothing": config.label_smoothing,
            "z_loss": config.z_loss,
            "ignore_index": titan.IGNORE_INDEX,
            "return_stats": config.metrics,
            "options": ChunkOptions(
                chunk_size="auto" if config.chunk_size is None else config.chunk_size,
                memory_budget=config.memory_budget,
                gradients=config.gradients,
                logits_dtype=None if config.logits_dtype is None else torch.float32,
                gradient_filter=config.gradient_filter,
            ),
        }
        self.fn: Callable[..., Any] = linear_cross_entropy
        self._maybe_compile(compile_config)
        self.lm_head: nn.Linear | None = None
        self.vocab: VocabShard | None = None

    def set_lm_head(self, lm_head: nn.Module) -> None:
        """Take the model's head, as the trainer does before the first step.

        Raises:
            ValueError: the head computes something else than ``nn.Linear``, with a softcap or without.
        """
        self.logits = _logits_of(lm_head)
        self.lm_head, self.vocab = cast(nn.Linear, lm_head), None  # or SoftCappedLinear, which is one
        _let_mtp_skip_its_head()

    def __call__(
        self,
        pred: Tensor | list[Tensor],  # (B, T, D), of each depth if a list
        labels: Tensor,  # (B, T)
        global_valid_tokens: Tensor | None = None,
        *,
        positions: Tensor | None = None,  # (B, T)
        **others: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the metrics.

        Args:
            pred: hidden states, as a model returns them that skips its head; a list of depths, the main one first.
            labels: -100 is ignored.
            global_valid_tokens: what divides the sum of the losses; None for the sum.
            positions: of the tokens in their documents, which the labels of further depths do not leave.

        Raises:
            RuntimeError: the head was not set.
            TypeError: an argument that this loss does not know.
            ValueError: several depths without positions, or with metrics.
        """
        if others:
            raise TypeError(f"{next(iter(others))} is not an argument of this loss: allowed is positions")
        if self.lm_head is None:
            raise RuntimeError("the head was not set: torchtitan's trainer calls set_lm_head before the first step")
        is_checked = spmd.is_type_checking()
        with spmd.no_typecheck():
            loss_of = functools.partial(
                self._loss, labels=labels, global_valid_tokens=global_valid_tokens, positions=positions
            )
            found = _in_a_call(self.lm_head, pred, loss_of)
            loss, stats = found if self.metrics else (found, None)
            if isinstance(labels, DTensor):
                loss = _global_sum(loss, labels)
            if is_checked:
                spmd.assert_type(loss, {"dp": spmd.P, "cp": spmd.P, _TP: spmd.I})
            return loss, {} if stats is None else _metrics(stats, global_valid_tokens)

    def _loss(
        self,
        pred: Tensor | list[Tensor],
        labels: Tensor,
        global_valid_tokens: Tensor | None,
        positions: Tensor | None,
    ) -> Tensor | tuple[Tensor, LossStats]:
        """The loss inside a call of the head, where its parameters are whole or this rank's words.

        ``pred`` is what the hooks of the head return: its gradient tells FSDP to reduce that of the head.
        """
        head = not_none(self.lm_head)
        if self.vocab is None:
            group = _tensor_parallel_group(head.weight)
            if group is not None:  # whoever gathered the hidden states over these ranks sums their gradients
                self.vocab = VocabShard.split(head.out_features, group, input_grad="partial")
        keywords = self.keywords | self.logits | {"vocab": self.vocab}
        mine = not_none(_local(labels))
        targets: Tensor | list[Tensor] = mine
        if isinstance(pred, list):
            if self.metrics:
                raise ValueError("metrics must be False with several depths of multi-token prediction")
            targets = _targets_of_depths(pred, mine, _local(positions))
            further = self.mtp_scale / max(len(pred) - 1, 1)
            keywords["token_weight"] = [1.0] + [further] * (len(pred) - 1)
        loss: Tensor | tuple[Tensor, LossStats] = self.fn(
            [_local_hidden(one) for one in pred] if isinstance(pred, list) else _local_hidden(pred),
            _local_rows(head.weight, labels),
            targets,
            linear_bias=_local_rows(head.bias, labels),
            reduction="sum" if global_valid_tokens is None else "mean",
            num_tokens=global_valid_tokens,
            **keywords,
        )
        return loss


def _in_a_call(head: nn.Module, hidden: Any, compute: Callable[[Any], Any]) -> Any:
    """``compute`` in the place of the forward of ``head``, with all hooks of a call, such as FSDP's, around it."""
    own = vars(head).pop("forward", None)
    head.forward = compute
    try:
        return head(hidden)
    finally:
        del head.forward
        if own is not None:
            head.forward = own


def _logits_of(head: Any) -> dict[str, float | None]:
    """What a head does to its product, as keywords of a loss."""
    forward, own = type(head).forward, vars(head).get("forward")
    of_torchtitan = getattr(own, "__module__", None) == "torchtitan.protocols.module"
    if isinstance(head, nn.Linear) and (own is None or of_torchtitan):
        if forward is nn.Linear.forward:
            return {}
        softcapped = getattr(sys.modules.get("torchtitan.models.muse_glimmer.model"), "SoftCappedLinear", None)
        if softcapped is not None and forward is softcapped.forward:
            numbers: Any = head
            return {"logit_scale": numbers.output_multiplier, "softcap": numbers.output_soft_cap_temp}
    raise ValueError(
        f"lm_head must compute what nn.Linear or SoftCappedLinear does, was {type(head).__name__} with a forward of "
        "its own: ChunkedLossWrapper takes any head"
    )


def _tensor_parallel_group(weight: Tensor) -> Any:
    """The ranks over which the rows of a head are sharded; None if this rank has them all."""
    if isinstance(weight, DTensor):
        names = weight.device_mesh.mesh_dim_names or ()
        is_sharded = _TP in names and weight.placements[names.index(_TP)].is_shard(0)
        return weight.device_mesh.get_group(_TP) if is_sharded else None
    return current_spmd_mesh().get_group(_TP) if spmd_mesh_size(_TP) > 1 else None


def _local(tensor: Tensor | None) -> Tensor | None:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_hidden(hidden: Tensor) -> Tensor:
    """This rank's hidden states, whole for its words; their gradients are of its words only."""
    if not isinstance(hidden, DTensor):
        return hidden
    whole, gradients = list(hidden.placements), list(hidden.placements)
    names = hidden.device_mesh.mesh_dim_names or ()
    if _TP in names:
        whole[names.index(_TP)], gradients[names.index(_TP)] = Replicate(), Partial()
    return hidden.redistribute(placements=whole).to_local(grad_placements=gradients)


def _local_rows(parameter: Tensor | None, labels: Tensor) -> Tensor | None:
    """This rank's rows of a parameter of the head; their gradient is of this rank's tokens only."""
    if not isinstance(parameter, DTensor):
        return parameter
    gradients = list(parameter.placements)
    if isinstance(labels, DTensor) and labels.device_mesh == parameter.device_mesh:
        gradients = [
            Partial() if of.is_shard() else mine for mine, of in zip(gradients, labels.placements, strict=True)
        ]
    return parameter.to_local(grad_placements=gradients)


def _global_sum(loss: Tensor, labels: DTensor) -> DTensor:
    """The loss as torchtitan's full-DTensor backend has it: a part of a sum where tokens are sharded."""
    placements = [Partial() if placement.is_shard() else Replicate() for placement in labels.placements]
    return DTensor.from_local(loss, labels.device_mesh, placements, run_check=False)


def _metrics(stats: LossStats, global_valid_tokens: Tensor | None) -> dict[str, Tensor]:
    tokens = stats.num_tokens if global_valid_tokens is None else global_valid_tokens
    return {
        "accuracy/frac": stats.num_correct / tokens,
        "entropy/mean": stats.entropy_sum / tokens,
        "lse/max": stats.lse_max,
    }


# ---- several depths of multi-token prediction ----


def _targets_of_depths(pred: list[Tensor], labels: Tensor, positions: Tensor | None) -> list[Tensor]:
    """The labels of each depth: further depths look further ahead, within the document of a token."""
    if positions is None:
        raise ValueError("positions must be given with several depths of multi-token prediction, was None")
    roll = sys.modules[_MTP].roll_mtp_sequence
    time = pred[0].shape[1]
    labels, positions = labels[:, :time], positions[:, :time]
    further = (
        roll(labels, shift=depth, fill_value=titan.IGNORE_INDEX, positions=positions) for depth in range(1, len(pred))
    )
    return [labels, *further]


def _let_mtp_skip_its_head() -> None:
    """Let torchtitan's ``MTPDecoder``, which refuses to skip its head, return the hidden states of all depths."""
    decoder = getattr(sys.modules.get(_MTP), "MTPDecoder", None)
    if decoder is None or hasattr(decoder.forward, "__wrapped__"):
        return
    original = decoder.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._skip_lm_head or self.mtp_layers is None:
            return original(self, *args, **kwargs)
        head, self.lm_head, self._skip_lm_head = self.lm_head, None, False
        try:
            return original(self, *args, **kwargs)
        finally:
            self.lm_head, self._skip_lm_head = head, True

    decoder.forward = forward
