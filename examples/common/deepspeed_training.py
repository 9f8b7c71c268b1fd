"""Training under DeepSpeed: the process group, the engine, and the loop over optimizer steps."""

import os
import socket
import time
import warnings
from pathlib import Path
from typing import Protocol

import torch

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"  # read by the first import of deepspeed

import deepspeed
import torch.distributed as dist
from deepspeed import DeepSpeedConfig, DeepSpeedConfigError, DeepSpeedEngine
from torch import Tensor, nn

from chunked_ce.integrations.deepspeed import token_mean
from common.command_line import stop
from common.peak_memory import PeakMemory
from common.run_directory import RunDirectory


class Batches(Protocol):
    """What a training sees: see `text_data.TextBatches`."""

    context: int

    def step(self, step: int, *, micro_batches: int, batch: int, rank: int = 0, ranks: int = 1) -> tuple[Tensor, ...]:
        """Inputs, targets, and any other tensors that the model takes, each (micro_batches, batch, context, ...)."""


def start_process() -> None:
    """Joins the process group; without a launcher it is a group of one."""
    quieten()
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        deepspeed.init_distributed("nccl", verbose=False)
    else:
        # Otherwise DeepSpeed compiles its own all-reduce with g++, which takes a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
        deepspeed.init_distributed("gloo", verbose=False)


def quieten() -> None:
    """Hides two notices that come with every run and need no action."""
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    deepspeed.utils.logger.addFilter(lambda record: "before it has started" not in record.getMessage())


def check_config(config: dict, path: Path) -> DeepSpeedConfig:
    """Leaves the process group and stops if DeepSpeed refuses the configuration, which was read from the path."""
    try:
        return DeepSpeedConfig(config)
    except (DeepSpeedConfigError, ValueError, AssertionError) as error:
        dist.destroy_process_group()
        stop(f"{path}: {' '.join(str(error).split())}")


def start_engine(network: nn.Module, config: dict) -> DeepSpeedEngine:
    return deepspeed.initialize(model=network, model_parameters=network.parameters(), config=config)[0]


def describe(engine: DeepSpeedEngine) -> str:
    ranks = f"{dist.get_world_size()} {engine.device.type} ranks, ZeRO {engine.zero_optimization_stage()}"
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    return f"{ranks}, {parameters / 1e6:.1f}M parameters"


def train_step(engine: DeepSpeedEngine, inputs: Tensor, targets: Tensor, *more: Tensor) -> float:
    """Takes an optimizer step on tensors (micro_batches, B, T, ...); returns the mean loss over all ranks."""
    mean = token_mean(engine, targets)
    loss_sums = []
    for micro_batch in zip(inputs, targets, *more, strict=True):
        loss_sum = engine(*micro_batch)
        engine.backward(mean(loss_sum))
        engine.step()
        loss_sums.append(loss_sum.detach())
    return mean.report(loss_sums).item()


def train(engine: DeepSpeedEngine, batches: Batches, run: RunDirectory, steps: int, save_every: int = 0) -> None:
    """Trains from the engine's step on; logs each step, and saves at the end and after every `save_every` steps."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    batch, micro_batches = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    shape = {"micro_batches": micro_batches, "batch": batch, "rank": rank, "ranks": ranks}
    tokens = micro_batches * ranks * batch * batches.context
    memory = PeakMemory()
    for step in range(engine.global_steps + 1, steps + 1):
        started = time.perf_counter()
        loss = train_step(engine, *(tensor.to(engine.device) for tensor in batches.step(step, **shape)))
        seconds = time.perf_counter() - started

        peak = torch.tensor(memory.bytes(), device=engine.device)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        if rank == 0:
            record = {"step": step, "loss": loss, "lr": engine.get_lr()[0]}
            record |= {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
            run.log(record | {"peak_memory_bytes": peak.item()})
            speed, mebibytes = f"{tokens / seconds:9,.0f} tokens/s", f"{peak.item() / 2**20:7,.0f} MiB"
            print(f"step {step:4}/{steps}  loss {loss:8.4f}  {speed}  peak memory {mebibytes}", flush=True)
        if step == steps or (save_every and step % save_every == 0):
            run.save(engine)
