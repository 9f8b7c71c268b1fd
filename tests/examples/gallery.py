"""Runs the examples, and draws what docs/examples.md shows of them.

    python -m tests.examples.gallery                  # run all of them: half an hour on 2 cores
    python -m tests.examples.gallery demo policy      # run these
    python -m tests.examples.gallery --draw           # only draw, and write the page's table

The losses and the memory of the runs are kept in docs/pictures/examples/runs.json. Times are not: they depend on the
machine, and on whatever else runs on it.
"""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PAGE = ROOT / "docs" / "examples.md"
PICTURES = ROOT / "docs" / "pictures" / "examples"
RUNS = PICTURES / "runs.json"
BEGIN, END = "<!-- python -m tests.examples.gallery writes this table -->\n", "<!-- end -->\n"
COLOURS = ["#f0a35e", "#1f6feb", "#5aa469", "#8a63d2"]
TORCHRUN = "torchrun --nproc-per-node"

# The commands by the labels of their lines and bars; a figure's order of drawing is theirs. `{out}` is a new folder,
# `{fp32}` the examples' configuration of DeepSpeed with one sequence per rank and without bf16: some CPUs have no
# instructions for it.
COMMANDS = {
    "first_loss": {"linear_cross_entropy": "python examples/first_loss.py"},
    "custom_trainer": {"two ranks": f"{TORCHRUN} 2 examples/custom_trainer.py --steps 12"},
    "sharded_head": {f"{ranks} ranks": f"python examples/sharded_head.py --ranks {ranks}" for ranks in (2, 4)},
    "demo": {"": "python examples/demo.py --precision fp32 --steps 6 --micro-batch 1 --out {out}"},
    "train_deepspeed": {
        label: f"{TORCHRUN} 2 examples/train_deepspeed.py --steps 6 --out {{out}} --deepspeed-config {{fp32}}{option}"
        for label, option in {"whole head": "", "--shard-head": " --shard-head"}.items()
    },
    "distill": {
        "": "python examples/distill.py --precision fp32 --steps 5 --teacher-steps 4 --micro-batch 1 --out {out}"
    },
    "policy": {"": "python examples/policy.py --steps 3 --warm-up 20 --lines 4 --group 4 --out {out}"},
    "transformers_trainer": {
        "--plain": f"{TORCHRUN} 2 examples/transformers_trainer.py --steps 8 --plain",
        "LMHead.wrap": f"{TORCHRUN} 2 examples/transformers_trainer.py --steps 8",
    },
    "trl_sft": {
        "--plain": "python examples/trl_sft.py --steps 6 --batch 2 --plain",
        "trl.install": "python examples/trl_sft.py --steps 6 --batch 2",
    },
    "trl_grpo": {
        "--plain": "python examples/trl_grpo.py --steps 4 --warm-up 20 --plain",
        "trl.install": "python examples/trl_grpo.py --steps 4 --warm-up 20",
    },
    "vocab_parallel": {
        f"--tensor-parallel {ranks}": f"{TORCHRUN} 4 examples/vocab_parallel.py --steps 4 --tensor-parallel {ranks}"
        for ranks in (1, 2, 4)
    },
    "pipeline": {
        "head on the last stage": f"{TORCHRUN} 2 examples/pipeline.py --steps 4",
        "--spread-head": f"{TORCHRUN} 2 examples/pipeline.py --steps 4 --spread-head",
    },
}
OTHER_PICTURES = {"filtered_training": "filtered.png"}  # drawn by the command that docs/benchmarks.md shows


def scripts() -> list[Path]:
    """The examples that are there to be run."""
    return sorted(EXAMPLES.glob("*.py"))


def table() -> str:
    """A row for each example, from its docstring: what it shows, its first command, its time on 2 cores."""
    rows = ["| example | what it shows | command | on 2 cores |", "|---|---|---|---|"]
    for script in scripts():
        text = ast.get_docstring(ast.parse(script.read_text("utf-8")))
        name, shows = script.stem, text.splitlines()[0].removesuffix(".")
        command = re.search(rf"^ +(.*examples/{name}\.py.*)$", text, re.MULTILINE)[1]
        time = re.search(r"[Tt]akes (.*?) on 2 cores", text)[1]
        rows.append(f"| [{name}](#{name}) | {shows} | `{command}` | {time} |")
    return "\n".join(rows) + "\n"


