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

Part = tuple[int, Tensor]  # the first row, and rows of a parameter


class Case(NamedTuple):
    engine: str  # GPipe or 1F1B of torch, or DeepSpeed
    head: str  # whole or spread
    tied: bool
    stages: int = 2
    zero: int = 0
    dtype: str = "fp32"
    sums: str = "fp32"  # the dtype in which DeepSpeed adds up the gradients of micro-batches

    def __str__(self):
        tied = "tied" if self.tied else "untied"
        settings = f"-zero{self.zero}-{self.dtype}-{self.sums}" if self.engine == "DeepSpeed" else ""
        return f"{self.engine}-{self.head}-{tied}-{self.stages}{settings}"


TORCH = [
    *(Case(engine, "whole", tied) for engine in ("GPipe", "1F1B") for tied in (False, True)),
    *(Case("GPipe", "spread", tied, stages) for tied in (False, True) for stages in (2, 4)),
]
DEEPSPEED = [
    *(Case("DeepSpeed", head, tied, zero=int(tied)) for head in ("whole", "spread") for tied in (False, True)),
    *(Case("DeepSpeed", head, True, zero=1, dtype="bf16") for head in ("whole", "spread")),
    Case("DeepSpeed", "spread", False, zero=1, dtype="bf16", sums="bf16"),
]


def initial(tied: bool) -> dict[str, Tensor]:
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


class Expected(NamedTuple):
    start: Tensor
    step: Tensor


