"""Trains a small causal transformer with its vocabulary of 131,072 sharded over ranks: tensor and data parallel.

    torchrun --nproc-per-node 4 examples/vocab_parallel.py --tensor-parallel 2

The R ranks of a tensor group see the same sequences. Each holds 1/R of the rows of the weight that embedding and
head share, of their gradient and of their optimizer state. The ranks of a data group hold the same rows and see
different sequences. Every rank holds all other parameters. The losses depend on neither number of ranks.
Uses NCCL where every rank has a GPU, gloo where there are none.
Takes some two minutes on 2 cores.
"""

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from common.command_line import Parser, refused_input
from common.model import ModelConfig, Transformer
from common.peak_memory import PeakMemory
from common.processes import start_process
from common.sharded_words import shard_words
from common.text_data import TextBatches, load_tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from chunked_ce import TokenMean, VocabShard, linear_cross_entropy

SIZES = {"width": 128, "depth": 2, "heads": 4, "context": 256}


def parse_options() -> tuple[argparse.Namespace, ModelConfig, TextBatches]:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in ({"tensor-parallel": 1, "steps": 20, "batch": 8} | SIZES).items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"({default})")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="UTF-8 (Python's manual and sources)")
    options, ranks = parser.parse_args(), int(os.environ.get("WORLD_SIZE", 1))
    parser.check_least(options, {"tensor_parallel": 1, "steps": 1, "batch": 1})
    data_ranks = ranks // options.tensor_parallel
    if ranks % options.tensor_parallel:
        parser.error(f"ranks must be a multiple of --tensor-parallel, got {ranks} and {options.tensor_parallel}")
    if options.batch % data_ranks:
        parser.error(f"--batch must be a multiple of the data ranks, got {options.batch} and {data_ranks}")
    if 0 < torch.cuda.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        parser.error("more ranks than GPUs: start fewer, or set CUDA_VISIBLE_DEVICES='' for the CPU")
    with refused_input():
        config = ModelConfig(**{name: getattr(options, name) for name in SIZES})
        return options, config, TextBatches(load_tokens(options.text), config.context, mask_prompt=True)


def average_gradients(model: Transformer, words: nn.Parameter, mesh: DeviceMesh) -> Tensor:
    """Averages each gradient over the ranks that hold the same parameter; returns the norm of all of them."""
    squares = {}
    for parameter in model.parameters():
        copies = mesh.get_group("data") if parameter is words else dist.group.WORLD
        dist.all_reduce(parameter.grad, group=copies)
        parameter.grad /= dist.get_world_size(copies)
        squares[parameter] = torch.linalg.vector_norm(parameter.grad, dim=-1).double().square().sum()
    dist.all_reduce(squares[words], group=mesh.get_group("tensor"))  # over all rows
    return sum(squares.values()).sqrt()


def train(options: argparse.Namespace, config: ModelConfig, batches: TextBatches, device: torch.device) -> None:
    parallel, data_ranks = options.tensor_parallel, dist.get_world_size() // options.tensor_parallel
    mesh = init_device_mesh(device.type, (data_ranks, parallel), mesh_dim_names=("data", "tensor"))
    shape = {"micro_batches": 1, "batch": options.batch // data_ranks}
    shape |= {"rank": mesh.get_local_rank("data"), "ranks": data_ranks}

    torch.manual_seed(0)
    model = Transformer(config)  # whole at first, so that initial values do not depend on the ranks
    shard = VocabShard.split(config.vocab, mesh.get_group("tensor"))
    words = shard_words(model, shard)  # (V / R, D)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4)
    memory = PeakMemory()
    for step in range(1, options.steps + 1):
        started = time.perf_counter()
        inputs, targets = (ids[0].to(device) for ids in batches.step(step, **shape))  # (B, T)
        mean = TokenMean.over(targets, group=mesh.get_group("data"))  # tensor ranks hold the same tokens
        loss_sum = linear_cross_entropy(model(inputs), words, targets, reduction="sum", vocab=shard)
        mean(loss_sum).backward()
        norm = average_gradients(model, words, mesh)
        optimizer.step()
        optimizer.zero_grad()
        loss = mean.report(loss_sum).item()
        speed = options.batch * config.context / (time.perf_counter() - started)
        if dist.get_rank() == 0:
            print(f"step {step:4}  loss {loss:.6f}  gradient {norm:.6f}  {speed:7,.0f} tokens/s", flush=True)

    reports = [None] * dist.get_world_size()
    rows = f"head rows {shard.start:7,} to {shard.stop:7,}"
    dist.all_gather_object(reports, f"{rows}, training took {memory.bytes() / 2**20:5.0f} MiB at its peak")
    for rank, report in enumerate(reports if dist.get_rank() == 0 else []):
        print(f"rank {rank}: data {rank // parallel}, tensor {rank % parallel}, {report}")


def main() -> None:
    options = parse_options()
    train(*options, start_process())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
