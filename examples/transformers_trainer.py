"""Trains a Transformers Llama with a vocabulary of 131,072 under `Trainer` and DeepSpeed; chunked_ce adds one line.

    torchrun --nproc_per_node 2 examples/transformers_trainer.py
    torchrun --nproc_per_node 2 examples/transformers_trainer.py --plain

The second command trains without that line. Both print losses, time per step and peak memory. A DeepSpeed
configuration sets ZeRO stage and buckets. Without a CUDA device, the processes run on the CPU over gloo.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"  # read by the first import of deepspeed

import deepspeed
import numpy as np
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from peak_memory import PeakMemory
from text_data import load_tokens
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from chunked_ce import LMHead

VOCAB = 131_072
SIZES = {"steps": 12, "batch": 2, "accumulate": 1, "context": 512, "width": 128, "depth": 2, "heads": 4}


class Windows(torch.utils.data.Dataset):
    """`number` random windows of a text, the same in every run."""

    def __init__(self, tokens: np.ndarray, context: int, number: int):
        if len(tokens) <= context:
            raise ValueError(f"the text has {len(tokens)} tokens, too few for a context of {context}")
        starts = np.random.default_rng(0).integers(len(tokens) - context, size=number)
        self.windows = tokens[starts[:, None] + np.arange(context)].astype(np.int64)  # (number, context)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.windows[number])
        return {"input_ids": ids, "labels": ids}  # the model shifts them


class Report(TrainerCallback):
    """Prints the loss of each step, and at the end the time per step and the peak memory."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.memory, self.seconds = PeakMemory(), []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.started)

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs and state.is_world_process_zero:
            print(f"step {state.global_step:4}  loss {float(logs['loss']):.4f}", flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        peak = torch.tensor(self.memory.bytes(), device=args.device)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        if state.is_world_process_zero:
            seconds, mebibytes = statistics.median(self.seconds), peak.item() / 2**20
            print(f"{seconds:.2f} s per step, training took {mebibytes:,.0f} MiB at its peak", flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true", help="leave the logits to the model")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="UTF-8 (Python's manual and sources)")
    config = Path(__file__).with_name("ds_zero3.json")
    parser.add_argument("--deepspeed-config", type=Path, default=config, metavar="JSON", help=f"({config.name})")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"({default})")
    options = parser.parse_args()
    for name in SIZES:
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.width % (2 * options.heads):  # rotary embedding splits a head's width in halves
        parser.error(f"--width must be a multiple of twice --heads, got {options.width} and {options.heads}")
    if not options.deepspeed_config.is_file():
        parser.error(f"--deepspeed-config must be a file, got {options.deepspeed_config}")
    return options


def start_process() -> None:
    """Joins the process group that torchrun describes."""
    if "RANK" not in os.environ:
        sys.exit("transformers_trainer: start it with torchrun, --nproc_per_node 1 for one process")
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    if torch.cuda.is_available():
        deepspeed.init_distributed("nccl", verbose=False)
        return
    # Otherwise DeepSpeed compiles its own all-reduce with g++, which takes a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"])))
    deepspeed.init_distributed("gloo", verbose=False)
    # Accelerate detects DeepSpeed only on GPUs; on CPUs each process would think it were alone.
    PartialState(cpu=True).distributed_type = DistributedType.DEEPSPEED


def main() -> None:
    options = parse_options()
    start_process()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=options.width,
            intermediate_size=4 * options.width,
            num_hidden_layers=options.depth,
            num_attention_heads=options.heads,
            max_position_embeddings=options.context,
            tie_word_embeddings=True,
        )
    )
    if not options.plain:
        model = LMHead.wrap(model)  # the only line of chunked_ce

    rows = options.steps * options.accumulate * options.batch * dist.get_world_size()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=options.accumulate,
            learning_rate=6e-4,
            optim="adamw_torch",
            bf16=torch.cuda.is_available(),
            accelerator_config={"use_configured_state": not torch.cuda.is_available()},
            deepspeed=str(options.deepspeed_config),
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        windows = Windows(load_tokens(options.text), options.context, rows)
        trainer = Trainer(model, arguments, train_dataset=windows, callbacks=[Report()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
