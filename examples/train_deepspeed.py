"""Trains a small causal transformer with a vocabulary of 131,072 under DeepSpeed.

    torchrun --nproc_per_node 2 examples/train_deepspeed.py --out runs/first
    deepspeed --num_gpus 2 examples/train_deepspeed.py --out runs/first

The DeepSpeed configuration file sets ZeRO stage, precision, batch, accumulation and optimizer. Without a CUDA
device, the processes run on the CPU over gloo. DIR receives metrics.jsonl, with one line per step, and the
checkpoints. --resume continues from the last checkpoint, with the losses of an uninterrupted run.
"""

import argparse
import json
import os
import socket
import sys
import time
import warnings
from dataclasses import asdict, fields
from pathlib import Path
from typing import NoReturn

import torch

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"  # read by the first import of deepspeed

import deepspeed
import torch.distributed as dist
from deepspeed import DeepSpeedConfig, DeepSpeedConfigError, DeepSpeedEngine
from model import LOSSES, LanguageModel, ModelConfig
from peak_memory import PeakMemory
from run_directory import RunDirectory
from text_data import TextBatches, load_tokens
from torch import Tensor

from chunked_ce.integrations.deepspeed import token_mean

CONFIG = Path(__file__).with_name("ds_config.json")
MODEL_OPTIONS = [field for field in fields(ModelConfig) if field.name != "vocab"]


def stop(message: object) -> NoReturn:
    """Ends this process with one line on stderr and status 2.

    If one rank refuses the settings, the other ranks on the machine refuse them too. They leave the line to
    the first rank, whose end makes the launcher end them; they print it themselves only if they live on.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(10)
    print(f"train_deepspeed: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        stop(f"{message} (--help lists the options)")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--out", type=Path, required=True, metavar="DIR", help="receives metrics and checkpoints")
    option("--loss", choices=LOSSES, default="chunked", help="logits in chunks, or all at once")
    option("--steps", type=int, default=60, metavar="N", help="optimizer steps in all (60)")
    option("--deepspeed-config", type=Path, default=CONFIG, metavar="JSON", help=f"({CONFIG.name})")
    option("--text", type=Path, nargs="+", metavar="FILE", help="UTF-8 text (Python's manual and sources)")
    option("--mask-prompt", action="store_true", help="ignore a first part of each sequence")
    option("--save-every", type=int, default=0, metavar="N", help="save every N steps too, not only at the end")
    option("--resume", action="store_true", help="continue from the last checkpoint in DIR, if any")
    option("--seed", type=int, default=0, metavar="N", help="(0)")
    for field in MODEL_OPTIONS:
        option(f"--{field.name}", type=int, default=field.default, metavar="N", help=f"({field.default})")
    option("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    arguments = parser.parse_args()
    for name, least in {"steps": 1, "save_every": 0, "seed": 0}.items():
        value = getattr(arguments, name)
        if value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    return arguments


def read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return config


def start_process() -> None:
    """Joins the process group; without a launcher it is a group of one."""
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


def train_step(engine: DeepSpeedEngine, inputs: Tensor, targets: Tensor) -> float:
    """Takes an optimizer step on inputs and targets (micro_batches, B, T); returns the mean loss over all ranks."""
    mean = token_mean(engine, targets)
    loss_sums = []
    for micro_inputs, micro_targets in zip(inputs, targets, strict=True):
        loss_sum = engine(micro_inputs, micro_targets)
        engine.backward(mean(loss_sum))
        engine.step()
        loss_sums.append(loss_sum.detach())
    return mean.report(loss_sums).item()


def train(engine: DeepSpeedEngine, batches: TextBatches, run: RunDirectory, steps: int, save_every: int):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    batch, micro_batches = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    shape = {"micro_batches": micro_batches, "batch": batch, "rank": rank, "ranks": ranks}
    tokens = micro_batches * ranks * batch * batches.context
    memory = PeakMemory()
    for step in range(engine.global_steps + 1, steps + 1):
        started = time.perf_counter()
        inputs, targets = (ids.to(engine.device) for ids in batches.step(step, **shape))
        loss = train_step(engine, inputs, targets)
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


def main() -> None:
    arguments = parse_arguments()
    run = RunDirectory(arguments.out)
    try:
        model = ModelConfig(**{field.name: getattr(arguments, field.name) for field in MODEL_OPTIONS})
        ds_config = read_config(arguments.deepspeed_config)
        tokens = load_tokens(arguments.text)
        batches = TextBatches(tokens, model.context, arguments.seed, arguments.mask_prompt)
        settings = {name: getattr(arguments, name) for name in ("loss", "seed", "mask_prompt")}
        settings |= asdict(model) | {"text": batches.fingerprint(), "deepspeed": ds_config}
        settings |= {"ranks": int(os.environ.get("WORLD_SIZE", 1))}
        run.check(settings, arguments.resume)
        run.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        stop(f"{error.filename}: {error.strerror}")
    except ValueError as error:
        stop(error)

    quieten()
    start_process()
    try:
        DeepSpeedConfig(ds_config)
    except (DeepSpeedConfigError, ValueError, AssertionError) as error:
        dist.destroy_process_group()
        stop(f"{arguments.deepspeed_config}: {' '.join(str(error).split())}")
    torch.manual_seed(arguments.seed)
    network = LanguageModel(model, arguments.loss)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    engine, *_ = deepspeed.initialize(model=network, model_parameters=network.parameters(), config=ds_config)
    run.load(engine)
    if dist.get_rank() == 0:
        run.start(settings, engine.global_steps)
        where = f"{dist.get_world_size()} {engine.device.type} ranks, ZeRO {engine.zero_optimization_stage()}"
        what = f"{parameters / 1e6:.1f}M parameters, {batches.fingerprint()}"
        print(f"{where}, {what}, {engine.global_steps} of {arguments.steps} steps done", flush=True)
    train(engine, batches, run, arguments.steps, arguments.save_every)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
