"""Trains a small causal transformer with a vocabulary of 131,072 as a pipeline, with or without a spread head.

    torchrun --nproc-per-node 2 examples/pipeline.py
    torchrun --nproc-per-node 2 examples/pipeline.py --spread-head

Each process is a stage with its share of the blocks. Embedding and head share one weight. Without --spread-head the
first and the last stage hold it whole; with it, each of R stages holds 1/R of its rows, of their gradient and of their
optimizer state. The losses depend on neither. Uses NCCL where every rank has a GPU, gloo where there are none.
Each takes some two minutes on 2 cores.
"""

import argparse
import os
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from common.command_line import Parser, refused_input
from common.model import ModelConfig, Transformer
from common.peak_memory import PeakMemory
from common.processes import start_process
from common.text_data import TextBatches, load_tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from chunked_ce import TokenMean, VocabShard, linear_cross_entropy
from chunked_ce.pipeline import SpreadGPipe, SpreadHead

SIZES = {"width": 128, "depth": 4, "heads": 4, "context": 256}


def parse_options() -> tuple[argparse.Namespace, ModelConfig, TextBatches]:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spread-head", action="store_true", help="each stage holds a share of the head's rows")
    for name, default in ({"steps": 20, "batch": 2, "micro-batches": 4} | SIZES).items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"({default})")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="UTF-8 (Python's manual and sources)")
    options, stages = parser.parse_args(), int(os.environ.get("WORLD_SIZE", 1))
    parser.check_least(options, {"steps": 1, "batch": 1, "micro_batches": 1})
    if options.depth % stages:
        parser.error(f"--depth must be a multiple of the stages, got {options.depth} and {stages}")
    with refused_input():
        config = ModelConfig(**{name: getattr(options, name) for name in SIZES})
        return options, config, TextBatches(load_tokens(options.text), config.context, mask_prompt=True)


class Stage(nn.Module):
    """A stage's blocks, from tokens (B, T) or embedded tokens (B, T, D) on the first one, to hidden states."""

    def __init__(self, model: Transformer, at: int, stages: int, embeds: bool):
        super().__init__()
        share = len(model.blocks) // stages
        self.blocks = model.blocks[at * share : (at + 1) * share]
        self.is_first, self.is_last, self.scale = at == 0, at == stages - 1, model.scale
        if self.is_first:
            self.positions = model.positions
        if self.is_first and embeds:
            self.embedding = model.embedding
        if self.is_last:
            self.norm = model.norm

    def forward(self, x: Tensor) -> Tensor:
        if self.is_first:
            x = self.embedding(x) if hasattr(self, "embedding") else x
            x = x * self.scale + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            x = block(x)
        return self.norm(x) if self.is_last else x


class WholeHead(nn.Module):
    """The weight of head and embedding on the first and the last stage, which add up its gradients."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight, self.mean = weight, None
        self.ends = dist.new_group({0, dist.get_world_size() - 1})

    def loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        return self.mean(linear_cross_entropy(hidden, self.weight, target, reduction="sum"))

    def add_up(self) -> None:
        if dist.get_rank() in (0, dist.get_world_size() - 1):
            dist.all_reduce(self.weight.grad, group=self.ends)


def train(options: argparse.Namespace, config: ModelConfig, batches: TextBatches, device: torch.device) -> None:
    at, stages, micro_batches = dist.get_rank(), dist.get_world_size(), options.micro_batches
    mesh = init_device_mesh(device.type, (1, stages), mesh_dim_names=("data", "pipe"))
    new_mean = partial(TokenMean.over, group=mesh.get_group("data"))  # a single replica of the pipeline

    torch.manual_seed(0)
    model = Transformer(config).to(device)  # whole at first, so that initial values do not depend on the stages
    module = Stage(model, at, stages, embeds=not options.spread_head)
    stage = PipelineStage(module, at, stages, device, group=mesh.get_group("pipe"))
    if options.spread_head:
        shard = VocabShard.split(config.vocab, mesh.get_group("pipe"))
        head = SpreadHead(model.head.weight[shard.start : shard.stop], shard, mean=new_mean, tied=True)
        schedule = SpreadGPipe(stage, micro_batches, head)
    else:
        head = WholeHead(model.head.weight if stage.is_first or stage.is_last else None)
        schedule = ScheduleGPipe(stage, micro_batches, loss_fn=head.loss, scale_grads=False)
    parameters = list(dict.fromkeys([*module.parameters(), *head.parameters()]))
    held = sum(parameter.nbytes for parameter in parameters) / 2**20
    optimizer = torch.optim.AdamW(parameters, lr=6e-4)
    del model
    memory = PeakMemory()
    for step in range(1, options.steps + 1):
        started, losses = time.perf_counter(), []
        windows = batches.step(step, micro_batches=micro_batches, batch=options.batch)
        tokens, targets = (ids.flatten(0, 1).to(device) for ids in windows)  # (micro-batches * B, T)
        if not options.spread_head:
            head.mean = new_mean(targets)
        on_last = {"target": targets, "losses": losses} if stage.is_last else {}
        schedule.step(*([tokens] if stage.is_first else []), return_outputs=False, **on_last)
        if not options.spread_head:
            head.add_up()
        optimizer.step()
        optimizer.zero_grad()
        speed = tokens.numel() / (time.perf_counter() - started)
        if stage.is_last:
            print(f"step {step:4}  loss {sum(losses).item():.6f}  {speed:7,.0f} tokens/s", flush=True)

    reports = [None] * stages
    dist.all_gather_object(
        reports, f"weights {held:5.0f} MiB, training took {memory.bytes() / 2**20:5.0f} MiB at its peak"
    )
    for of_stage, report in enumerate(reports if stage.is_last else []):
        print(f"stage {of_stage}: {report}")


def main() -> None:
    options = parse_options()
    train(*options, start_process())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
