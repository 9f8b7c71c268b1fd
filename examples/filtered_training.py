"""Trains one model on real text with exact gradients and with the gradient filter, and compares the losses.

A third training has exact gradients too, computed in chunks of another size: by how much it differs from the first is
what rounding alone does to a training, and the measure for the filter's difference.

    python examples/filtered_training.py
    python examples/filtered_training.py --width 1024 --depth 2 --steps 300 --learning-rate 1.5e-4

Uses one process, on the CPU or the first CUDA device. Writes losses.json, losses.png and head.pt to runs/filtered.
head.pt has hidden states, head and targets of the last steps: `chunked-ce bench --tensors runs/filtered/head.pt`.
Takes some eight minutes on 2 cores with instructions for bf16, and far longer without.
"""

import argparse
import json
import statistics
import time
from dataclasses import fields
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from common.model import LanguageModel, ModelConfig, Transformer
from common.text_data import TextBatches, load_tokens
from torch import Tensor

from chunked_ce import ChunkOptions, linear_cross_entropy
from chunked_ce.cli.report import conditions

OUT = Path(__file__).parent.parent / "runs" / "filtered"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXACT, AGAIN, FILTERED = "exact", "exact, other chunks", "filtered"
OPTIONS = {EXACT: ChunkOptions(), AGAIN: ChunkOptions(chunk_size=100), FILTERED: ChunkOptions(gradient_filter="auto")}
COLOURS = {EXACT: "#1f6feb", AGAIN: "#8a6d00", FILTERED: "#f0a35e"}
MODEL_OPTIONS = [field for field in fields(ModelConfig) if field.name != "vocab"]


class Model(LanguageModel):
    """Maps tokens and targets, both (B, T), to the mean loss."""

    def __init__(self, config: ModelConfig, options: ChunkOptions):
        super().__init__(config)
        self.options = options

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = Transformer.forward(self, tokens)
        return linear_cross_entropy(hidden, self.head.weight, targets, options=self.options)


def differences(found: dict, name: str) -> dict[str, float]:
    """Of a training's losses from those of the exact one: the largest of all steps, and that of the last."""
    each = [abs(loss - exact) for loss, exact in zip(found[name]["losses"], found[EXACT]["losses"], strict=True)]
    return {"largest_difference": max(each), "last_difference": each[-1]}


def train(name: str, config: ModelConfig, arguments: argparse.Namespace, batches: TextBatches) -> tuple[Model, dict]:
    """Trains from the seed; returns the model and each step's loss and seconds."""
    torch.manual_seed(0)
    model = Model(config, OPTIONS[name]).to(DEVICE)
    adam = {"betas": (0.9, 0.95), "weight_decay": 0.01, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, **adam)
    warm_up = max(1, arguments.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 1 - 0.9 * step / arguments.steps)
    )
    losses, seconds = [], []
    for step in range(1, arguments.steps + 1):
        started = time.perf_counter()
        inputs, targets = (ids[0].to(DEVICE) for ids in batches.step(step, micro_batches=1, batch=arguments.batch))
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = model(inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
        if step == 1 or step % 10 == 0:
            print(
                f"{name:>19}  step {step:4}/{arguments.steps}  loss {losses[-1]:.4f}  {seconds[-1]:.2f} s", flush=True
            )
    return model, {"losses": losses, "seconds_per_step": statistics.median(seconds)}


def save_head(model: Model, path: Path, arguments: argparse.Namespace, batches: TextBatches) -> dict[str, float]:
    """Saves hidden states, head and targets in bf16; returns their loss and entropy."""
    hidden, targets = [], []
    with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
        for step in range(max(1, arguments.steps - 3), arguments.steps + 1):
            inputs, ids = (part[0].to(DEVICE) for part in batches.step(step, micro_batches=1, batch=arguments.batch))
            hidden.append(Transformer.forward(model, inputs).flatten(0, -2).bfloat16())
            targets.append(ids.flatten())
    hidden, target = torch.cat(hidden), torch.cat(targets)
    weight = model.head.weight.detach().bfloat16()
    torch.save({"hidden": hidden.cpu(), "weight": weight.cpu(), "target": target.cpu()}, path)
    loss, stats = linear_cross_entropy(hidden, weight, target, return_stats=True)
    return {"loss": loss.item(), "entropy": (stats.entropy_sum / stats.num_tokens).item()}


def plot(found: dict, path: Path) -> None:
    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(7, 6), height_ratios=(3, 1), layout="constrained")
    for name, color in COLOURS.items():
        above.plot(found[name]["losses"], color=color, label=name, alpha=0.8)
        pairs = zip(found[name]["losses"], found[EXACT]["losses"], strict=True)
        below.plot([loss - exact for loss, exact in pairs], color=color)
    above.set(ylabel="loss (nats per token)", title="Training with exact and with filtered gradients")
    above.legend()
    below.set(xlabel="step", ylabel="minus exact")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="(60)")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="sequences in a step (4)")
    parser.add_argument("--learning-rate", type=float, default=6e-4, metavar="X", help="(6e-4)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="(runs/filtered)")
    for field in MODEL_OPTIONS:
        parser.add_argument(f"--{field.name}", type=int, default=field.default, metavar="N", help=f"({field.default})")
    arguments = parser.parse_args()
    if min(arguments.steps, arguments.batch) < 1:
        parser.error(f"--steps and --batch must be at least 1, got {arguments.steps} and {arguments.batch}")
    try:
        config = ModelConfig(**{field.name: getattr(arguments, field.name) for field in MODEL_OPTIONS})
    except ValueError as error:
        parser.error(str(error))

    batches = TextBatches(load_tokens(), config.context)
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in COLOURS:
        model, found[name] = train(name, config, arguments, batches)
    at_the_end = save_head(model, arguments.out / "head.pt", arguments, batches)
    summary = {"conditions": conditions(DEVICE.type), "differences": {n: differences(found, n) for n in OPTIONS}}
    (arguments.out / "losses.json").write_text(json.dumps(found | summary | {"head": at_the_end}, indent=1))
    plot(found, arguments.out / "losses.png")
    for name in COLOURS:
        largest, last = summary["differences"][name].values()
        print(f"losses of {name} and exact differ by at most {largest:.1e}, at the end by {last:.1e}", end="; ")
        print(f"{found[name]['seconds_per_step']:.2f} s per step")
    print(f"head.pt: loss {at_the_end['loss']:.2f}, entropy {at_the_end['entropy']:.2f} nats")


if __name__ == "__main__":
    main()
