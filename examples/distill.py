"""A teacher trained on real text teaches narrower students, with chunked losses and with full logits.

    python examples/distill.py
    python examples/distill.py --beta 0.5 --top-k 128

First trains the teacher. One student then learns its distribution over all 131,072 words (KL), another one the K
likeliest words of each token, which are computed beforehand (top-K). Each is trained twice from the same seed, with
the chunked loss and with full logits, and the two runs are compared: losses, memory, time. A first part of each
sequence, of random length, is a prompt and does not count. All under DeepSpeed, ZeRO 2, in
two processes on the CPU or one per CUDA device; torchrun can start it too. DIR receives report.txt, distill.png, and
metrics.jsonl and a checkpoint of each run.
Takes two to four minutes on 2 cores.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from common.command_line import refused_input
from common.comparison import Run, ds_config, plot
from common.deepspeed_training import Batches, describe, start_engine, start_process, train
from common.distillation import LOSSES, Student
from common.distillation_options import parse_arguments
from common.distillation_report import counted_tokens, read_pairs, report
from common.launch import run_ranks
from common.model import LanguageModel, Transformer
from common.results import Results, shown
from common.run_directory import RunDirectory
from common.teacher import HiddenStates, LikeliestWords
from common.text_data import TextBatches, load_tokens
from torch import nn

SEED = 0


class Distillation:
    """The trainings, with what they have in common. Every rank makes the same calls."""

    def __init__(self, arguments: argparse.Namespace, tokens: np.ndarray, out: Path):
        self.arguments, self.out = arguments, out
        self.config = ds_config(arguments.precision, arguments.micro_batch)
        self.text = TextBatches(tokens, arguments.context, SEED)
        self.answers = TextBatches(tokens, arguments.context, SEED, mask_prompt=True)

    def train(self, name: str, network: Callable[[], nn.Module], batches: Batches, steps: int) -> nn.Module:
        """Trains a network made from the seed; returns it."""
        torch.manual_seed(SEED)
        engine = start_engine(network(), self.config)
        run = RunDirectory(self.out / name)
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
        if dist.get_rank() == 0:
            print(f"\nthe teacher's {k} likeliest words for {steps} steps:", end=" ", flush=True)
        words = LikeliestWords(self.answers, teacher, k, steps=steps, **shape)
        if dist.get_rank() == 0:
            print(f"{time.perf_counter() - started:.1f} s", flush=True)
        return words

    def report(self, ranks: int) -> str:
        """Draws the plot of all trainings, and writes the report, which it returns."""
        arguments = self.arguments
        pairs, teacher = read_pairs(self.out), Run(RunDirectory(self.out / "teacher").records())
        counted = counted_tokens(self.answers, arguments.steps, arguments.micro_batch, ranks)
        plot(pairs, self.out / "distill.png")
        text = report(pairs, teacher, counted, arguments, self.config, ranks)
        (self.out / "report.txt").write_text(text + "\n")
        return text


def train_all(arguments: argparse.Namespace, results: Results) -> None:
    """What each rank does."""
    with refused_input():
        distillation = Distillation(arguments, load_tokens(arguments.text), results.unfinished)
        is_first = os.environ.get("RANK", "0") == "0"
        if is_first:
            results.start()
    start_process()
    teacher = distillation.teacher()
    taught = HiddenStates(distillation.answers, teacher)
    distillation.students("kl", taught, teacher_head=teacher.head.weight, beta=arguments.beta)
    distillation.students("top-k", distillation.likeliest_words(teacher), tail=arguments.tail)
    if is_first:
        report = distillation.report(dist.get_world_size())
        results.finish()
        files = "report.txt, distill.png, metrics and checkpoints of all runs"
        print(f"\n{report}\n\nIn {shown(arguments.out)}: {files}.", flush=True)
    dist.destroy_process_group()


def main() -> None:
    arguments = parse_arguments(__doc__)
    results = Results(arguments.out)
    if "RANK" in os.environ:  # started by torchrun, or by the lines below
        train_all(arguments, results)
        return
    with results.kept_at_interrupt():
        status = run_ranks(Path(__file__), sys.argv[1:], arguments.ranks)
    sys.exit(status)


if __name__ == "__main__":
    main()
