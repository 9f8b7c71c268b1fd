"""Trains one model twice, with the chunked loss and with full logits, and compares losses, memory and time.

    python examples/demo.py
    python examples/demo.py --steps 40

Each training is that of `train_deepspeed.py`, in two processes on the CPU, or in one per CUDA device. DIR receives
report.txt, demo.png, and metrics.jsonl and a checkpoint of each training.
Takes two to four minutes on 2 cores.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from common.command_line import Parser, refused_input
from common.comparison import EXAMPLES, WARM_UP, Pair, Run, circumstances, default_precision, ds_config, plot
from common.launch import run_ranks
from common.model import LOSSES, ModelConfig
from common.results import RUNS, Results, shown
from common.run_directory import RunDirectory

OUT = RUNS / "demo"


def train(loss: str, ranks: int, steps: int, out: Path) -> Run:
    """Trains in new processes."""
    print(f"\nTraining with --loss {loss}", flush=True)
    (out / loss).mkdir()
    options = ["--deepspeed-config", out / "ds_config.json", "--out", out / loss, "--loss", loss, "--steps", steps]
    status = run_ranks(EXAMPLES / "train_deepspeed.py", options, ranks)
    if status:
        sys.exit(f"demo: --loss {loss} failed with status {status} (short of memory? try --micro-batch 1)")
    return Run(RunDirectory(out / loss).records())


def explanation(config: dict, ranks: int, steps: int) -> str:
    """The meaning of the figures, and how they were measured."""
    model = ModelConfig()
    tokens = config["train_micro_batch_size_per_gpu"] * model.context
    logits = f"its logits over {model.vocab:,} words fill {tokens * model.vocab * 4 / 2**20:,.0f} MiB in fp32"
    return f"A rank's micro-batch is {tokens:,} tokens; {logits}.\n{circumstances(steps, config, ranks)}"


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--out", type=Path, default=OUT, metavar="DIR", help="(runs/demo)")
    option("--steps", type=int, default=16, metavar="N", help="of each training (16)")
    option("--precision", choices=("bf16", "fp32"), default=default_precision(), help="(%(default)s on this machine)")
    option("--micro-batch", type=int, metavar="N", help="sequences per rank, to which the logits are proportional (4)")
    arguments = parser.parse_args()
    parser.check_least(arguments, {"steps": WARM_UP + 1, "micro_batch": 1})

    config, ranks = ds_config(arguments.precision, arguments.micro_batch), torch.cuda.device_count() or 2
    results = Results(arguments.out)
    folder = results.unfinished
    with refused_input():
        results.start()
    with results.kept_at_interrupt():
        (folder / "ds_config.json").write_text(json.dumps(config, indent=2))
        pair = Pair(*(train(loss, ranks, arguments.steps, folder) for loss in LOSSES))
        plot({"Loss": pair}, folder / "demo.png")
        report = pair.table() + "\n\n" + explanation(config, ranks, arguments.steps)
        (folder / "report.txt").write_text(report + "\n")
        results.finish()
    print(f"\n{report}\n\nIn {shown(arguments.out)}: report.txt, demo.png, metrics.jsonl of both runs, checkpoints.")


if __name__ == "__main__":
    main()
