"""Trains a small transformer with a vocabulary of 131,072 by GRPO, with chunked_ce and with full logits.

    python examples/policy.py
    python examples/policy.py --steps 40 --text poem.txt

The model is given a line of a text and says the next one. Its reward is the share of that line which it gets right
before its first mistake. Supervised steps come first, in which half of the answers belong to other lines. Both
trainings start from there, in processes of their own, with the same random numbers, on the CPU. The one with full
logits learns from the answers of the other, for a rounding may change a word that it samples itself. DIR receives
chunked.jsonl and full.jsonl, with one line per step, report.txt and policy.png.
Takes five to ten minutes on 2 cores.
"""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

import torch
from common.command_line import Parser, refused_input
from common.grpo import LOSSES, Settings, Trainer, warm_up
from common.launch import run_function
from common.model import ModelConfig, Transformer
from common.next_lines import NextLines
from common.peak_memory import PeakMemory
from common.policy_report import Run, explanation, plot, table
from common.results import RUNS, Results, shown

from chunked_ce.objectives import PolicyGradient

OUT = RUNS / "policy"
FIRST = "chunked"  # from whose answers the other training learns too
SIZES = {"width": 64, "depth": 2, "heads": 4}


def parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--out", type=Path, default=OUT, metavar="DIR", help="(runs/policy)")
    option("--text", type=Path, metavar="FILE", help="UTF-8 text (the Zen of Python)")
    described = {
        "steps": "of GRPO",
        "lines": "first lines of the text, which are the prompts",
        "group": "answers to each prompt in a step",
        "epochs": "optimizer steps for the answers of a step",
        "learning_rate": "of GRPO",
        "warm_up": "supervised steps before",
        "seed": "of all random numbers",
    }
    for field in fields(Settings):
        name, kind = field.name.replace("_", "-"), type(field.default)
        text = f"{described[field.name]} ({field.default})"
        option(f"--{name}", type=kind, default=field.default, metavar="N", help=text)
    for name, default in {"clip_low": 0.2, "clip_high": 0.28, "kl": 0.01, "entropy": 1e-4}.items():
        option(f"--{name.replace('_', '-')}", type=float, default=default, metavar="X", help=f"({default})")
    for name, default in SIZES.items():
        option(f"--{name}", type=int, default=default, metavar="N", help=f"({default})")
    return parser


def train(kind: str, arguments: argparse.Namespace, out: Path) -> None:
    """One training, in a process of its own; writes a line of metrics per step."""
    settings, task = settings_of(arguments), NextLines(arguments.lines, arguments.text)
    model, reference = (Transformer(model_of(arguments, task)) for _ in range(2))
    start = torch.load(out / "start.pt")
    model.load_state_dict(start)
    reference.load_state_dict(start)
    trainer = Trainer(kind, model, reference, policy_of(arguments))
    # AdamW divides by the gradient's size: a small eps would let the rounding of zeros move the weights.
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0, eps=1e-4)
    replayed = [None] * settings.steps
    if kind != FIRST:
        replayed = [torch.tensor(record["answers"]) for record in read(out / f"{FIRST}.jsonl")]
    memory = PeakMemory()
    with (out / f"{kind}.jsonl").open("w") as file:
        for step, answers in enumerate(replayed, start=1):
            record = trainer.step(task, settings, optimizer, step, answers)
            record |= {"step": step, "peak_memory_bytes": memory.bytes()}
            print(json.dumps(record), file=file, flush=True)
            seconds = record["sampling_seconds"] + record["training_seconds"]
            print(
                f"{kind:>7}  step {step:3}/{settings.steps}  reward {record['reward']:.3f}"
                f"  loss {record['losses'][-1]:+.4f}  clipped {record['clipped']:6.1%}  KL {record['kl']:.4f}"
                f"  entropy {record['entropy']:.2f}  {seconds:.2f} s",
                flush=True,
            )


def model_of(arguments: argparse.Namespace, task: NextLines) -> ModelConfig:
    context = task.prompts.shape[1] + task.answers.shape[1]
    return ModelConfig(context=context, **{name: getattr(arguments, name) for name in SIZES})


def settings_of(arguments: argparse.Namespace) -> Settings:
    return Settings(**{field.name: getattr(arguments, field.name) for field in fields(Settings)})


def policy_of(arguments: argparse.Namespace) -> PolicyGradient:
    return PolicyGradient(
        clip_low=arguments.clip_low, clip_high=arguments.clip_high, kl=arguments.kl, entropy=arguments.entropy
    )


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train_both(arguments: argparse.Namespace, task: NextLines, out: Path) -> str:
    """Both trainings, whose report it returns."""
    settings = settings_of(arguments)
    torch.manual_seed(settings.seed)
    model = Transformer(model_of(arguments, task))
    warm_up(model, task, settings)
    torch.save(model.state_dict(), out / "start.pt")
    del model
    for kind in LOSSES:  # in a process of its own, whose peak of memory is its own too
        if status := run_function(train, kind, arguments, out):
            sys.exit(f"policy: the training with {kind} logits failed with status {status}")
    chunked, full = (Run(read(out / f"{kind}.jsonl")) for kind in LOSSES)
    plot(chunked, full, out / "policy.png")
    report = f"{table(chunked, full)}\n\n{explanation(settings, chunked)}"
    (out / "report.txt").write_text(report + "\n")
    return report


def main() -> None:
    arguments = parser().parse_args()
    results = Results(arguments.out)
    with refused_input():
        settings_of(arguments)
        policy_of(arguments)
        task = NextLines(arguments.lines, arguments.text)
        model_of(arguments, task)
        results.start()
    with results.kept_at_interrupt():
        report = train_both(arguments, task, results.unfinished)
        results.finish()
    print(f"\n{report}\n\nIn {shown(arguments.out)}: report.txt, policy.png, chunked.jsonl, full.jsonl.")


if __name__ == "__main__":
    main()
