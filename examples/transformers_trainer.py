"""Trains a Transformers Llama with a vocabulary of 131,072 under `Trainer` and DeepSpeed; chunked_ce adds one line.

    torchrun --nproc_per_node 2 examples/transformers_trainer.py
    torchrun --nproc_per_node 2 examples/transformers_trainer.py --plain

The second command trains without that line. Both print losses, time per step and peak memory. A DeepSpeed
configuration sets ZeRO stage and buckets. Without a CUDA device, the processes run on the CPU over gloo.
Each takes one to two minutes on 2 cores.
"""

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from common.command_line import Parser, refused_input, stop
from common.deepspeed_training import start_process
from common.text_data import load_tokens
from common.trainer_report import Report, new_llama, settings
from transformers import PrinterCallback, Trainer, TrainingArguments

from chunked_ce import LMHead

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


def parse_options() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true", help="leave the logits to the model")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="UTF-8 (Python's manual and sources)")
    config = Path(__file__).with_name("ds_zero3.json")
    parser.add_argument("--deepspeed-config", type=Path, default=config, metavar="JSON", help=f"({config.name})")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"({default})")
    options = parser.parse_args()
    parser.check_least(options, dict.fromkeys(SIZES, 1))
    parser.check_rotary(options)
    if not options.deepspeed_config.is_file():
        parser.error(f"--deepspeed-config must be a file, got {options.deepspeed_config}")
    return options


def main() -> None:
    options = parse_options()
    if "RANK" not in os.environ:
        stop("start it with torchrun, --nproc_per_node 1 for one process")
    start_process()
    if not torch.cuda.is_available():
        # Accelerate detects DeepSpeed only on GPUs; on CPUs each process would think it were alone.
        PartialState(cpu=True).distributed_type = DistributedType.DEEPSPEED
    model = new_llama(options.width, options.depth, options.heads, options.context)
    if not options.plain:
        model = LMHead.wrap(model)  # the only line of chunked_ce

    rows = options.steps * options.accumulate * options.batch * dist.get_world_size()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            **settings(folder, options.steps),
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=options.accumulate,
            learning_rate=6e-4,
            optim="adamw_torch",
            accelerator_config={"use_configured_state": not torch.cuda.is_available()},
            deepspeed=str(options.deepspeed_config),
        )
        with refused_input():
            windows = Windows(load_tokens(options.text), options.context, rows)
        trainer = Trainer(model, arguments, train_dataset=windows, callbacks=[Report("loss")])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
