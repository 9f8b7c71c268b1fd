"""Models with a sharded head under FSDP2 and HSDP on several ranks, and the same models on one process."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from chunked_ce import ChunkOptions, LMHead, linear_loss
from chunked_ce.objectives import PolicyGradient
from tests.distributed.sharded_head_worker import attempt

WIDTH = 6
OPTIONS = ChunkOptions(chunk_size=4)


class Case(NamedTuple):
    """How a model is made and trained."""

    mesh: str = "fsdp"  # or "hsdp"
    words: int = 11  # uneven on 2 and 4 ranks
    tied: bool = True
    accumulation: int = 1
    empty: bool = False  # whether some ranks have no tokens
    loss: str = "labels"  # of the model's own code, or "policy gradient"
    setting: str = ""
    steps: int = 2
    clip: float = 0.05

    def __str__(self) -> str:
        changed = {name: value for name, value in self._asdict().items() if value != self._field_defaults[name]}
        return ", ".join(f"{name} {value}" for name, value in changed.items()) or "plain"


def grid(mesh: str) -> list[Case]:
    choices = itertools.product([True, False], [1, 3], [False, True], ["labels", "policy gradient"])
    return [Case(mesh, 11, *choice, steps=1) for choice in choices]


SETTINGS = [
    *(Case(setting=setting, steps=1) for setting in ("ignored", "offload", "reshard", "no reshard", "default mesh")),
    *(Case(setting=setting, accumulation=3) for setting in ("sync once", "every part")),
    Case(setting="divided"),
    Case(setting="head first", tied=False),
    Case(setting="root only"),
]
FEW_WORDS = [Case(words=5, tied=tied) for tied in (True, False)]  # 2, 2, 1 and 0 rows on 4 ranks
CASES = {2: grid("fsdp") + SETTINGS, 4: grid("hsdp") + FEW_WORDS + [Case("hsdp", setting="divided")]}
LOW_PRECISION = {2: [Case(setting="bf16"), Case(setting="bf16", tied=False)], 4: [Case("hsdp", setting="bf16")]}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(self.linear(hidden))


class LanguageModel(nn.Module):
    def __init__(self, case: Case = Case()):  # noqa: B008
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(case.words, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, case.words, bias=not case.tied)
        if case.tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor, labels: Tensor, advantage: Tensor | None = None) -> Tensor:
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = block(hidden)
        hidden = self.norm(hidden)
        head = self.lm_head
        if advantage is not None:
            objective = PolicyGradient(kind="reinforce", entropy=0.1)
            keywords = {"vocab": getattr(head, "vocab", None), "linear_bias": head.bias, "options": OPTIONS}
            return linear_loss(objective, hidden, head.weight, labels, reduction="sum", advantage=advantage, **keywords)
        logits = head(hidden)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1), reduction="sum")


def tokens(case: Case, rank: int, step: int, part: int) -> tuple[Tensor, ...]:
    """Ids, labels and advantages (1, n), some of which are ignored; every rank has another number of them."""
    generator = torch.Generator().manual_seed(100 * step + 10 * part + rank)
    number = ([5, 0, 9, 0] if case.empty else [5, 2, 9, 3])[(rank + step + part) % 4]
    ids, labels = torch.randint(case.words, (2, 1, number), generator=generator)
    labels = labels.masked_fill(torch.rand(1, number, generator=generator) < 0.3, -100)
    advantage = torch.randn(1, number, generator=generator)
    return (ids, labels) if case.loss == "labels" else (ids, labels, advantage)


class Result(NamedTuple):
    losses: list[float]
    norms: list[float]
    parameters: dict[str, Tensor]


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(case: Case, model: nn.Module, ranks: list[int], number: int) -> Result:
    """Some steps on the tokens of ``ranks``: of one of ``number`` ranks, or of all on one process."""
    losses, norms = [], []
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    for step in range(case.steps):
        window = [[tokens(case, rank, step, part) for rank in range(number)] for part in range(case.accumulation)]
        total = sum(int((labels != -100).sum()) for parts in window for _, labels, *_ in parts)
        optimizer.zero_grad()
        loss_sum = 0.0
        for part, parts in enumerate(window):
            if isinstance(model, FSDPModule) and case.setting in ("sync once", "every part"):
                is_last = part == case.accumulation - 1
                model.set_is_last_backward(is_last)
                model.set_requires_gradient_sync(is_last or case.setting == "every part")
            for rank in ranks:
                loss = model(*parts[rank]) / total
                loss_sum += loss.item()
                scale = 1 if len(ranks) == number or case.setting == "divided" else number
                (loss * scale).backward()
        norms.append(whole(nn.utils.clip_grad_norm_(model.parameters(), case.clip)).item())
        optimizer.step()
        losses.append(loss_sum)
    return Result(losses, norms, {name: whole(value) for name, value in model.state_dict().items()})


# ---- on the ranks ----


def mesh_of(case: Case, world_size: int) -> DeviceMesh:
    if case.mesh == "hsdp":
        return init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh("cpu", (world_size,))


def sharded(case: Case, mesh: DeviceMesh, model: nn.Module | None = None) -> nn.Module:
    """The model with a sharded head under FSDP2."""
    model = LMHead.shard(LanguageModel(case) if model is None else model, mesh, options=OPTIONS)
    return under_fsdp(case, mesh, model)


def under_fsdp(case: Case, mesh: DeviceMesh, model: nn.Module) -> nn.Module:
    keywords = {} if case.setting == "default mesh" else {"mesh": mesh}
    if case.setting == "bf16":
        keywords["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if case.setting == "offload":
        keywords["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if case.setting in ("reshard", "no reshard"):
        keywords["reshard_after_forward"] = case.setting == "reshard"
    if case.setting != "root only":
        for block in model.blocks:
            fully_shard(block, **keywords)
    if case.setting == "ignored":
        keywords["ignored_params"] = set(model.lm_head.parameters())
    fully_shard(model, **keywords)
    if case.setting == "divided":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # the one that gloo has
    return model


def train_case(case: Case, rank: int, world_size: int) -> Result:
    model = sharded(case, mesh_of(case, world_size))
    if case.setting == "head first":  # before the model, whose root FSDP2 has not found yet
        hidden = torch.ones(rank, WIDTH)
        F.cross_entropy(model.lm_head(hidden), torch.zeros(rank, dtype=torch.long), reduction="sum").backward()
        model.zero_grad()
    return train(case, model, [rank], world_size)


def gradients(case: Case, model: nn.Module, rank: int, world_size: int) -> dict[str, Tensor]:
    """Of one step with one micro-batch."""
    batch = tokens(case, rank, 0, 0)
    total = sum(int((tokens(case, other, 0, 0)[1] != -100).sum()) for other in range(world_size))
    (model(*batch) * (world_size / total)).backward()
    return {name: whole(parameter.grad) for name, parameter in model.named_parameters()}


def low_precision(case: Case, rank: int, world_size: int) -> tuple[dict[str, Tensor], ...]:
    """Gradients with a sharded head, and without `LMHead`."""
    mesh = mesh_of(case, world_size)
    models = sharded(case, mesh), under_fsdp(case, mesh, LanguageModel(case))
    return tuple(gradients(case, model, rank, world_size) for model in models)


def worker(rank: int, world_size: int, folder: str) -> dict:
    from tests.distributed.sharded_head_fsdp_checks import CHECKS

    found: dict = {case: attempt(train_case, case, rank, world_size) for case in CASES[world_size]}
    found |= {case: attempt(low_precision, case, rank, world_size) for case in LOW_PRECISION[world_size]}
    checks: dict[str, Callable] = CHECKS[world_size]
    return found | {name: attempt(check, rank, folder) for name, check in checks.items()}
