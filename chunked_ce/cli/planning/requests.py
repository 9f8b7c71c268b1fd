"""From the arguments of ``chunked-ce plan`` to runs. A contradiction is a ``ValueError`` that says what is allowed."""

from __future__ import annotations

import argparse
import dataclasses
import math

from chunked_ce.cli.heads import head_of
from chunked_ce.cli.model_shapes import MODELS, ModelShape
from chunked_ce.cli.planning.run import Engine, Run, Trainer

__all__ = ["model_of", "runs_of"]

_TOKENS = 8192
_HEAD_DIM = 128
_SIZES = ("hidden", "vocab", "layers", "heads", "kv_heads", "intermediate")
_OF_LAYERS = ("heads", "kv_heads", "intermediate", "tied")  # arguments that need layers


def model_of(arguments: argparse.Namespace) -> ModelShape:
    """The model, whose name says which of its sizes are others than its source's."""
    given = {name: value for name in _SIZES if (value := getattr(arguments, name)) is not None}
    given |= {"tied": True} if arguments.tied else {}
    known = head_of(arguments)
    if known is None:
        return _model_of_sizes(given)
    name = arguments.model or known.name
    if not known.layers and "layers" not in given:
        _refuse_without_layers(given)
    if "heads" in given and "kv_heads" not in given:
        given["kv_heads"] = given["heads"]
    if given:
        name += " with " + ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in given.items())
    return dataclasses.replace(_with_defaults(known, given), name=name, source=name if given else known.source)


def _model_of_sizes(given: dict[str, int]) -> ModelShape:
    if "hidden" not in given or "vocab" not in given:
        raise ValueError("the head is unknown: give --hidden and --vocab, or --model, or --config")
    if "layers" not in given:
        _refuse_without_layers(given)
    return _with_defaults(ModelShape("a model of these sizes", "as given", given["hidden"], given["vocab"]), given)


def _refuse_without_layers(given: dict[str, int]) -> None:
    for name in _OF_LAYERS:
        if name in given:
            raise ValueError(
                f"--{name.replace('_', '-')} needs --layers: without, the plan is of the head and its loss"
            )


