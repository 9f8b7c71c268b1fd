"""The report of `distill.py`: the figures of its trainings, and how they were measured."""

import argparse
from pathlib import Path

from common.comparison import Pair, Run, circumstances
from common.distillation import LOSSES
from common.model import ModelConfig
from common.run_directory import RunDirectory
from common.text_data import IGNORED, TextBatches


def read_pairs(out: Path) -> dict[str, Pair]:
    """The trainings with each of the two losses, by the name of the method."""
    return {
        title: Pair(*(Run(RunDirectory(out / f"{method}-{name}").records()) for name in LOSSES[method]))
        for method, title in {"kl": "KL", "top-k": "Top-K"}.items()
    }


def counted_tokens(answers: TextBatches, steps: int, batch: int, ranks: int) -> list[int]:
    """The tokens of each step and rank that are not ignored."""
    shape = {"micro_batches": 1, "batch": batch, "ranks": ranks}
    targets = (answers.step(step, rank=rank, **shape)[1] for step in range(1, steps + 1) for rank in range(ranks))
    return [int((target != IGNORED).sum()) for target in targets]


def report(
    pairs: dict[str, Pair],
    teacher: Run,
    counted: list[int],  # as `counted_tokens` returns them
    arguments: argparse.Namespace,
    config: dict,
    ranks: int,
) -> str:
    vocab, most = ModelConfig.vocab, max(counted)
    tables = [f"{name}\n{pair.table()}" for name, pair in pairs.items()]
    explanation = f"""\
Teacher: width {arguments.teacher_width}, cross-entropy {teacher.losses[-1]:.2f} after {len(teacher.losses)} steps. \
Students: width {arguments.student_width}.
Losses: means over the tokens of all ranks; KL with beta {arguments.beta:g}, \
top-K with K {arguments.top_k} and tail {arguments.tail}.
A rank's micro-batch has {min(counted)} to {most} tokens that count; \
the logits of {most} over {vocab:,} words fill {most * vocab * 4 / 2**20:,.0f} MiB in fp32.
{circumstances(arguments.steps, config, ranks)}
The teacher's forward is part of a step of KL; for top-K, its words were computed before."""
    return "\n\n".join([*tables, explanation])
