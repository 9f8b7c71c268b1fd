"""A table and a plot of two GRPO trainings, with chunked_ce and with full logits."""

import os
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common.comparison import draw_bars
from common.grpo import SAMPLED_AT_ONCE, Settings
from common.model import ModelConfig

COLOURS = {"chunked": "#1f6feb", "full": "#f0a35e"}
WARM = 1  # steps that the median time skips


class Run:
    """The figures of one training."""

    def __init__(self, records: list[dict]):
        self.rewards = [record["reward"] for record in records]
        self.losses = [record["losses"] for record in records]
        self.answers = sum(len(record["answers"]) for record in records)
        self.other_answers = sum(record.get("other_answers", 0) for record in records)
        self.sampling, self.training = (
            statistics.median(record[f"{part}_seconds"] for record in records[min(WARM, len(records) - 1) :])
            for part in ("sampling", "training")
        )
        self.peak_mib = records[-1]["peak_memory_bytes"] / 2**20
        self.tokens = statistics.mean(record["tokens"] for record in records)


def differences(chunked: Run, full: Run) -> list[float]:
    """The largest difference of a loss in each step."""
    pairs = zip(chunked.losses, full.losses, strict=True)
    return [max(abs(a - b) for a, b in zip(*pair, strict=True)) for pair in pairs]


def table(chunked: Run, full: Run) -> str:
    lines = [
        "              reward                  loss",
        "step  chunked     full   chunked      full   difference",
    ]
    steps = zip(chunked.rewards, full.rewards, chunked.losses, full.losses, differences(chunked, full), strict=True)
    for step, (reward, other, losses, others, apart) in enumerate(steps, start=1):
        lines.append(f"{step:4}{reward:9.3f}{other:9.3f}{losses[-1]:+10.5f}{others[-1]:+10.5f}{apart:13.1e}")
    lines.append(f"largest difference of a loss: {max(differences(chunked, full)):.1e}")
    lines += [f"answers in which a rounding changed a word: {full.other_answers} of {full.answers}", ""]
    lines.append(f"{'':32}{'chunked':>10}{'full':>10}{'ratio':>8}")
    for name, ours, theirs, style in (
        ("reward, first step", chunked.rewards[0], full.rewards[0], "10.3f"),
        ("reward, last step", chunked.rewards[-1], full.rewards[-1], "10.3f"),
        ("peak memory, MiB", chunked.peak_mib, full.peak_mib, "10,.0f"),
        ("sampling, s per step", chunked.sampling, full.sampling, "10.2f"),
        ("scores and training, s per step", chunked.training, full.training, "10.2f"),
    ):
        ratio = f"{ours / theirs:8.2f}" if theirs else ""
        lines.append(f"{name:32}{ours:{style}}{theirs:{style}}{ratio}")
    return "\n".join(lines)


def explanation(settings: Settings, chunked: Run) -> str:
    """The meaning of the figures, and how they were measured."""
    tokens, cores = round(chunked.tokens), len(os.sched_getaffinity(0))
    logits = f"whose logits over {ModelConfig.vocab:,} words fill {tokens * ModelConfig.vocab * 4 / 2**20:,.0f} MiB"
    steps = f"{settings.group} answers to each of {settings.lines} lines; their log-probabilities under the policy"
    return f"""\
Both runs: {settings.steps} steps from the same start, fp32, one after the other, on a CPU with {cores} cores.
A step: {steps} and the reference;
{settings.epochs} optimizer steps. The loss is the mean over the answers of their tokens' mean. The training with full
logits samples answers too, for its rewards and times, but learns from those of the other.
On average {tokens:,} tokens count, {logits}.
Peak memory: of the process, resident, above the state before the first step. Both contain gradients, AdamW's
moments, and logits of {SAMPLED_AT_ONCE} answers while they are sampled. Times: medians after the first step."""


def plot(chunked: Run, full: Run, path: Path) -> None:
    layout = {"width_ratios": [1.6, 1.6, 1, 1], "figsize": (12, 3.6), "layout": "constrained"}
    figure, (rewards, losses, memory, seconds) = plt.subplots(1, 4, **layout)
    runs = {"full": full, "chunked": chunked}
    for name, run in runs.items():
        style = {"color": COLOURS[name], "linewidth": 6 if name == "full" else 1.8, "label": name}
        rewards.plot(range(1, len(run.rewards) + 1), run.rewards, **style)
        losses.plot(range(1, len(run.losses) + 1), [epochs[-1] for epochs in run.losses], **style)
    rewards.set_title("Reward by step")
    losses.set_title(f"Loss by step; largest difference {max(differences(chunked, full)):.1e}")
    rewards.legend(frameon=False)
    for axes in (rewards, losses):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", alpha=0.3)
    for axes, title, values, style in (
        (memory, "Peak memory, MiB", (chunked.peak_mib, full.peak_mib), "{:,.0f}"),
        (seconds, "Scores and training, s", (chunked.training, full.training), "{:.2f}"),
    ):
        draw_bars(axes, title, values, style, COLOURS)
    for axes in (rewards, losses, memory, seconds):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
