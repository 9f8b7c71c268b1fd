"""A teacher trained on real text teaches narrower students, with chunked losses and with full logits.

    torchrun --nproc_per_node 2 examples/distill.py

First trains the teacher. One student then learns its distribution over all 131,072 words (KL), another one the K
likeliest words of each token, which are computed beforehand (top-K). Each is trained twice from the same seed, with
the chunked loss and with full logits, and the two runs are compared: losses, memory, time. A first part of each
sequence, of random length, is a prompt and does not count. All under DeepSpeed, ZeRO 2, on the CPU over gloo or
with one CUDA device per process. DIR receives report.txt, distill.png, and metrics.jsonl and a checkpoint of each run.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from command_line import Parser, refused_input
from comparison import HERE, WARM_UP, Pair, Run, circumstances, default_precision, ds_config, plot
from deepspeed_training import Batches, describe, start_engine, start_process, train
from distillation import LOSSES, TAILS, Student
from model import LanguageModel, ModelConfig, Transformer
from run_directory import RunDirectory
from teacher import HiddenStates, LikeliestWords
from text_data import IGNORED, TextBatches, load_tokens
from torch import nn

OUT = HERE.parent / "runs" / "distill"
SEED = 0


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--out", type=Path, default=OUT, metavar="DIR", help="(runs/distill)")
    option("--teacher-steps", type=int, default=20, metavar="N", help="optimizer steps of the teacher (20)")
    option("--steps", type=int, default=10, metavar="N", help="of each student (10)")
    option("--beta", type=float, default=0.0, metavar="X", help="KL: 0 forward, 1 reverse, or between (0)")
    option("--top-k", type=int, default=64, metavar="K", help="likeliest words of the teacher (64)")
    option("--tail", choices=TAILS, default="bucket", help="top-K: what becomes of the other words (bucket)")
    option("--precision", choices=("bf16", "fp32"), default=default_precision())
    option("--micro-batch", type=int, default=3, metavar="N", help="sequences per rank (3)")
    option("--text", type=Path, nargs="+", metavar="FILE", help="UTF-8 text (Python's manual and sources)")
    option("--teacher-width", type=int, default=128, metavar="N", help="(128)")
    option("--student-width", type=int, default=64, metavar="N", help="(64)")
    option("--depth", type=int, default=4, metavar="N", help="of both (4)")
    option("--heads", type=int, default=4, metavar="N", help="of both (4)")
    option("--context", type=int, default=512, metavar="N", help="(512)")
    arguments = parser.parse_args()
    parser.check_least(arguments, {"teacher_steps": 1, "steps": WARM_UP + 1, "top_k": 1, "micro_batch": 1})
    if not 0 <= arguments.beta <= 1:
        parser.error(f"--beta must be in [0, 1], got {arguments.beta}")
    if arguments.top_k > ModelConfig.vocab:
        parser.error(f"--top-k must be at most {ModelConfig.vocab}, got {arguments.top_k}")
    shared = {name: getattr(arguments, name) for name in ("depth", "heads", "context")}
    for name in ("teacher", "student"):
        try:
            setattr(arguments, name, ModelConfig(width=getattr(arguments, f"{name}_width"), **shared))
        except ValueError as error:
            parser.error(f"{name}: {error}")
    return arguments


class Distillation:
    """The trainings, with what they have in common. Every rank makes the same calls."""

    def __init__(self, arguments: argparse.Namespace, tokens: np.ndarray):
        self.arguments, self.config = arguments, ds_config(arguments.precision, arguments.micro_batch)
        self.text = TextBatches(tokens, arguments.context, SEED)
        self.answers = TextBatches(tokens, arguments.context, SEED, mask_prompt=True)

    def train(self, name: str, network: Callable[[], nn.Module], batches: Batches, steps: int) -> nn.Module:
        """Trains a network made from the seed; returns it."""
        torch.manual_seed(SEED)
        engine = start_engine(network(), self.config)
        run = RunDirectory(self.arguments.out / name)
        if dist.get_rank() == 0:
            run.path.mkdir(exist_ok=True)
            run.start({name: str(value) for name, value in vars(self.arguments).items()}, step=0)
            print(f"\n{name}: {describe(engine)}, {self.text.fingerprint()}", flush=True)
        train(engine, batches, run, steps)
        engine.destroy()
        return engine.module

    def teacher(self) -> Transformer:
        """Trains the teacher, and freezes it in the dtype that it was trained in."""
        config = self.arguments.teacher
        trained = self.train("teacher", partial(LanguageModel, config), self.text, self.arguments.teacher_steps)
        weight = trained.head.weight
        teacher = Transformer(config).to(weight.device, weight.dtype).requires_grad_(False)
        teacher.load_state_dict(trained.state_dict())
        return teacher

    def students(self, method: str, batches: Batches, **keywords) -> None:
        """Trains a student with each of the losses of a method, which take these keywords."""
        for name, loss in LOSSES[method].items():
            network = partial(Student, self.arguments.student, partial(loss, **keywords))
            self.train(f"{method}-{name}", network, batches, self.arguments.steps)

    def likeliest_words(self, teacher: Transformer) -> LikeliestWords:
        started, k, steps = time.perf_counter(), self.arguments.top_k, self.arguments.steps
        shape = {"micro_batches": 1, "batch": self.arguments.micro_batch}
        shape |= {"rank": dist.get_rank(), "ranks": dist.get_world_size()}
        words = LikeliestWords(self.answers, teacher, k, steps=steps, **shape)
        if dist.get_rank() == 0:
            seconds = time.perf_counter() - started
            print(f"\nthe teacher's {k} likeliest words for {steps} steps: {seconds:.1f} s", flush=True)
        return words

    def pair(self, method: str) -> Pair:
        runs = (RunDirectory(self.arguments.out / f"{method}-{name}") for name in LOSSES[method])
        return Pair(*(Run(run.records()) for run in runs))

    def counted_tokens(self) -> list[int]:
        """The tokens of each step and rank that are not ignored."""
        ranks, steps = dist.get_world_size(), range(1, self.arguments.steps + 1)
        shape = {"micro_batches": 1, "batch": self.arguments.micro_batch, "ranks": ranks}
        targets = (self.answers.step(step, rank=rank, **shape)[1] for step in steps for rank in range(ranks))
        return [int((target != IGNORED).sum()) for target in targets]

    def report(self, pairs: dict[str, Pair]) -> str:
        """The figures, what they mean, and how they were measured."""
        arguments, counted = self.arguments, self.counted_tokens()
        vocab, most = ModelConfig.vocab, max(counted)
        loss = RunDirectory(arguments.out / "teacher").records()[-1]["loss"]
        tables = [f"{name}\n{pair.table()}" for name, pair in pairs.items()]
        explanation = f"""\
