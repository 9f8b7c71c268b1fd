"""`Run`: a training step to plan for."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

from chunked_ce.cli.model_shapes import ModelShape
from chunked_ce.light import torch

__all__ = ["DTYPES", "Checkpointing", "Engine", "Local", "Optimizer", "Path", "Precision", "Run", "Stage", "Trainer"]

Trainer = Literal["plain", "sft", "dpo", "grpo", "distill"]
Optimizer = Literal["adamw", "adamw-8bit", "adafactor", "muon", "sgd", "none"]
Engine = Literal["none", "ddp", "zero1", "zero2", "zero3", "fsdp"]
Precision = Literal["mixed", "autocast", "pure"]
Checkpointing = Literal["none", "selective", "full"]
Path = Literal["full", "compiled", "forward", "backward", "filtered", "sharded"]
Stage = Literal["only", "first", "last"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ZERO: dict[str, int] = {"zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3}


class Local(NamedTuple):
    """Parameters of a rank before an engine partitions them over data-parallel ranks."""

    layers: int
    embedding: int
    head: int  # 0 where the embedding is the head, too


@dataclasses.dataclass(frozen=True)
class Run:
    """A training step: model, tokens, training and ranks. ``ValueError`` for what contradicts itself.

    >>> from chunked_ce.cli.model_shapes import MODELS
    >>> run = Run(MODELS["llama-3-8b"], tokens=8192, data=8, engine="zero3")
    >>> run.ranks, run.trained, run.local_tokens
    (8, 8030261248, 8192)
    """

    model: ModelShape
    tokens: int  # N of a micro-batch, over all sequence-parallel ranks; of one side of pairs
    batch: int = 1  # sequences, or pairs, among which the tokens are divided
    trainer: Trainer = "sft"
    dtype: str = "bf16"
    precision: Precision = "mixed"
    optimizer: Optimizer = "adamw"
    engine: Engine = "none"
    checkpointing: Checkpointing = "none"
    lora: int = 0  # rank
    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    sequence: int = 1
    accumulation: int = 1
    other_model: ModelShape | None = None  # teacher, or the reference model if it is not the trained one
    teacher_hidden: int | None = None  # of a teacher on other ranks
    device: str = "cuda"
    train_input: bool = True
    train_head: bool = True
    ignored: float = 0.0  # share of tokens that do not count
    chunk: int | None = None
    ids: int = 0
    adapter: int = 0
    other: int = 0  # bytes of something else

    def __post_init__(self) -> None:
        self._check_ranks()
        if self.lora and not self.model.layers:
            raise ValueError("--lora needs a model with layers: give --model, --config or --layers")
        if not self.train_head and not self.train_input:
            raise ValueError("--frozen-head and --frozen-input leave no gradient to plan for: use at most one of them")
        if self.lora and not self.train_input:
            raise ValueError("--lora trains what is below the head, which --frozen-input freezes: use one of them")
        if self.pipeline > max(1, self.model.layers):
            raise ValueError(f"--pp must be at most the {self.model.layers} layers of the model, was {self.pipeline}")
        if self.trainer == "distill" and not self.teacher_width:
            raise ValueError(
                "--trainer distill needs a teacher: --teacher-model, or --teacher-hidden if it is elsewhere"
            )
        if self.trainer != "distill" and self.teacher_hidden and self.other_model is None and self.trainer != "plain":
            raise ValueError(f"--teacher-hidden is of a teacher, which --trainer {self.trainer} has not: use distill")

    def _check_ranks(self) -> None:
        tensor, heads = self.tensor, self.model.heads
        if heads and heads % tensor:
            allowed = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
            raise ValueError(f"--tp must divide the {heads} attention heads: {allowed}; was {tensor}")
        if tensor > self.model.vocab:
            raise ValueError(f"--tp must be at most the {self.model.vocab} rows of the head, was {tensor}")
        if self.engine == "none" and self.replicas > 1:
            raise ValueError(f"--engine none is for one data-parallel rank, not {self.replicas}: ddp, zero1-3 or fsdp")

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def zero(self) -> int:
        """The ZeRO stage that says which states are partitioned."""
        return _ZERO.get(self.engine, 0)

    @property
    def replicas(self) -> int:
        """Ranks with the same parameters and different tokens."""
        return self.data * self.sequence

    @property
    def ranks(self) -> int:
        return self.replicas * self.tensor * self.pipeline

    @property
    def forward_tokens(self) -> int:
        """Tokens that the model sees in a micro-batch: two sequences of each pair."""
        return self.tokens * (2 if self.trainer == "dpo" else 1)

    @property
    def local_tokens(self) -> int:
        """Those of a rank."""
        return math.ceil(self.forward_tokens / self.sequence)

    @property
    def teacher_width(self) -> int | None:
        """Hidden size of the teacher, None without one."""
        if self.trainer == "distill" and self.other_model is not None:
            return self.other_model.hidden
        return self.teacher_hidden

    @property
    def frozen_model(self) -> ModelShape | None:
        """A teacher or a reference model whose weights a rank holds besides: with LoRA, the reference model is the
        trained one without its adapters."""
        if self.trainer in ("dpo", "grpo") and not self.lora and self.model.layers:
            return self.other_model or self.model
        return self.other_model if self.trainer == "distill" else None

    @property
    def trains_head(self) -> bool:
        return self.train_head and not self.lora

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Pipeline stages among which the fullest is."""
        return ("only",) if self.pipeline == 1 else ("first", "last")

    @property
    def trained(self) -> int:
        """Parameters of the model that are trained."""
        return self.trained_of(self.local_of(self.model, whole=True))

    def local_of(self, model: ModelShape, stage: Stage = "only", *, whole: bool = False) -> Local:
        """A rank's part of the parameters; norms, which tensor-parallel ranks hold whole, are divided as well."""
        tensor = 1 if whole else self.tensor
        share = model.layers_parameters
        if stage != "only":
            share = math.ceil(share * math.ceil(model.layers / self.pipeline) / model.layers)
        embedding = model.embedding_parameters if stage != "last" else 0
        has_head = stage == "last" or (stage == "only" and not (model.tied and model.layers))
        return Local(*(math.ceil(n / tensor) for n in (share, embedding, model.head_parameters * has_head)))

    def trained_of(self, local: Local) -> int:
        """The trained parameters among those of a rank, or its share of LoRA's."""
        if self.lora:
            return math.ceil(self.adapter_parameters * local.layers / max(1, self.model.layers_parameters))
        tied = self.model.tied and not local.head
        body = local.layers + (0 if tied else local.embedding)
        head = local.embedding if tied else local.head
        return self.train_input * body + self.train_head * head

    @property
    def adapter_parameters(self) -> int:
        """LoRA's: rank times the sum of both sizes of every matrix of the layers."""
        return self.lora * self.matrix_sizes

    @property
    def matrix_sizes(self) -> int:
        """The sum of both sizes of all matrices in the layers."""
        model = self.model
        d, width, shared = model.hidden, model.heads * model.head_dim, model.kv_heads * model.head_dim
        attention = 2 * (d + width) + 2 * (d + shared)
        matrices = 3 if model.gated else 2
        mixtures = model.layers - model.dense_layers if model.experts else 0
        of_experts = model.experts * 3 * (d + model.expert_intermediate)
        of_experts += 3 * (d + model.shared_intermediate) if model.shared_intermediate else 0
        mlps = (model.layers - mixtures) * matrices * (d + model.intermediate) + mixtures * of_experts
        return model.layers * attention + mlps
