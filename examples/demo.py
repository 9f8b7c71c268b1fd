"""Trains one model twice, with the chunked loss and with full logits, and compares the two.

Uses two processes on the CPU, or one per CUDA device. Writes its results to runs/demo.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from model import ModelConfig

HERE = Path(__file__).parent
OUT = HERE.parent / "runs" / "demo"
CONFIG = OUT / "ds_config.json"
WARM_UP = 3  # steps that the median time skips
COLOURS = {"chunked": "#1f6feb", "full logits": "#f0a35e"}


def write_config(precision: str, micro_batch: int | None) -> dict:
    config = json.loads((HERE / "ds_config.json").read_text())
    config["bf16"]["enabled"] = precision == "bf16"
    if micro_batch:
        config["train_micro_batch_size_per_gpu"] = micro_batch
    CONFIG.write_text(json.dumps(config, indent=2))
    return config


def train(loss: str, ranks: int, steps: int) -> list[dict]:
    """Trains in new processes; returns the metrics, one record per step."""
    print(f"\nTraining with --loss {loss}", flush=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    script = [HERE / "train_deepspeed.py", "--deepspeed-config", CONFIG, "--out", OUT / loss]
    command = [*launcher, *script, "--loss", loss, "--steps", str(steps)]
    status = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    if status:
        sys.exit(f"demo: --loss {loss} failed with status {status} (short of memory? try --micro-batch 1)")
    return [json.loads(line) for line in (OUT / loss / "metrics.jsonl").read_text().splitlines()]


class Run:
    """The figures of one training."""

    def __init__(self, metrics: list[dict]):
        self.losses = [record["loss"] for record in metrics]
        self.seconds = statistics.median(record["seconds"] for record in metrics[WARM_UP:])
        self.tokens_per_second = metrics[0]["tokens"] / self.seconds
        self.peak_mib = metrics[-1]["peak_memory_bytes"] / 2**20


def differences(chunked: Run, full: Run) -> list[float]:
    return [ours - theirs for ours, theirs in zip(chunked.losses, full.losses, strict=True)]


def table(chunked: Run, full: Run) -> str:
    lines = ["step   chunked      full   difference"]
    apart = differences(chunked, full)
    for step, losses in enumerate(zip(chunked.losses, full.losses, apart, strict=True), start=1):
        lines.append("{:4}  {:8.4f}  {:8.4f}   {:+10.1e}".format(step, *losses))
    lines.append(f"largest difference of a loss: {max(map(abs, apart)):.1e}")
    lines += ["", f"{'':20}{'chunked':>10}{'full':>10}{'ratio':>8}"]
    for name, ours, theirs, style in (
        ("peak memory, MiB", chunked.peak_mib, full.peak_mib, "10,.0f"),
        ("time per step, s", chunked.seconds, full.seconds, "10.2f"),
        ("tokens per second", chunked.tokens_per_second, full.tokens_per_second, "10,.0f"),
    ):
        lines.append(f"{name:20}{ours:{style}}{theirs:{style}}{ours / theirs:8.2f}")
    return "\n".join(lines)


def explanation(config: dict, precision: str, ranks: int, steps: int) -> str:
    """The meaning of the figures, and how they were measured."""
    model, stage = ModelConfig(), config["zero_optimization"]["stage"]
    tokens = config["train_micro_batch_size_per_gpu"] * model.context
    mebibytes = tokens * model.vocab * 4 / 2**20
    if torch.cuda.is_available():
        device, memory = torch.cuda.get_device_name(), "of tensors on the device"
    else:
        device, memory = f"CPU, {len(os.sched_getaffinity(0))} cores", "of the process, resident"
    where = f"{ranks} ranks ({device}), {precision}, ZeRO {stage}"
    logits = f"its logits over {model.vocab:,} words fill {mebibytes:,.0f} MiB in fp32"
    return f"""\
Both runs: {steps} steps on {where}, the same seed, one after the other.
A rank's micro-batch is {tokens:,} tokens; {logits}.
Peak memory: {memory}, above the state before the first step, on the worst rank.
It includes activations, gradients, AdamW's moments and DeepSpeed's buffers, the same in both runs.
Time per step: median after {WARM_UP} steps; forward, backward, averaging over the ranks and AdamW."""


def plot(chunked: Run, full: Run, path: Path) -> None:
    layout = {"width_ratios": [2.4, 1, 1], "figsize": (11, 4), "layout": "constrained"}
    figure, (losses, memory, seconds) = plt.subplots(1, 3, **layout)
    figure.get_layout_engine().set(wspace=0.08, w_pad=0.1, h_pad=0.1)
    steps = range(1, len(chunked.losses) + 1)
    for label, run, width in (("full logits", full, 7), ("chunked", chunked, 1.8)):
        losses.plot(steps, run.losses, color=COLOURS[label], linewidth=width, label=label)
    difference = max(map(abs, differences(chunked, full)))
    losses.set_title(f"Loss by step; largest difference {difference:.1e}")
    losses.xaxis.get_major_locator().set_params(integer=True)
    losses.legend(frameon=False)
    losses.grid(axis="y", alpha=0.3)
    for axes, title, values, style in (
        (memory, "Peak memory per rank, MiB", (chunked.peak_mib, full.peak_mib), "{:,.0f}"),
        (seconds, "Time per step, s", (chunked.seconds, full.seconds), "{:.2f}"),
    ):
        bars = axes.bar(list(COLOURS), values, color=list(COLOURS.values()), width=0.6)
        axes.bar_label(bars, fmt=style, padding=3)
        axes.set_title(title)
        axes.set_yticks([])
        axes.margins(y=0.12)
        axes.spines["left"].set_visible(False)
    for axes in (losses, memory, seconds):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    fast_bf16 = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    parser = argparse.ArgumentParser(description=__doc__)
    option = parser.add_argument
    option("--steps", type=int, default=16, help="of each training (16)")
    option("--precision", choices=("bf16", "fp32"), default="bf16" if fast_bf16 else "fp32")
    option("--micro-batch", type=int, help="sequences per rank; the logits' memory is proportional to it")
    arguments = parser.parse_args()
    if arguments.steps <= WARM_UP:
        parser.error(f"--steps must be more than {WARM_UP}, got {arguments.steps}")

    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    config = write_config(arguments.precision, arguments.micro_batch)
    ranks = torch.cuda.device_count() or 2
    chunked, full = (Run(train(loss, ranks, arguments.steps)) for loss in ("chunked", "full"))
    plot(chunked, full, OUT / "demo.png")
    report = table(chunked, full) + "\n\n" + explanation(config, arguments.precision, ranks, arguments.steps)
    (OUT / "report.txt").write_text(report + "\n")
    print(f"\n{report}\n\nIn {OUT}: report.txt, demo.png, metrics.jsonl of both runs, checkpoints.")


if __name__ == "__main__":
    main()
