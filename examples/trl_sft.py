"""Trains a Llama with a vocabulary of 131,072 on real text with TRL's SFTTrainer; chunked_ce adds one line.

    python examples/trl_sft.py
    python examples/trl_sft.py --plain
    python examples/trl_sft.py --label-smoothing 0.1

The second command trains without that line. All print losses, time per step and peak memory above the model's own.
They need TRL 1.15 or later. Each takes under a minute on 2 cores.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from common.command_line import Parser, quiet_interrupt, refused_input
from common.text_data import TextBatches, load_tokens
from common.trainer_report import Report, new_llama, settings
from common.trl_text import MODEL_TOKENS, new_tokenizer
from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from chunked_ce.integrations import trl

SIZES = {"steps": 12, "batch": 4, "context": 256, "width": 128, "depth": 2, "heads": 4}


def parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true", help="leave the loss to TRL")
    parser.add_argument("--label-smoothing", type=float, default=0.0, metavar="X", help="(0.0)")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="UTF-8 (Python's manual and sources)")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"({default})")
    return parser


def windows(text: list[Path] | None, context: int, number: int) -> Dataset:
    """Windows of the text, in whose first part, of random length, no token counts."""
    with refused_input():
        batches = TextBatches(load_tokens(text), context - 1, mask_prompt=True)
    inputs, targets = (x[0] for x in batches.step(0, micro_batches=1, batch=number))
    rows = torch.cat([inputs, targets[:, -1:]], 1)
    masks = torch.cat([torch.zeros_like(targets[:, :1]), (targets >= 0).long()], 1)
    rows[:, -1] = rows[:, -1].clamp(min=0)
    return Dataset.from_dict({"input_ids": rows.tolist(), "completion_mask": masks.tolist()})


def main() -> None:
    options_of = parser()
    options = options_of.parse_args()
    options_of.check_least(options, dict.fromkeys(SIZES, 1) | {"context": 2})
    options_of.check_rotary(options)
    rows = windows(options.text, options.context, options.steps * options.batch)
    if not options.plain:
        trl.install()  # the only line of chunked_ce
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            new_llama(options.width, options.depth, options.heads, options.context, **MODEL_TOKENS),
            args=SFTConfig(
                **settings(folder, options.steps),
                per_device_train_batch_size=options.batch,
                max_length=options.context,
                learning_rate=6e-4,
                label_smoothing_factor=options.label_smoothing,
                gradient_checkpointing=False,
            ),
            train_dataset=rows,
            processing_class=new_tokenizer(),
            callbacks=[Report("loss", "entropy", "mean_token_accuracy")],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


if __name__ == "__main__":
    with quiet_interrupt():
        main()
