"""Trains in a plain PyTorch loop: in one process with `python`, in several with `torchrun` and DDP.

    torchrun --nproc-per-node 2 examples/custom_trainer.py

Takes about a minute on 2 cores.
"""

import argparse
import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
from common.model import ModelConfig, Transformer
from common.text_data import TextBatches, load_tokens
from torch.nn.parallel import DistributedDataParallel

from chunked_ce import TokenMean, linear_cross_entropy

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options = {"steps": 30, "width": 128, "depth": 2, "context": 256, "batch": 2, "micro-batches": 2}
for name, default in options.items():
    parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"({default})")
options = parser.parse_args()

ranks = int(os.environ.get("WORLD_SIZE", 1))
device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
if ranks > 1:
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
rank = dist.get_rank() if ranks > 1 else 0

torch.manual_seed(0)
model = Transformer(ModelConfig(width=options.width, depth=options.depth, context=options.context)).to(device)
trained = DistributedDataParallel(model) if ranks > 1 else model
optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4)
batches = TextBatches(load_tokens(), options.context, mask_prompt=True)
shape = {"micro_batches": options.micro_batches, "batch": options.batch, "rank": rank, "ranks": ranks}

for step in range(1, options.steps + 1):
    inputs, targets = (ids.to(device) for ids in batches.step(step, **shape))  # (micro_batches, B, T)
    mean = TokenMean.over(targets, divisor=ranks)  # DDP divides by the ranks; this loop divides by nothing else
    loss_sums = []
    for micro in range(options.micro_batches):
        last = micro + 1 == options.micro_batches  # DDP averages gradients only in this backward
        with nullcontext() if last or ranks == 1 else trained.no_sync():
            hidden = trained(inputs[micro])  # (B, T, D)
            loss_sum = linear_cross_entropy(hidden, model.head.weight, targets[micro], reduction="sum")
            mean(loss_sum).backward()
        loss_sums.append(loss_sum.detach())
    optimizer.step()
    optimizer.zero_grad()
    loss = mean.report(loss_sums)
    if rank == 0:
        print(f"step {step:4d}   loss {loss:.4f}", flush=True)

if ranks > 1:
    dist.destroy_process_group()