def one_process(case: Case) -> tuple[dict[str, Expected], float]:
    """Each parameter's value before the step and what the step adds to it, and the mean loss: in float64."""
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    state = {name: value.to(dtype).double().requires_grad_() for name, value in initial(case.tied).items()}
    tokens, targets = (torch.cat(parts) for parts in zip(*map(window, range(RANKS // case.stages)), strict=True))
    hidden = F.embedding(tokens, state["embedding"])
    for at in range(DEPTH):
        hidden = torch.tanh(F.linear(hidden, state[f"body{at}"]))
    logits = F.linear(hidden, state["embedding" if case.tied else "head"])
    loss = F.cross_entropy(logits.view(-1, VOCAB), targets.view(-1))
    loss.backward()
    return {name: Expected(value.detach(), -LEARNING_RATE * value.grad) for name, value in state.items()}, loss.item()


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
    """Hands the weight of the head to the loss: a view, or DeepSpeed clears its gradient (see docs/pipelines.md)."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, self.weight.view_as(self.weight)


class TorchStage:
    """A stage of the pipeline, and its parameters."""

    def __init__(self, case: Case):
        mesh = init_device_mesh("cpu", (RANKS // case.stages, case.stages), mesh_dim_names=("data", "pipe"))
        self.group, self.data = mesh.get_group("pipe"), mesh.get_group("data")
        at, of_stage, state = mesh.get_local_rank("pipe"), DEPTH // case.stages, initial(case.tied)
        self.tokens, self.targets = window(mesh.get_local_rank("data"))
        bodies = {name: Body(state[name]) for name in list(state)[1:][at * of_stage : (at + 1) * of_stage]}
        self.parameters = {name: (0, body.weight) for name, body in bodies.items()}
        module, words = nn.Sequential(*bodies.values()), "embedding" if case.tied else "head"
        if at == 0 and not (case.head == "spread" and case.tied):
            module.insert(0, Embedding(state["embedding"]))
            self.parameters["embedding"] = 0, module[0].weight
        self.stage = PipelineStage(module, at, case.stages, torch.device("cpu"), group=self.group)
        if case.head == "spread":
            shard = VocabShard.split(VOCAB, self.group)
            mean = partial(TokenMean.over, group=self.data)
            head = SpreadHead(state[words][shard.start : shard.stop], shard, mean=mean, tied=case.tied)
            self.schedule = SpreadGPipe(self.stage, MICRO_BATCHES, head)
            self.parameters[words] = shard.start, head.weight
            return
        if self.stage.is_last:
            self.mean, self.weight = TokenMean.over(self.targets, group=self.data), nn.Parameter(state[words])
            self.parameters[words] = 0, self.weight
        kind = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}[case.engine]
        self.schedule = kind(self.stage, MICRO_BATCHES, loss_fn=self.loss, scale_grads=False)
        ends = [(ranks[0], ranks[-1]) for ranks in mesh.mesh.tolist()]
        self.ends = [dist.new_group(pair) for pair in ends][mesh.get_local_rank("data")] if case.tied else None

    def loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        return self.mean(linear_cross_entropy(hidden, self.weight, target, reduction="sum"))

    def run(self, schedule: Callable) -> float:
        """The mean loss of what `step` or `eval` of the schedule runs."""
        losses = []
        on_last = {"target": self.targets, "losses": losses} if self.stage.is_last else {}
        schedule(*([self.tokens] if self.stage.is_first else []), **on_last)
        loss = sum(losses, torch.zeros(())).detach() / dist.get_world_size(self.data)
        dist.all_reduce(loss)
        return loss.item()

    def update(self) -> dict[str, Part]:
        if getattr(self, "ends", None) is not None and (self.stage.is_first or self.stage.is_last):
            dist.all_reduce(self.parameters["embedding"][1].grad, group=self.ends)
        for _, parameter in self.parameters.values():
            dist.all_reduce(parameter.grad, group=self.data)
            parameter.data -= LEARNING_RATE * parameter.grad / dist.get_world_size(self.data)
        return {name: (start, parameter.detach()) for name, (start, parameter) in self.parameters.items()}


def torch_step(case: Case) -> tuple[dict[str, Part], list[float]]:
    """Parameters of this rank after the step, and mean losses before it."""
    stage = TorchStage(case)
    losses = [stage.run(stage.schedule.eval)] if case.head == "spread" else []
    losses.append(stage.run(stage.schedule.step))
    return stage.update(), losses


class DeepSpeedStage:
    def __init__(self, case: Case):
        import deepspeed
        from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

        state, spreads = initial(case.tied), case.head == "spread"
        layers = [LayerSpec(Body, state[f"body{at}"]) for at in range(DEPTH)]
        if not case.tied:
            head = [] if spreads else [LayerSpec(WithHead, state["head"])]
            layers = [LayerSpec(Embedding, state["embedding"]), *layers, *head]
        elif not spreads:
            first, last = (
                TiedLayerSpec("words", Embedding, state["embedding"], forward_fn=forward)
                for forward in (None, WithHead.forward)
            )
            layers = [first, *layers, last]
        loss_fn = None if spreads else self.loss
        self.module = PipelineModule(layers, num_stages=case.stages, partition_method="type:Body", loss_fn=loss_fn)
        grid = self.module.mpu()
        if spreads:
            shard = VocabShard.split(VOCAB, grid.get_pipe_parallel_group())
            rows = state["embedding" if case.tied else "head"][shard.start : shard.stop]
            keywords = {"mean": partial(mean_of_pairs, group=grid.get_data_parallel_group()), "loss": loss_of_pair}
            self.module.spread_head = SpreadHead(rows, shard, tied=case.tied, **keywords)
        config = {
            "train_micro_batch_size_per_gpu": BATCH,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "gradient_clipping": 0.0,
            "bf16": {"enabled": case.dtype == "bf16"},
            "data_types": {"grad_accum_dtype": case.sums},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": case.zero},
            "steps_per_print": 10**6,
        }
        optimizer = torch.optim.SGD(self.module.parameters(), lr=LEARNING_RATE)
        self.engine = deepspeed.initialize(model=self.module, optimizer=optimizer, config=config)[0]
        tokens, targets = (part.view(MICRO_BATCHES, BATCH, LENGTH) for part in window(grid.get_data_parallel_rank()))
        if spreads:
            spread(self.engine, self.module.spread_head)
            self.batches = [
                (ids, (target, torch.ones(target.shape))) for ids, target in zip(tokens, targets, strict=True)
            ]
        else:
            self.mean = token_mean(self.engine, list(targets))
            self.batches = list(zip(tokens, targets, strict=True))

    def loss(self, outputs: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return self.mean(linear_cross_entropy(*outputs, target, reduction="sum"))


def mean_of_pairs(labels: list[tuple[Tensor, Tensor]], **keywords) -> TokenMean:
    return TokenMean.over([target for target, _ in labels], weights=[weight for _, weight in labels], **keywords)


def loss_of_pair(hidden: Tensor, weight: Tensor, target: Tensor, token_weight: Tensor, vocab: VocabShard) -> Tensor:
    return linear_cross_entropy(hidden, weight, target, token_weight=token_weight, reduction="sum", vocab=vocab)


def deepspeed_step(case: Case) -> tuple[dict[str, Part], list[float]]:
    stage = DeepSpeedStage(case)
    try:
        losses = [stage.engine.eval_batch(iter(stage.batches)).item()] if case.head == "spread" else []
        losses.append(stage.engine.train_batch(iter(stage.batches)).item())
        return dict(part(name, value, stage, case) for name, value in masters(stage.engine).items()), losses
    finally:
        end(stage.engine)


def part(name: str, value: Tensor, stage: DeepSpeedStage, case: Case) -> tuple[str, Part]:
    """A parameter of the PipelineModule under the name that it has in `initial`."""
    first, _, _ = name.partition(".")
    if first == "spread_head":
        return "embedding" if case.tied else "head", (stage.module.spread_head.shard.start, value)
    if first == "tied_modules":
        return "embedding", (0, value)
    layer = int(first) - (not (case.tied and case.head == "spread"))  # the embedding is layer 0
    return {-1: "embedding", DEPTH: "head"}.get(layer, f"body{layer}"), (0, value)


def torch_errors() -> dict[str, str]:
    world, at = VocabShard.split(VOCAB), dist.get_rank()
    rows, mean = torch.randn(world.rows, WIDTH), TokenMean.over
    head = SpreadHead(rows, world, mean=mean)
    stage = PipelineStage(nn.Identity(), at, RANKS, torch.device("cpu"))
    reversed_stage = PipelineStage(nn.Identity(), RANKS - 1 - at, RANKS, torch.device("cpu"))
    if head.is_last:
        head.defer(torch.randn(2, WIDTH), torch.zeros(2, dtype=torch.int64))
    return {
        "losses": attempt(head.meet, 3),
        "rows": attempt(SpreadHead, rows[1:], world, mean=mean),
        "dtype": attempt(SpreadHead, rows.half(), world, mean=mean),
        "shard": attempt(SpreadHead, rows, rows, mean=mean),
        "input_grad": attempt(SpreadHead, rows, VocabShard.split(VOCAB, input_grad="partial"), mean=mean),
        "mean": attempt(SpreadHead, rows, world, mean=1.0),
        "loss": attempt(SpreadHead, rows, world, mean=mean, loss="sum"),
        "tied": attempt(SpreadHead, rows, world, mean=mean, tied=1),
        "tokens": attempt(head.embed, [torch.tensor([3, VOCAB])]),
        "dtype of tokens": attempt(head.embed, [torch.ones(2)]),
        "not met": attempt(backward_alone, head),
        "head": attempt(SpreadGPipe, stage, 2, rows),
        "keywords": attempt(SpreadGPipe, stage, 2, head, loss_fn=head.defer),
        "order": attempt(SpreadGPipe, reversed_stage, 2, head),
        "engine": attempt(spread, stage, head),
    }


def backward_alone(head: SpreadHead) -> None:
    head.defer(torch.randn(2, WIDTH, requires_grad=True), torch.zeros(2, dtype=torch.int64)).backward()


def deepspeed_errors() -> dict[str, str]:
    stage, world = DeepSpeedStage(DEEPSPEED[0]), VocabShard.split(VOCAB)
    head = SpreadHead(torch.randn(world.rows, WIDTH), world, mean=TokenMean.over)
    try:
        found = {
            "not a head": attempt(spread, stage.engine, stage),
            "no submodule": attempt(spread, stage.engine, head),
        }
        stage.module.spread_head = head
        return found | {"ranks": attempt(spread, stage.engine, head)}
    finally:
        end(stage.engine)


def torch_cases(_rank: int, _ranks: int) -> dict:
    return {case: attempt(torch_step, case) for case in TORCH} | torch_errors()


def deepspeed_cases(_rank: int, _ranks: int) -> dict:
    import deepspeed

    quiet_deepspeed()
    deepspeed.init_distributed(dist_backend="gloo")
    return {case: attempt(deepspeed_step, case) for case in DEEPSPEED} | deepspeed_errors()
