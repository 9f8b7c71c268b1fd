"""A head spread over the stages of a DeepSpeed pipeline.

DeepSpeed (0.19.8) runs a pipeline by a schedule of instructions, 1F1B by default. The schedule here runs all forward
passes, then the losses that all stages compute together, then all backward passes: see `chunked_ce.pipeline`.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from chunked_ce.pipeline import DeferredLoss, SpreadHead

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.pipe.schedule import PipeInstruction

__all__ = ["spread"]


def spread(engine: PipelineEngine, head: SpreadHead) -> None:
    """Makes ``engine.train_batch`` and ``engine.eval_batch`` compute the losses of a `SpreadHead`.

        module = PipelineModule(layers, num_stages=stages)        # the last layer returns hidden states; no loss_fn
        shard = VocabShard.split(vocab_size, module.mpu().get_pipe_parallel_group())
        module.head = SpreadHead(whole[shard.start : shard.stop], shard, mean=mean)
        engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)
        spread(engine, module.head)

    The engine averages over replicas of the pipeline, so the divisor of ``mean`` is their number. Both methods return
    the mean loss. With a tied head, the first layer gets embedded tokens (..., D) instead of tokens.

    Args:
        engine: of a `PipelineModule`, without ZeRO or with stage 1, in fp32 or bf16.
        head: of this stage, a submodule of the engine's module.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is allowed.
    """
    _check(engine, head)
    _take_over(engine, _Step(engine, head))


def _take_over(engine: Any, step: _Step) -> None:
    """Put the schedules of `_Schedule` in the place of the engine's."""
    engine.module.loss_fn = step.head.defer
    engine._INSTRUCTION_MAP = engine._INSTRUCTION_MAP | {_Instruction: lambda _engine, call: call()}
    engine._train_schedule = lambda: _Schedule(step, engine.micro_batches, trains=True)
    engine._inference_schedule = lambda micro_batches: _Schedule(step, micro_batches, trains=False)


class _Instruction:
    """Calls a function between the engine's own instructions."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.kwargs = {"call": call}


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """All forward passes, the losses, all backward passes."""

    step: _Step
    micro_batches: int
    trains: bool

    def num_pipe_buffers(self) -> int:
        return self.micro_batches

    def __iter__(self) -> Iterator[list[PipeInstruction | _Instruction]]:
        from deepspeed.runtime.pipe import schedule

        step, first, last = self.step, self.step.head.is_first, self.step.head.is_last
        buffers = range(self.micro_batches)
        if first or last:
            yield [schedule.LoadMicroBatch(at) for at in buffers]
        yield [_Instruction(lambda: step.embed(self.micro_batches))]
        for at in buffers:
            received = [] if first else [schedule.RecvActivation(at)]
            yield [*received, schedule.ForwardPass(at), *([] if last else [schedule.SendActivation(at)])]
        yield [_Instruction(lambda: step.meet(self.micro_batches))]
        if not self.trains:
            return
        for at in buffers:
            choice = _Instruction(functools.partial(step.choose, at))
            yield [
                choice if last else schedule.RecvGrad(at),
                schedule.BackwardPass(at),
                *([] if first else [schedule.SendGrad(at)]),
            ]
        yield [_Instruction(step.finish)]
        yield [schedule.ReduceTiedGrads(), schedule.ReduceGrads(), schedule.OptimizerStep()]


class _Step:
    """What a step does beside the engine's own instructions."""

    def __init__(self, engine: Any, head: SpreadHead) -> None:
        self.engine, self.head = engine, head
        self._deferred: list[DeferredLoss] = []
        self._embedded: list[Tensor] = []

    def embed(self, micro_batches: int) -> None:
        """If tied, embedded tokens take the place of tokens."""
        if self.head.tied:
            inputs = self.engine.pipe_buffers["inputs"]
            self._embedded = self.head.embed(inputs[:micro_batches] if self.head.is_first else None)
            for at, embedded in enumerate(self._embedded):
                inputs[at] = embedded.requires_grad_()

    def meet(self, micro_batches: int) -> None:
        self._deferred = self.head.meet(micro_batches, scale=micro_batches)  # the engine divides losses by it
        if self._deferred:
            self.engine.total_loss = sum(one.loss.detach() for one in self._deferred)

    def choose(self, micro_batch: int) -> None:
        """On the last stage: the loss that the engine's next backward pass starts from."""
        self.engine.loss = self._deferred[micro_batch].loss

    def finish(self) -> None:
        engine, optimizer = self.engine, self.engine.optimizer
        if engine.using_bf16_optimizer:  # it adds gradients to sums in fp32, and does so after each backward pass
            optimizer.clear_lp_grads()
        self.head.finish([embedded.grad for embedded in self._embedded])
        if engine.using_bf16_optimizer:
            optimizer.update_hp_grads(clear_lp_grads=False)
        self._deferred, self._embedded = [], []


def _check(engine: Any, head: object) -> None:
    # Whoever has an engine has imported its module: no need to import it here.
    module = sys.modules.get("deepspeed.runtime.pipe.engine")
    if module is None or not isinstance(engine, module.PipelineEngine):
        raise TypeError(
            f"engine must be what deepspeed.initialize made of a PipelineModule, was {type(engine).__name__}"
        )
    if not isinstance(head, SpreadHead):
        raise TypeError(f"head must be a SpreadHead, was {type(head).__name__}")
    if not any(parameter is head.weight for parameter in engine.module.parameters()):
        raise ValueError("head must be a submodule of the PipelineModule, set before deepspeed.initialize")
    stage = (engine.is_first_stage(), engine.is_last_stage())
    if (head.is_first, head.is_last) != stage or head.shard.size != engine.num_stages:
        ranks = f"shard of ranks {list(head.shard.ranks)}"
        raise ValueError(
            f"head must be spread over the {engine.num_stages} stages of the engine's pipeline, had a {ranks}"
        )
    if engine.module.loss_fn is not None:
        raise ValueError(
            "engine has a loss_fn in its PipelineModule, but a spread head computes the loss: leave it out"
        )
    if engine.is_model_parallel:
        raise ValueError("engine has tensor-parallel ranks, which a spread head does not support")
    for setting, is_set in _refused_settings(engine).items():
        if is_set:
            raise ValueError(f"engine has {setting}, under which gradients of a spread head's rows would be lost")


def _refused_settings(engine: Any) -> dict[str, bool]:
    """Settings that read gradients in hooks of the backward passes only, or that scale losses."""
    optimizer = engine.optimizer
    return {
        "fp16": engine.fp16_enabled(),
        "bf16.immediate_grad_update": getattr(optimizer, "immediate_grad_update", False),
        "zero_optimization.overlap_comm": engine.zero_optimization() and bool(engine.zero_overlap_comm()),
        "a grad_accum_dtype other than the parameters' dtype": getattr(optimizer, "use_grad_accum_attribute", False),
    }
