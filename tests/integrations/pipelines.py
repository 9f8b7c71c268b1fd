"""What the ranks of `test_pipelines.py` run: one optimizer step of a small language model in a pipeline.

The optimizer is SGD, whose step is the learning rate times the gradient, so that a gradient that is too large by some
factor shows.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from chunked_ce import TokenMean, VocabShard, linear_cross_entropy
from chunked_ce.integrations.deepspeed import token_mean
from chunked_ce.integrations.deepspeed_pipeline import spread
from chunked_ce.pipeline import SpreadGPipe, SpreadHead
from tests.integrations.test_deepspeed import attempt, end, masters, quiet_deepspeed

VOCAB, WIDTH, DEPTH, BATCH, LENGTH = 61, 16, 4, 2, 7
LEARNING_RATE = 100.0
COUNTED = [[13, 5, 0, 2], [1, 9, 14, 0]]  # tokens by replica of the pipeline and micro-batch
MICRO_BATCHES = len(COUNTED[0])
RANKS = 4

State = dict[str, Tensor]


class Case(NamedTuple):
    engine: str  # GPipe or 1F1B of torch, or DeepSpeed
    head: str  # whole or spread
    tied: bool
    stages: int = 2
    zero: int = 0
    dtype: str = "fp32"

    def __str__(self):
        return (
            f"{self.engine}-{self.head}-{'tied' if self.tied else 'untied'}-{self.stages}-zero{self.zero}-{self.dtype}"
        )


TORCH = [
    *(Case(engine, "whole", tied) for engine in ("GPipe", "1F1B") for tied in (False, True)),
    *(Case("GPipe", "spread", tied, stages) for tied in (False, True) for stages in (2, 4)),
]
DEEPSPEED = [
    *(
        Case("DeepSpeed", head, tied, zero=zero)
        for head in ("whole", "spread")
        for tied in (False, True)
        for zero in (0, 1)
    ),
    *(Case("DeepSpeed", "spread", tied, zero=1, dtype="bf16") for tied in (False, True)),
]


def initial(tied: bool) -> State:
    torch.manual_seed(0)
    state = {"embedding": torch.randn(VOCAB, WIDTH)}
    state |= {f"body{at}": torch.randn(WIDTH, WIDTH) / WIDTH**0.5 for at in range(DEPTH)}
    return state if tied else state | {"head": torch.randn(VOCAB, WIDTH) / WIDTH**0.5}


def window(replica: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets of a replica's micro-batches, both (MICRO_BATCHES * BATCH, LENGTH)."""
    generator = torch.Generator().manual_seed(replica)
    tokens, targets = torch.randint(VOCAB, (2, MICRO_BATCHES, BATCH * LENGTH), generator=generator)
    for target, counted in zip(targets, COUNTED[replica], strict=True):
        target[torch.randperm(BATCH * LENGTH, generator=generator)[counted:]] = -100
    return tokens.view(-1, LENGTH), targets.view(-1, LENGTH)


def one_process(tied: bool, replicas: int, dtype: torch.dtype = torch.float32) -> tuple[State, State, float]:
    """The parameters, the step of each, and the mean loss, in float64 from initial values in ``dtype``."""
    state = {name: value.to(dtype).double().requires_grad_() for name, value in initial(tied).items()}
    tokens, targets = (torch.cat(parts) for parts in zip(*map(window, range(replicas)), strict=True))
    hidden = F.embedding(tokens, state["embedding"])
    for at in range(DEPTH):
        hidden = torch.tanh(F.linear(hidden, state[f"body{at}"]))
    logits = F.linear(hidden, state["embedding" if tied else "head"])
    loss = F.cross_entropy(logits.view(-1, VOCAB), targets.view(-1))
    loss.backward()
    steps = {name: -LEARNING_RATE * value.grad for name, value in state.items()}
    return {name: value.detach() for name, value in state.items()}, steps, loss.item()


class Embedding(nn.Embedding):
    def __init__(self, weight: Tensor):
        super().__init__(*weight.shape, _weight=weight.clone())


class Body(nn.Module):
    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.tanh(F.linear(hidden, self.weight))


