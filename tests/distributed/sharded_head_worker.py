"""Models with a sharded head on several ranks, and the same models on one process."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

RANKS, WIDTH, STEPS = 3, 6, 3


class Scaled(nn.Embedding):
    """As Gemma's: what is looked up is multiplied."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.0


class Direct(nn.Embedding):
    """Looks its tokens up by itself."""

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.weight)


class Case(NamedTuple):
    """How a model is made and trained."""

    words: int = 11  # 4, 4 and 3 rows
    tied: bool = True
    bias: bool = False
    embedding: type[nn.Embedding] = nn.Embedding
    accumulation: int = 1
    optimizer: str = "sgd"
    foreach: bool | None = None
    norm: float = 2.0
    clip: float = 0.05
    set_to_none: bool = True
    ddp: str = "root"  # or inside of "a wrapper", "none", or an option of it
    keywords: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        changed = {k: v for k, v in self._asdict().items() if v != self._field_defaults[k]}
        return ", ".join(f"{name} {getattr(value, '__name__', value)}" for name, value in changed.items()) or "plain"


CASES = [
    Case(),
    Case(tied=False, bias=True),
    Case(words=4, bias=True),  # 2, 2 and 0 rows
    Case(words=4, norm=float("inf"), foreach=True),
    Case(embedding=Scaled, accumulation=3, set_to_none=False),
    Case(tied=False, accumulation=3, optimizer="adamw"),
    Case(bias=True, optimizer="foreach adamw", foreach=True),
    Case(optimizer="fused adamw", foreach=False, norm=1.0),
    Case(norm=float("inf"), foreach=False, ddp="a wrapper"),
    Case(accumulation=3, ddp="find_unused_parameters"),
    Case(tied=False, ddp="static_graph"),
    Case(bias=True, ddp="gradient_as_bucket_view"),
    Case(tied=False, ddp="none", bias=True, keywords=(("z_loss", 0.1), ("label_smoothing", 0.1))),
]

OPTIMIZERS: dict[str, Callable] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.5, momentum=0.9, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.01),
    "foreach adamw": lambda parameters: torch.optim.AdamW(parameters, 0.01, foreach=True),
    "fused adamw": lambda parameters: torch.optim.AdamW(parameters, 0.01, fused=True),
}


class LanguageModel(nn.Module):
    def __init__(self, case: Case = Case()):  # noqa: B008
        super().__init__()
        torch.manual_seed(0)
        self.embed = case.embedding(case.words, WIDTH, padding_idx=1)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.lm_head = nn.Linear(WIDTH, case.words, bias=case.bias)
        if case.tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.body(self.embed(ids)))


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner = model

    def forward(self, *args):
        return self.inner(*args)


def tokens(case: Case, rank: int, step: int, part: int) -> tuple[Tensor, Tensor]:
    """Ids and labels (1, n): as many as the rank's number says, sometimes none, and some ignored."""
    generator = torch.Generator().manual_seed(100 * step + 10 * part + rank)
    number = [5, 0, 9][(rank + step + part) % 3]
    ids = torch.randint(case.words, (1, number), generator=generator)
    labels = torch.randint(case.words, (1, number), generator=generator)
    return ids, labels.masked_fill(torch.rand(1, number, generator=generator) < 0.3, -100)


class Result(NamedTuple):
    losses: list[float]
    norms: list[float]
    state: dict[str, Tensor]
    optimizer: dict


def train(case: Case, model: nn.Module, ranks: list[int]) -> Result:
    """Some steps on the tokens of ``ranks``: of one rank of several, or of all on one process."""
    losses, norms = [], []
    alone = len(ranks) > 1
    optimizer = OPTIMIZERS[case.optimizer](model.parameters())
    engine = model
    if not alone and case.ddp != "none":
        options = {case.ddp: True} if case.ddp not in ("root", "a wrapper") else {}
        engine = nn.parallel.DistributedDataParallel(Wrapper(model) if case.ddp == "a wrapper" else model, **options)
    for step in range(STEPS):
        window = [[tokens(case, rank, step, part) for rank in range(RANKS)] for part in range(case.accumulation)]
        total = sum(int((labels != -100).sum()) for parts in window for _, labels in parts)
        optimizer.zero_grad(set_to_none=case.set_to_none)
        loss_sum = 0.0
        for part, parts in enumerate(window):
            last = part == case.accumulation - 1
            for rank in ranks:
                ids, labels = parts[rank]
                with contextlib.nullcontext() if last or engine is model else engine.no_sync():
                    loss = loss_of(case, engine(ids).flatten(0, 1), labels.flatten(), alone) / total
                    (loss if alone else loss * RANKS).backward()
                loss_sum += loss.item()
        if not alone and engine is model:
            average_others(model)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), case.clip, case.norm, foreach=case.foreach).item())
        optimizer.step()
        losses.append(loss_sum)
    return Result(losses, norms, model.state_dict(), optimizer.state_dict())


def loss_of(case: Case, logits: Tensor, labels: Tensor, alone: bool) -> Tensor:
    keywords = dict(case.keywords)
    if not alone:
        return F.cross_entropy(logits, labels, reduction="sum")  # the head adds the keywords
    loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=keywords.get("label_smoothing", 0.0))
    return loss + keywords.get("z_loss", 0.0) * logits[labels != -100].logsumexp(-1).square().sum()


def average_others(model: nn.Module) -> None:
    """What DDP does."""
    for name, parameter in model.named_parameters():
        if name not in set(model._ddp_params_and_buffers_to_ignore):
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)
            parameter.grad /= RANKS


def train_case(case: Case, rank: int) -> Result:
    from chunked_ce import LMHead

    return train(case, LMHead.shard(LanguageModel(case), **dict(case.keywords)), [rank])


def attempt(function: Callable, *args) -> object:
    """The result, or the error as text: a case that fails on all ranks must not take the others along."""
    try:
        return function(*args)
    except Exception:
        return traceback.format_exc()


def worker(rank: int, world_size: int) -> dict:
    from tests.distributed.sharded_head_checks import CHECKS
    from tests.distributed.sharded_head_refusals import REFUSALS

    trained = {case: attempt(train_case, case, rank) for case in CASES}
    return trained | {name: attempt(check, rank) for name, check in (CHECKS | REFUSALS).items()}


def train_compiled(rank: int, world_size: int) -> tuple[float, Tensor]:
    from chunked_ce import LMHead

    model = LMHead.shard(LanguageModel())
    ids, labels = tokens(Case(), rank, 0, 0)
    loss = F.cross_entropy(torch.compile(model, backend="eager")(ids)[0], labels[0], reduction="sum")
    loss.backward()
    return loss.item(), model.body[0].weight.grad
