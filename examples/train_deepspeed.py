"""Trains a small causal transformer with a vocabulary of 131,072 under DeepSpeed.

    torchrun --nproc_per_node 2 examples/train_deepspeed.py --out runs/first
    deepspeed --num_gpus 2 examples/train_deepspeed.py --out runs/first

The DeepSpeed configuration file sets ZeRO stage, precision, batch, accumulation and optimizer. Without a CUDA
device, the processes run on the CPU over gloo. DIR receives metrics.jsonl, with one line per step, and the
checkpoints. --resume continues from the last checkpoint, with the losses of an uninterrupted run.
Takes two to four minutes on 2 cores.
"""

import argparse
import os
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.distributed as dist
from common.command_line import Parser, read_config, refused_input
from common.deepspeed_training import check_config, describe, start_engine, start_process, train
from common.model import LOSSES, LanguageModel, ModelConfig
from common.results import make
from common.run_directory import RunDirectory
from common.text_data import TextBatches, load_tokens

from chunked_ce import LMHead

CONFIG = Path(__file__).with_name("ds_config.json")
MODEL_OPTIONS = [field for field in fields(ModelConfig) if field.name != "vocab"]


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--out", type=Path, required=True, metavar="DIR", help="receives metrics and checkpoints")
    option("--loss", choices=LOSSES, default="chunked", help="logits in chunks, or all at once")
    option("--shard-head", action="store_true", help="spread the rows of head and embedding over the ranks")
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
    if arguments.shard_head and arguments.loss == "full":
        parser.error("--shard-head needs --loss chunked: no rank has all logits")
    parser.check_least(arguments, {"steps": 1, "save_every": 0, "seed": 0})
    return arguments


def main() -> None:
    arguments = parse_arguments()
    run = RunDirectory(arguments.out)
    with refused_input():
        model = ModelConfig(**{field.name: getattr(arguments, field.name) for field in MODEL_OPTIONS})
        ds_config = read_config(arguments.deepspeed_config)
        tokens = load_tokens(arguments.text)
        batches = TextBatches(tokens, model.context, arguments.seed, arguments.mask_prompt)
        settings = {name: getattr(arguments, name) for name in ("loss", "shard_head", "seed", "mask_prompt")}
        settings |= asdict(model) | {"text": batches.fingerprint(), "deepspeed": ds_config}
        settings |= {"ranks": int(os.environ.get("WORLD_SIZE", 1))}
        run.check(settings, arguments.resume)
        make(run.path)

    start_process()
    check_config(ds_config, arguments.deepspeed_config)
    torch.manual_seed(arguments.seed)
    network = LanguageModel(model, arguments.loss)
    if arguments.shard_head:
        LMHead.shard(network)
    engine = start_engine(network, ds_config)
    run.load(engine)
    if dist.get_rank() == 0:
        run.start(settings, engine.global_steps)
        done = f"{engine.global_steps} of {arguments.steps} steps done"
        head = f" and {network.head.vocab.rows:,} rows of the head on rank 0" if arguments.shard_head else ""
        print(f"{describe(engine)}{head}, {batches.fingerprint()}, {done}", flush=True)
    train(engine, batches, run, arguments.steps, arguments.save_every)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