Teacher: width {arguments.teacher_width}, cross-entropy {loss:.2f} after {arguments.teacher_steps} steps. \
Students: width {arguments.student_width}.
Losses: means over the tokens of all ranks; KL with beta {arguments.beta:g}, \
top-K with K {arguments.top_k} and tail {arguments.tail}.
A rank's micro-batch has {min(counted)} to {most} tokens that count; \
the logits of {most} over {vocab:,} words fill {most * vocab * 4 / 2**20:,.0f} MiB in fp32.
{circumstances(arguments.steps, self.config, dist.get_world_size())}
The teacher's forward is part of a step of KL; for top-K, its words were computed before."""
        return "\n\n".join([*tables, explanation])


def main() -> None:
    arguments = parse_arguments()
    with refused_input():
        distillation = Distillation(arguments, load_tokens(arguments.text))
        arguments.out.mkdir(parents=True, exist_ok=True)
    start_process()
    teacher = distillation.teacher()
    taught = HiddenStates(distillation.answers, teacher)
    distillation.students("kl", taught, teacher_head=teacher.head.weight, beta=arguments.beta)
    distillation.students("top-k", distillation.likeliest_words(teacher), tail=arguments.tail)
    if dist.get_rank() == 0:
        pairs = {"KL": distillation.pair("kl"), "Top-K": distillation.pair("top-k")}
        plot(pairs, arguments.out / "distill.png")
        report = distillation.report(pairs)
        (arguments.out / "report.txt").write_text(report + "\n")
        print(f"\n{report}\n\nIn {arguments.out}: report.txt, distill.png, metrics and checkpoints of all runs.")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
