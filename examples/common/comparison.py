"""Two trainings side by side, with a chunked loss and with full logits: configuration, figures, table and plot."""

import json
import os
import statistics
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EXAMPLES = Path(__file__).parents[1]
WARM_UP = 3  # steps that the median time skips
COLOURS = {"chunked": "#1f6feb", "full logits": "#f0a35e"}


def default_precision() -> str:
    fast_bf16 = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast_bf16 else "fp32"


def ds_config(precision: str, micro_batch: int | None) -> dict:
    """The examples' DeepSpeed configuration with this precision and so many sequences per rank (None: its own)."""
    config = json.loads((EXAMPLES / "ds_config.json").read_text())
    config["bf16"]["enabled"] = precision == "bf16"
    if micro_batch:
        config["train_micro_batch_size_per_gpu"] = micro_batch
    return config


class Run:
    """The figures of one training."""

    def __init__(self, metrics: list[dict]):
        self.losses = [record["loss"] for record in metrics]
        self.seconds = statistics.median(record["seconds"] for record in metrics[WARM_UP:])
        self.tokens_per_second = metrics[0]["tokens"] / self.seconds
        self.peak_mib = metrics[-1]["peak_memory_bytes"] / 2**20


class Pair(NamedTuple):
    """One training with each of the two losses."""

    chunked: Run
    full: Run

    def differences(self) -> list[float]:
        return [ours - theirs for ours, theirs in zip(self.chunked.losses, self.full.losses, strict=True)]

    def largest_difference(self) -> float:
        return max(map(abs, self.differences()))

    def table(self) -> str:
        chunked, full = self
        lines = ["step   chunked      full   difference"]
        for step, losses in enumerate(zip(chunked.losses, full.losses, self.differences(), strict=True), start=1):
            lines.append("{:4}  {:8.4f}  {:8.4f}   {:+10.1e}".format(step, *losses))
        lines.append(f"largest difference of a loss: {self.largest_difference():.1e}")
        lines += ["", f"{'':20}{'chunked':>10}{'full':>10}{'ratio':>8}"]
        for name, ours, theirs, style in (
            ("peak memory, MiB", chunked.peak_mib, full.peak_mib, "10,.0f"),
            ("time per step, s", chunked.seconds, full.seconds, "10.2f"),
            ("tokens per second", chunked.tokens_per_second, full.tokens_per_second, "10,.0f"),
        ):
            lines.append(f"{name:20}{ours:{style}}{theirs:{style}}{ours / theirs:8.2f}")
        return "\n".join(lines)


def circumstances(steps: int, config: dict, ranks: int) -> str:
    """How the figures were measured."""
    if torch.cuda.is_available():
        device, memory = torch.cuda.get_device_name(), "of tensors on the device"
    else:
        device, memory = f"CPU, {len(os.sched_getaffinity(0))} cores", "of the process, resident"
    precision = "bf16" if config["bf16"]["enabled"] else "fp32"
    where = f"{ranks} ranks ({device}), {precision}, ZeRO {config['zero_optimization']['stage']}"
    return f"""\
Both runs: {steps} steps on {where}, the same seed, one after the other.
Peak memory: {memory}, above the state before the first step, on the worst rank.
It includes activations, gradients, AdamW's moments and DeepSpeed's buffers, the same in both runs.
Time per step: median after {WARM_UP} steps; forward, backward, averaging over the ranks and AdamW."""


def plot(pairs: dict[str, Pair], path: Path) -> None:
    """A row for each pair, below its name: losses, memory and time."""
    layout = {"width_ratios": [2.4, 1, 1], "figsize": (11, 4 * len(pairs)), "layout": "constrained"}
    figure, rows = plt.subplots(len(pairs), 3, squeeze=False, **layout)
    figure.get_layout_engine().set(wspace=0.08, w_pad=0.1, h_pad=0.1)
    for (name, pair), axes in zip(pairs.items(), rows, strict=True):
        draw(name, pair, *axes)
    figure.savefig(path, dpi=150)


def draw(name: str, pair: Pair, losses: plt.Axes, memory: plt.Axes, seconds: plt.Axes) -> None:
    chunked, full = pair
    steps = range(1, len(chunked.losses) + 1)
    for label, run, width in (("full logits", full, 7), ("chunked", chunked, 1.8)):
        losses.plot(steps, run.losses, color=COLOURS[label], linewidth=width, label=label)
    losses.set_title(f"{name} by step; largest difference {pair.largest_difference():.1e}")
    losses.xaxis.get_major_locator().set_params(integer=True)
    losses.legend(frameon=False)
    losses.grid(axis="y", alpha=0.3)
    for axes, title, values, style in (
        (memory, "Peak memory per rank, MiB", (chunked.peak_mib, full.peak_mib), "{:,.0f}"),
        (seconds, "Time per step, s", (chunked.seconds, full.seconds), "{:.2f}"),
    ):
        draw_bars(axes, title, values, style, COLOURS)
    for axes in (losses, memory, seconds):
        axes.spines[["top", "right"]].set_visible(False)


def draw_bars(axes: plt.Axes, title: str, values: tuple[float, float], style: str, colours: dict[str, str]) -> None:
    """A bar for each of two runs, with its value in the format ``style``; ``colours`` by the names of the runs."""
    bars = axes.bar(list(colours), values, color=list(colours.values()), width=0.6)
    axes.bar_label(bars, fmt=style, padding=3)
    axes.set_title(title)
    axes.set_yticks([])
    axes.margins(y=0.12)
    axes.spines["left"].set_visible(False)