class WithHead(nn.Module):
    """Hands the weight of the head to the loss."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, self.weight


def torch_step(case: Case) -> tuple[State, float]:
    mesh = init_device_mesh("cpu", (RANKS // case.stages, case.stages), mesh_dim_names=("data", "pipe"))
    group, data = mesh.get_group("pipe"), mesh.get_group("data")
    at, replica = mesh.get_local_rank("pipe"), mesh.get_local_rank("data")
    first, last, replicas = at == 0, at == case.stages - 1, RANKS // case.stages
    tokens, targets = window(replica)
    state = initial(case.tied)
    of_stage = DEPTH // case.stages
    layers = {f"body{layer}": Body(state[f"body{layer}"]) for layer in range(at * of_stage, (at + 1) * of_stage)}
    module = nn.Sequential(*layers.values())
    parameters = {name: layer.weight for name, layer in layers.items()}
    if first and not (case.head == "spread" and case.tied):
        module.insert(0, Embedding(state["embedding"]))
        parameters["embedding"] = module[0].weight
    stage = PipelineStage(module, at, case.stages, torch.device("cpu"), group=group)
    name = "embedding" if case.tied else "head"

    if case.head == "spread":
        shard = VocabShard.split(VOCAB, group)
        mean = partial(TokenMean.over, group=data)
        head = SpreadHead(state[name][shard.start : shard.stop], shard, mean=mean, tied=case.tied)
        schedule = SpreadGPipe(stage, MICRO_BATCHES, head)
        parameters[f"rows of {name}"] = head.weight
    else:
        weight = nn.Parameter(state[name].clone()) if last else None
        mean = TokenMean.over(targets, group=data) if last else None
        schedule = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}[case.engine](
            stage,
            MICRO_BATCHES,
            loss_fn=lambda hidden, target: mean(linear_cross_entropy(hidden, weight, target, reduction="sum")),
            scale_grads=False,
        )
        if last:
            parameters[name] = weight

    def run(step: Callable) -> Tensor:
        losses = []
        if first:
            step(tokens)
        else:
            step(**{"target": targets, "losses": losses} if last else {})
        return sum(losses, torch.zeros(())).detach() / replicas

    loss = run(schedule.step)
    if case.tied and case.head == "whole":
        mesh_ends = [(r[0], r[-1]) for r in mesh.mesh.tolist()]
        groups = [dist.new_group(ends) for ends in mesh_ends]
        if first or last:
            dist.all_reduce(parameters["embedding"].grad, group=groups[replica])
    for parameter in parameters.values():
        dist.all_reduce(parameter.grad, group=data)
        parameter.data -= LEARNING_RATE * parameter.grad / replicas
    dist.all_reduce(loss)
    return {name: value.detach() for name, value in parameters.items()}, loss.item()


def deepspeed_step(case: Case) -> tuple[State, float]:
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    state, spreads = initial(case.tied), case.head == "spread"
    layers = [LayerSpec(Body, state[f"body{at}"]) for at in range(DEPTH)]
    if not case.tied:
        layers.insert(0, LayerSpec(Embedding, state["embedding"]))
    elif not spreads:
        tied = [TiedLayerSpec("words", Embedding, state["embedding"])]
        tied += [TiedLayerSpec("words", Embedding, state["embedding"], forward_fn=lambda module, x: (x, module.weight))]
        layers = [tied[0], *layers, tied[1]]
    if not case.tied and not spreads:
        layers.append(LayerSpec(WithHead, state["head"]))
    means = []
    module = PipelineModule(
        layers,
        num_stages=case.stages,
        partition_method="type:Body",
        loss_fn=None
        if spreads
        else lambda outputs, target: means[-1](linear_cross_entropy(*outputs, target, reduction="sum")),
    )
    grid = module.mpu()
    replica = grid.get_data_parallel_rank()
    if spreads:
        shard = VocabShard.split(VOCAB, grid.get_pipe_parallel_group())
        mean = partial(TokenMean.over, group=grid.get_data_parallel_group())
        weight = state["embedding" if case.tied else "head"][shard.start : shard.stop]
        module.spread_head = SpreadHead(weight, shard, mean=mean, tied=case.tied)
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": case.dtype == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": case.zero},
        "steps_per_print": 10**6,
    }
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
    engine = deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]
    try:
        if spreads:
            spread(engine, module.spread_head)
        tokens, targets = (part.view(MICRO_BATCHES, BATCH, LENGTH) for part in window(replica))
        means.append(None if spreads else token_mean(engine, targets))
        loss = engine.train_batch(iter(list(zip(tokens, targets, strict=True))))
        return {label(name, case): value for name, value in masters(engine).items()}, float(loss)
    finally:
        end(engine)


def label(name: str, case: Case) -> str:
    """What `initial` calls a parameter of the PipelineModule."""
    first, _, _ = name.partition(".")
    if first == "spread_head":
        return f"rows of {'embedding' if case.tied else 'head'}"
    if first == "tied_modules":
        return "embedding"
    layer = int(first) - (not (case.tied and case.head == "spread"))  # the embedding is layer 0
    return {-1: "embedding", DEPTH: "head"}.get(layer, f"body{layer}")


def torch_cases(_rank: int, _ranks: int) -> dict:
    return {case: attempt(torch_step, case) for case in TORCH}


def deepspeed_cases(_rank: int, _ranks: int) -> dict:
    import deepspeed

    quiet_deepspeed()
    deepspeed.init_distributed(dist_backend="gloo")
    return {case: attempt(deepspeed_step, case) for case in DEEPSPEED}