def run(label: str, command: str, python: str) -> dict[str, dict]:
    """Losses by step and peak memory in MiB of each training that a command makes."""
    program, *arguments = command.split()
    launcher = {"python": [python], "torchrun": [python, "-m", "torch.distributed.run"]}[program]
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads((EXAMPLES / "ds_config.json").read_text())
        config["bf16"]["enabled"], config["train_micro_batch_size_per_gpu"] = False, 1
        fp32, out = Path(folder) / "fp32.json", Path(folder) / "out"
        fp32.write_text(json.dumps(config))
        filled = [argument.format(out=out, fp32=fp32) for argument in arguments]
        print(f"\n{command}", flush=True)
        environment = os.environ | {"OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen([*launcher, *filled], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        printed = []
        for line in process.stdout:
            print(line, end="", flush=True)
            printed.append(line)
        if process.wait():
            sys.exit(f"{command} ended with status {process.returncode}")
        return read_files(label, out) if out.exists() else read_lines(label, "".join(printed))


def read_files(label: str, out: Path) -> dict[str, dict]:
    """From the lines of metrics that an example has written, ``NAME/metrics.jsonl`` or ``NAME.jsonl``."""
    found = {}
    for path in sorted(out.rglob("*.jsonl")):
        name = path.parent.name if path.stem == "metrics" else path.stem
        records = [json.loads(line) for line in path.read_text().splitlines()]
        losses = [record["loss"] if "loss" in record else record["losses"][-1] for record in records]
        found[label or name] = {"losses": losses, "peak": records[-1]["peak_memory_bytes"] / 2**20}
    return {name: found[name] for name in sorted(found, key=lambda name: "chunked" in name) if name != "teacher"}


def read_lines(label: str, printed: str) -> dict[str, dict]:
    """From the printed lines ``step N  loss X`` and ``... X MiB at its peak``, of which the largest counts."""
    losses = [float(loss) for loss in re.findall(r"^step +\d+ .*?loss +(-?\d+\.\d+)", printed, re.MULTILINE)]
    peaks: dict[str, list[float]] = {}
    for before, peak in re.findall(r"^(.*) ([\d,]+) MiB at its peak$", printed, re.MULTILINE):
        head = re.search(r"(whole|sharded) head", before)
        peaks.setdefault(f"{label}, {head[1]}" if head else label, []).append(float(peak.replace(",", "")))
    return {name: {"losses": losses, "peak": max(peaks.get(name, [0]))} for name in (peaks or [label])}


def draw(runs: dict[str, dict], path: Path) -> None:
    """Losses by step on the left and peak memory on the right, if the runs have both."""
    with_losses = {name: run["losses"] for name, run in runs.items() if run["losses"]}
    with_peaks = {name: run["peak"] for name, run in runs.items() if run["peak"]}
    colours = dict(zip(runs, COLOURS * 2, strict=False))
    panels = bool(with_losses) + bool(with_peaks)
    figure, axes = plt.subplots(1, panels, squeeze=False, figsize=(4.4 * panels, 3), layout="constrained")
    for shown, kind in zip(axes[0], ["losses"] * bool(with_losses) + ["peaks"] * bool(with_peaks), strict=True):
        shown.spines[["top", "right"]].set_visible(False)
        if kind == "losses":
            for width, (name, losses) in zip(range(2 * len(runs), 0, -2), with_losses.items(), strict=False):
                steps = range(1, len(losses) + 1)
                shown.plot(steps, losses, color=colours[name], linewidth=width, label=name)
            shown.set_title("Loss by step")
            shown.xaxis.get_major_locator().set_params(integer=True)
            shown.grid(axis="y", alpha=0.3)
            if len(with_losses) > 1:
                shown.legend(frameon=False)
        else:
            bars = shown.barh(list(with_peaks), list(with_peaks.values()), color=[colours[name] for name in with_peaks])
            shown.bar_label(bars, fmt="{:,.0f}", padding=3)
            shown.set_title("Peak memory of a rank, MiB")
            shown.invert_yaxis()
            shown.margins(x=0.15)
            shown.set_xticks([])
            shown.spines["bottom"].set_visible(False)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def read_runs() -> dict[str, dict]:
    return json.loads(RUNS.read_text()) if RUNS.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of examples (all)")
    parser.add_argument("--python", default=sys.executable, metavar="FILE", help="with TRL, for its examples")
    parser.add_argument("--draw", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(COMMANDS):
        parser.error(f"NAME must be one of {', '.join(COMMANDS)}, got {', '.join(sorted(unknown))}")
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name in [] if arguments.draw else arguments.names or COMMANDS:
        found = {}
        for label, command in COMMANDS[name].items():
            found |= run(label, command, arguments.python)
        runs = read_runs() | {name: {"commands": list(COMMANDS[name].values()), "runs": found}}
        RUNS.write_text(json.dumps(runs, indent=1) + "\n")
    runs = read_runs()
    for name in arguments.names or runs:
        draw(runs[name]["runs"], PICTURES / f"{name}.png")
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.split(END)[1], "utf-8")


if __name__ == "__main__":
    main()
