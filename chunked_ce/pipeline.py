"""A head, and the embedding tied to it, spread over the stages of a pipeline: each holds V / R of its rows.

With the whole head on the last stage, that stage has the most work and the most memory. Here (arXiv 2411.05288) all
stages compute each loss together, on their own rows. They have to meet for it, so a step runs in this order:

1. embedding, if tied: every stage looks up the tokens whose rows it holds; the sum goes to the first stage;
2. the forward passes of all micro-batches, as in GPipe; the last stage keeps the hidden states;
3. the losses: for each micro-batch the last stage broadcasts hidden states and targets, and all stages compute the
   loss, the gradient of their rows, and their share of the gradient of the hidden states;
4. the backward passes of all micro-batches, from these gradients;
5. embedding, if tied: the gradient of the embedded tokens is broadcast, and every stage adds it to its rows.

Between 2 and 4 no send or receive of the pipeline is pending, so no stage can wait for another one that waits for it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from chunked_ce.arguments import FLOATING, INDICES, check_flag, check_tensor, described
from chunked_ce.functional import linear_cross_entropy
from chunked_ce.narrowing import not_none
from chunked_ce.parallel.tokens import TokenMean
from chunked_ce.parallel.vocab import VocabShard

__all__ = ["DeferredLoss", "SpreadGPipe", "SpreadHead"]

_SUM = cast("Callable[..., Tensor]", functools.partial(linear_cross_entropy, reduction="sum"))

Labels = Tensor | tuple[Tensor, ...]  # of a micro-batch: its targets, or these and other tensors for the loss


class DeferredLoss:
    """The loss of a micro-batch on the last stage, whose value and gradient come once all stages have met."""

    def __init__(self, hidden: Tensor, labels: Labels, is_probe: bool) -> None:
        self.hidden, self.labels, self.is_probe, self.scale = hidden.detach(), labels, is_probe, 1.0
        self.gradient: Tensor | None = None  # of the hidden states, and in their shape
        self.loss: Tensor = _Deferred.apply(hidden, self)  # type: ignore[no-untyped-call]  # (), float32


class _Deferred(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, deferred: DeferredLoss) -> Tensor:
        ctx.deferred, ctx.hidden = deferred, (hidden.shape, hidden.dtype, hidden.device)
        return torch.zeros((), device=hidden.device)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        gradient, ctx.deferred.gradient = ctx.deferred.gradient, None
        if gradient is not None:
            return gradient * (upstream[0] * ctx.deferred.scale).to(gradient.dtype), None
        if not ctx.deferred.is_probe:
            raise RuntimeError(
                "a spread head's loss has no gradient before all stages have met, and one backward: run the head "
                "through SpreadGPipe, or through spread of chunked_ce.integrations.deepspeed_pipeline"
            )
        shape, dtype, device = ctx.hidden
        return torch.zeros(shape, dtype=dtype, device=device), None


class SpreadHead(nn.Module):
    """This stage's rows of a head that is spread over the stages of a pipeline.

    Every stage makes one and gives its parameter to its optimizer. `SpreadGPipe` or
    `chunked_ce.integrations.deepspeed_pipeline.spread` runs it. The ranks of the shard's group are the stages, in their
    order; the last stage returns hidden states (..., D).

    Args:
        weight: this stage's rows (V_r, D), ``whole[shard.start : shard.stop]``; they are copied into a parameter.
        shard: of the vocabulary, over the pipeline's group.
        mean: the mean of a step, made on every stage from the list of the labels of its micro-batches. Such as
            ``functools.partial(TokenMean.over, group=data_group, divisor=data_ranks)``, with the group of the ranks
            that hold the same stage of other replicas of the pipeline. ``divisor`` is what the gradients of parameters
            are divided by after the backward passes; it has no factor for the micro-batches.
        loss: ``loss(hidden, weight, target, vocab=shard)`` is the sum of the losses of a micro-batch's tokens. Labels
            that are a tuple are given as ``loss(hidden, weight, *labels, vocab=shard)``.
        tied: whether these are the rows of the embedding as well. The first stage then gets embedded tokens
            (..., D) where it would get tokens.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is allowed.
    """

    def __init__(
        self,
        weight: Tensor,
        shard: VocabShard,
        *,
        mean: Callable[[list[Labels]], TokenMean],
        loss: Callable[..., Tensor] = _SUM,
        tied: bool = False,
    ) -> None:
        super().__init__()
        check_tensor("weight", weight, FLOATING)
        if not isinstance(shard, VocabShard):
            raise TypeError(f"shard must be a VocabShard over the pipeline's group, was {type(shard).__name__}")
        if weight.dim() != 2 or len(weight) != shard.rows:
            raise ValueError(f"weight must be (stop - start = {shard.rows}, D), had shape {tuple(weight.shape)}")
        if weight.dtype == torch.float16:
            raise ValueError("weight must not be float16, whose loss scale would not reach the rows of all stages")
        if (shard.input_grad, shard.tokens) != ("complete", "same"):
            had = f"{shard.input_grad!r} and {shard.tokens!r}"
            raise ValueError(f"shard must have input_grad='complete' and tokens='same', had {had}")
        for name, value in (("mean", mean), ("loss", loss)):
            if not callable(value):
                raise TypeError(f"{name} must be callable, was {described(value)}")
        check_flag("tied", tied)
        self.weight = nn.Parameter(weight.detach().clone())
        self.shard, self.mean, self.loss, self.tied = shard, mean, loss, tied
        self._deferred: list[DeferredLoss] = []
        self._probes = False  # whether torch may ask for a gradient only to learn its shape
        self._tokens: list[Tensor] = []  # of each micro-batch, from `embed` to `finish`
        self._gradient: Tensor | None = None  # of the rows, from `meet` to `finish`

    @property
    def is_first(self) -> bool:
        """Whether this is the first stage."""
        return dist.get_rank(self.shard.group) == 0

    @property
    def is_last(self) -> bool:
        """Whether this is the last stage."""
        return dist.get_rank(self.shard.group) == self.shard.size - 1

    def embed(self, tokens: Sequence[Tensor] | None) -> list[Tensor]:
        """The embedded tokens (..., D) of each micro-batch, on the first stage; an empty list on all others.

        Args:
            tokens: on the first stage, of each micro-batch: int32 or int64 (...).

        Raises:
            ValueError: on every stage, if the first one's tokens are not integers or, on the CPU, not in [0, V).
        """
        problem = self._token_problem(not_none(tokens)) if self.is_first else None
        self._tokens = list(self._broadcast(tokens, source=0, problem=problem))
        embedded: list[Tensor] = []
        for of_batch in self._tokens:
            part = self.weight.new_zeros(*of_batch.shape, self.weight.shape[1])
            if self.shard.rows:
                rows, held = self._held(of_batch)
                part = F.embedding(rows, self.weight.detach()).mul_(held[..., None])
            dist.reduce(part, group_dst=0, group=self.shard.group)
            if self.is_first:
                embedded.append(part)
        return embedded

    def defer(self, hidden: Tensor, labels: Labels) -> Tensor:
        """The last stage's loss function: 0 until `meet` fills in the value, and the gradient with it."""
        self._deferred.append(DeferredLoss(hidden, labels, self._probes))
        return self._deferred[-1].loss

    def meet(self, micro_batches: int, scale: float = 1.0) -> list[DeferredLoss]:
        """Computes the losses of a step's micro-batches. Every stage calls it, between its passes.

        Args:
            micro_batches: of this step.
            scale: what the engine divides losses by, but not the gradients of the rows.

        Returns:
            On the last stage what was deferred, in order; an empty list on all others.

        Raises:
            ValueError: on every stage, if the last one has not deferred as many losses.
        """
        deferred, self._deferred = self._deferred[-micro_batches:], []  # torch may have probed before
        labels = self._broadcast_labels(deferred, micro_batches)
        mean, trains = self.mean(labels), torch.is_grad_enabled()
        rows = self.weight.detach().requires_grad_(trains and self.weight.requires_grad)
        arriving = self._broadcast([one.hidden for one in deferred], source=self.shard.size - 1)
        for at, (hidden, of_batch) in enumerate(zip(arriving, labels, strict=True)):
            hidden.requires_grad_(trains)
            tensors = of_batch if isinstance(of_batch, tuple) else (of_batch,)
            loss = mean(self.loss(hidden, rows, *tensors, vocab=self.shard))
            if trains:
                loss.backward()
            if self.is_last:
                deferred[at].is_probe, deferred[at].scale, deferred[at].gradient = False, scale, hidden.grad
                deferred[at].loss.detach().copy_(loss.detach() * scale)
        self._gradient = rows.grad
        return deferred

    def finish(self, embedded: Sequence[Tensor | None] | None = None) -> None:
        """Adds the step's gradient of the rows to ``weight.grad``. Every stage calls it, after its backward passes.

        Args:
            embedded: if tied, on the first stage: the gradients (..., D) of what `embed` returned.
        """
        rows, self._gradient = self._gradient, None
        tokens, self._tokens = self._tokens, []
        if rows is None:
            return
        if self.tied:
            lost = self.is_first and any(gradient is None for gradient in not_none(embedded))
            problem = "the first stage's module gave its embedded tokens no gradient" if lost else None
            for of_batch, part in zip(tokens, self._broadcast(embedded, source=0, problem=problem), strict=True):
                if self.shard.rows:
                    at, held = self._held(of_batch)
                    rows.index_add_(0, at.flatten(), (part * held[..., None]).flatten(0, -2))
        self.weight.grad = rows if self.weight.grad is None else self.weight.grad.add_(rows)

    def _held(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's row of this stage, and whether it has one."""
        held = (self.shard.start <= tokens) & (tokens < self.shard.stop)
        return torch.where(held, tokens - self.shard.start, 0), held

    def _token_problem(self, tokens: Sequence[Tensor]) -> str | None:
        for of_batch in tokens:
            try:
                check_tensor("tokens", of_batch, INDICES)
            except (TypeError, ValueError) as error:
                return str(error)
            inside = (of_batch >= 0) & (of_batch < self.shard.total)
            if of_batch.device.type == "cpu" and not inside.all():
                return f"tokens must be in [0, {self.shard.total}), held {of_batch[~inside][0].item()}"
        return None

    def _broadcast_labels(self, deferred: list[DeferredLoss], micro_batches: int) -> list[Labels]:
        given = [one.labels if isinstance(one.labels, tuple) else (one.labels,) for one in deferred]
        problem = f"the step has {micro_batches} micro-batches, but the last stage deferred {len(deferred)} losses"
        structure = any(isinstance(one.labels, tuple) for one in deferred), [len(of_batch) for of_batch in given]
        last = self.shard.size - 1
        tuples, lengths = self._announce(structure, last, problem if len(deferred) != micro_batches else None)
        arriving = self._broadcast([tensor for of_batch in given for tensor in of_batch], last)
        labels = [tuple(itertools.islice(arriving, length)) for length in lengths]
        return [*labels] if tuples else [target for (target,) in labels]

    def _announce(self, value: Any, source: int, problem: str | None = None) -> Any:
        """The value of the stage ``source``, on every stage; a ``problem`` of it is a ValueError on every stage."""
        announced = [(value, problem)]
        dist.broadcast_object_list(announced, group_src=source, group=self.shard.group)
        value, problem = announced[0]
        if problem is not None:
            raise ValueError(problem)
        return value

    def _broadcast(
        self, tensors: Sequence[Tensor | None] | None, source: int, problem: str | None = None
    ) -> Iterator[Tensor]:
        """The ``tensors`` of the stage ``source``, one after another on every stage; the next one travels meanwhile."""
        is_source = dist.get_rank(self.shard.group) == source
        sends = is_source and problem is None
        given = [not_none(one) for one in not_none(tensors)] if sends else []
        kinds = self._announce([(tuple(one.shape), one.dtype) for one in given] if sends else None, source, problem)

        def started(at: int) -> tuple[Tensor, Any] | None:
            if at == len(kinds):
                return None
            if is_source:
                tensor = given[at].detach().contiguous()
            else:
                shape, dtype = kinds[at]
                tensor = torch.empty(shape, dtype=dtype, device=self.weight.device)
            return tensor, dist.broadcast(tensor, group_src=source, group=self.shard.group, async_op=True)

        following = started(0)
        for at in range(len(kinds)):
            (tensor, sent), following = not_none(following), started(at + 1)
            sent.wait()
            yield tensor


class SpreadGPipe(ScheduleGPipe):
    """`torch.distributed.pipelining.ScheduleGPipe` with a `SpreadHead`: the same calls of ``step``, without a loss_fn.

        head = SpreadHead(whole[shard.start : shard.stop], shard, mean=mean)          # on every stage
        schedule = SpreadGPipe(PipelineStage(module, index, stages, device, group=group), micro_batches, head)
        schedule.step(tokens)                                                          # first stage
        schedule.step(target=targets, losses=losses)                                   # last stage
        schedule.step()                                                                # others

    After ``step`` the parameters of the module and of the head have gradients, and ``losses`` holds each micro-batch's
    share of the mean, times the mean's divisor. ``eval`` fills ``losses`` alike, without gradients.

    Args:
        stage: whose module returns hidden states (B, ..., D) if it is the last one.
        n_microbatches: of a step.
        head: of this stage.
        keywords: as for `ScheduleGPipe`, but neither loss_fn nor scale_grads.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is allowed.
    """

    def __init__(self, stage: PipelineStage, n_microbatches: int, head: SpreadHead, **keywords: Any) -> None:
        if not isinstance(head, SpreadHead):
            raise TypeError(f"head must be a SpreadHead, was {type(head).__name__}")
        if not keywords.keys().isdisjoint({"loss_fn", "scale_grads"}):
            raise TypeError("keywords must not hold loss_fn or scale_grads: the loss is the head's, a mean over tokens")
        at, ranks = dist.get_rank(head.shard.group), head.shard.size
        if (stage.stage_index, stage.num_stages) != (at, ranks):
            raise ValueError(
                f"head must be spread over the stages in their order, but stage {stage.stage_index} of "
                f"{stage.num_stages} has rank {at} of the {ranks} in the shard's group"
            )
        super().__init__(stage, n_microbatches, loss_fn=head.defer, scale_grads=False, **keywords)
        self._head = head

    def step(self, *args: Any, **keywords: Any) -> Any:
        head, stage, embeds = self._head, self._stage, self._head.tied and self._head.is_first
        receives: Callable[[int], list[dist.P2POp]] = stage.get_bwd_recv_ops
        leaves: list[Tensor] = []
        if head.tied:
            embedded = head.embed(list(args[0].tensor_split(self._n_microbatches)) if embeds else None)
            args = (torch.cat(embedded), *args[1:]) if embeds else args

        def meet_then_receive(micro_batch: int) -> list[dist.P2POp]:
            # Called before each backward pass: all forward passes are over before the first.
            if micro_batch == 0:
                head.meet(self._n_microbatches)
            return receives(micro_batch)

        def with_gradient(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            leaves.append(inputs[0].detach().requires_grad_(torch.is_grad_enabled()))
            return (leaves[-1], *inputs[1:])

        stage.get_bwd_recv_ops = meet_then_receive  # type: ignore[method-assign,assignment]
        head._probes = True
        hook = stage.submod.register_forward_pre_hook(with_gradient) if embeds else None
        try:
            outputs = super().step(*args, **keywords)
        finally:
            del stage.get_bwd_recv_ops
            head._probes = False
            if hook is not None:
                hook.remove()
        head.finish([leaf.grad for leaf in leaves[-self._n_microbatches :]] if embeds else None)
        return outputs

    def eval(self, *args: Any, **keywords: Any) -> Any:
        with torch.no_grad():
            return super().eval(*args, **keywords)
