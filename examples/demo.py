"""Trains one model twice, with the chunked loss and with full logits, and compares the two.

Uses two processes on the CPU, or one per CUDA device. Writes its results to runs/demo.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys

import torch
from comparison import HERE, WARM_UP, Pair, Run, circumstances, default_precision, ds_config, plot
from model import LOSSES, ModelConfig
from run_directory import RunDirectory

OUT = HERE.parent / "runs" / "demo"
CONFIG = OUT / "ds_config.json"


def train(loss: str, ranks: int, steps: int) -> Run:
    """Trains in new processes."""
    print(f"\nTraining with --loss {loss}", flush=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    script = [HERE / "train_deepspeed.py", "--deepspeed-config", CONFIG, "--out", OUT / loss]
    command = [*launcher, *script, "--loss", loss, "--steps", str(steps)]
    status = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    if status:
        sys.exit(f"demo: --loss {loss} failed with status {status} (short of memory? try --micro-batch 1)")
    return Run(RunDirectory(OUT / loss).records())


def explanation(config: dict, ranks: int, steps: int) -> str:
    """The meaning of the figures, and how they were measured."""
    model = ModelConfig()
    tokens = config["train_micro_batch_size_per_gpu"] * model.context
    logits = f"its logits over {model.vocab:,} words fill {tokens * model.vocab * 4 / 2**20:,.0f} MiB in fp32"
    return f"A rank's micro-batch is {tokens:,} tokens; {logits}.\n{circumstances(steps, config, ranks)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    option = parser.add_argument
    option("--steps", type=int, default=16, help="of each training (16)")
    option("--precision", choices=("bf16", "fp32"), default=default_precision())
    option("--micro-batch", type=int, help="sequences per rank; the logits' memory is proportional to it")
    arguments = parser.parse_args()
    if arguments.steps <= WARM_UP:
        parser.error(f"--steps must be more than {WARM_UP}, got {arguments.steps}")

    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    config = ds_config(arguments.precision, arguments.micro_batch)
    CONFIG.write_text(json.dumps(config, indent=2))
    ranks = torch.cuda.device_count() or 2
    pair = Pair(*(train(loss, ranks, arguments.steps) for loss in LOSSES))
    plot({"Loss": pair}, OUT / "demo.png")
    report = pair.table() + "\n\n" + explanation(config, ranks, arguments.steps)
    (OUT / "report.txt").write_text(report + "\n")
    print(f"\n{report}\n\nIn {OUT}: report.txt, demo.png, metrics.jsonl of both runs, checkpoints.")


if __name__ == "__main__":
    main()
