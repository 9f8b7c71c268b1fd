"""Trains a Llama with a vocabulary of 131,072 with TRL's GRPOTrainer; chunked_ce adds one line.

    python examples/trl_grpo.py
    python examples/trl_grpo.py --plain
    python examples/trl_grpo.py --text poem.txt

The model is given a line of a text (the Zen of Python) and says the next one. Its reward is the share of that line
which it gets right before its first mistake. Supervised steps come first, in which half of the answers belong to other
lines. The second command trains without the line. Both print rewards, losses, time per step and peak memory above the
model's own. They need TRL 1.15 or later. Each takes one to two minutes on 2 cores.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from common.command_line import Parser, quiet_interrupt, refused_input
from common.next_lines import NextLines
from common.trainer_report import Report, new_llama, settings
from common.trl_text import MODEL_TOKENS, ids_as_text, new_tokenizer
from datasets import Dataset
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from chunked_ce.integrations import trl

SIZES = {"steps": 8, "lines": 4, "group": 8, "warm_up": 80, "width": 64, "depth": 2, "heads": 4}


def parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true", help="leave the log-probabilities to TRL")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text (the Zen of Python)")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, metavar="N", help=f"({default})")
    return parser


def warm_up(model: torch.nn.Module, task: NextLines, steps: int) -> None:
    """Supervised steps on answers of which half are wrong: a policy that never gets a reward learns nothing."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(1, steps + 1):
        prompts, answers = task.examples(repeats=3, right=0.5, generator=generator)
        hidden = model.model(torch.cat([prompts, answers[:, :-1].clamp(min=0)], 1)).last_hidden_state
        logits = model.lm_head(hidden[:, prompts.shape[1] - 1 :][answers >= 0])
        loss = torch.nn.functional.cross_entropy(logits, answers[answers >= 0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"warm-up step {step:3}/{steps}  loss {loss.item():.4f}", flush=True)


def main() -> None:
    options_of = parser()
    options = options_of.parse_args()
    options_of.check_least(options, dict.fromkeys(SIZES, 1) | {"group": 2, "warm_up": 0})
    options_of.check_rotary(options)
    with refused_input():
        task = NextLines(options.lines, options.text)
    length = task.answers.shape[1]
    context = task.prompts.shape[1] + length
    model = new_llama(options.width, options.depth, options.heads, context, **MODEL_TOKENS)
    warm_up(model, task, options.warm_up)

    def rewards(completion_ids: list[list[int]], line: list[int], **_) -> list[float]:
        answers = [torch.tensor(ids) for ids in completion_ids]
        answers = [torch.nn.functional.pad(ids, (0, length - len(ids)), value=-1) for ids in answers]
        return task.rewards(torch.tensor(line), torch.stack(answers)).tolist()

    if not options.plain:
        trl.install()  # the only line of chunked_ce
    rows = [{"prompt": ids_as_text(ids.tolist()), "line": number} for number, ids in enumerate(task.prompts)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model,
            reward_funcs=rewards,
            args=GRPOConfig(
                **settings(folder, options.steps),
                per_device_train_batch_size=options.lines * options.group,
                num_generations=options.group,
                max_completion_length=length,
                learning_rate=1e-3,
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=new_tokenizer(),
            callbacks=[Report("reward", "loss", "entropy")],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


if __name__ == "__main__":
    with quiet_interrupt():
        main()