def _with_defaults(known: ModelShape, given: dict[str, int]) -> ModelShape:
    """``known`` with the given sizes, and the usual ones where layers are new to it."""
    model = dataclasses.replace(known, **given)  # type: ignore[arg-type]
    if not model.layers:
        return model
    heads = model.heads or max(1, model.hidden // _HEAD_DIM)
    if heads % (model.kv_heads or heads):
        raise ValueError(f"--kv-heads must divide the {heads} attention heads, was {model.kv_heads}")
    return dataclasses.replace(
        model,
        heads=heads,
        kv_heads=model.kv_heads or heads,
        head_dim=model.head_dim or math.ceil(model.hidden / heads),
        intermediate=model.intermediate or 7 * model.hidden // 2,
    )


def runs_of(arguments: argparse.Namespace) -> list[Run]:
    """One run for each tensor-parallel size that was asked for."""
    model = model_of(arguments)
    trainer = _trainer(arguments)
    _check_teacher(arguments, model)
    tokens, batch = _tokens(arguments)
    if not model.layers:
        for name, value in (("lora", 0), ("checkpointing", "none")):
            if getattr(arguments, name) != value:
                raise ValueError(f"--{name} needs a model with layers: give --model, --config or --layers")
    return [_run(arguments, model, trainer, tokens, batch, tensor) for tensor in arguments.tp or [1]]


def _run(
    arguments: argparse.Namespace, model: ModelShape, trainer: Trainer, tokens: int, batch: int, tensor: int
) -> Run:
    data = _data(arguments, tensor)
    other = arguments.teacher_model or arguments.reference_model
    return Run(
        model=model,
        tokens=tokens,
        batch=batch,
        trainer=trainer,
        dtype=arguments.dtype,
        precision=arguments.precision,
        optimizer=arguments.optimizer,
        engine=_engine(arguments, data * arguments.sp),
        checkpointing=arguments.checkpointing,
        lora=arguments.lora,
        data=data,
        tensor=tensor,
        pipeline=arguments.pp,
        sequence=arguments.sp,
        accumulation=arguments.accumulation,
        other_model=MODELS[other] if other else None,
        teacher_hidden=arguments.teacher_hidden,
        device=arguments.device,
        train_input=not arguments.frozen_input,
        train_head=not arguments.frozen_head,
        ignored=arguments.ignored,
        chunk=arguments.chunk,
        ids=arguments.ids,
        adapter=arguments.adapter,
        other=arguments.other,
    )


def _trainer(arguments: argparse.Namespace) -> Trainer:
    has_teacher = arguments.teacher_model or arguments.teacher_hidden
    trainer: Trainer = arguments.trainer or ("distill" if has_teacher else "sft")
    if has_teacher and trainer != "distill":
        name = "--teacher-model" if arguments.teacher_model else "--teacher-hidden"
        raise ValueError(f"{name} is for --trainer distill, was {trainer}")
    if arguments.teacher_model and arguments.teacher_hidden:
        raise ValueError("--teacher-model and --teacher-hidden both give a teacher: use one of them")
    if arguments.reference_model and (trainer not in ("dpo", "grpo") or arguments.lora):
        reason = "with --lora the reference is the model without adapters" if arguments.lora else f"was {trainer}"
        raise ValueError(f"--reference-model is for --trainer dpo or grpo that train all weights: {reason}")
    return trainer


def _check_teacher(arguments: argparse.Namespace, model: ModelShape) -> None:
    """A divergence is between distributions over the same words."""
    if not arguments.teacher_model:
        return
    words = MODELS[arguments.teacher_model].vocab
    if words < model.vocab or (words > model.vocab and arguments.vocab is None):
        instead = "" if words < model.vocab else f"; if its words are among these, say so with --vocab {model.vocab}"
        raise ValueError(
            f"--teacher-model must have the {model.vocab} vocabulary entries of the model, "
            f"{arguments.teacher_model} has {words}{instead}"
        )


def _tokens(arguments: argparse.Namespace) -> tuple[int, int]:
    """Tokens and sequences of a micro-batch."""
    tokens, length, batch = arguments.tokens, arguments.sequence_length, arguments.batch
    if length is None:
        tokens, batch = tokens or _TOKENS, batch or 1
        if tokens % batch:
            raise ValueError(f"--batch must divide the {tokens} --tokens, was {batch}")
        return tokens, batch
    if tokens is None:
        batch = batch or 1
        return length * batch, batch
    if tokens != length * (batch or max(1, tokens // length)):
        asked = f" * --batch ({batch})" if batch else ""
        raise ValueError(f"--tokens must be a multiple of --sequence-length ({length}){asked}, was {tokens}")
    return tokens, batch or tokens // length


def _data(arguments: argparse.Namespace, tensor: int) -> int:
    """Data-parallel ranks: as asked, or as many as the others leave of all."""
    others = tensor * arguments.pp * arguments.sp
    said = f"--tp ({tensor}) * --pp ({arguments.pp}) * --sp ({arguments.sp})"
    if arguments.gpus is None:
        return arguments.dp or 1
    if arguments.dp is None:
        if arguments.gpus % others:
            raise ValueError(f"--gpus must be a multiple of {said} = {others}, was {arguments.gpus}")
        return int(arguments.gpus // others)
    if arguments.gpus != arguments.dp * others:
        total = arguments.dp * others
        raise ValueError(f"--gpus must be --dp ({arguments.dp}) * {said} = {total}, was {arguments.gpus}")
    return int(arguments.dp)


def _engine(arguments: argparse.Namespace, replicas: int) -> Engine:
    usual: Engine = "ddp" if replicas > 1 else "none"
    stages: dict[int | None, Engine] = {None: usual, 0: usual, 1: "zero1", 2: "zero2", 3: "zero3"}
    of_zero = stages[arguments.zero]
    engine: Engine = arguments.engine or of_zero
    if arguments.zero is not None and engine != of_zero:
        raise ValueError(f"--engine {engine} and --zero {arguments.zero} contradict each other: use one of them")
    if replicas == 1 and engine not in ("none", "ddp"):
        asked = f"--engine {engine}" if arguments.engine else f"--zero {arguments.zero}"
        raise ValueError(f"{asked} divides states among data-parallel ranks, of which there is 1: give --gpus")
    return engine
