"""Peak memory of forward and backward above their inputs, beside the memory law's prediction.

Each measurement has a process of its own, warmed up by a small call; `chunked_ce.cli.memory` says what is measured.

    python -m benchmarks.memory
    python -m benchmarks.memory --tokens 1024 --vocab 32768 --dtype bf16
    python -m benchmarks.memory --tokens 1024 4096 16384 --vocab 32768 131072 262144 --full-up-to 0 --json law.json
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import multiprocessing
from pathlib import Path
from typing import NamedTuple

from benchmarks.report import MIB, conditions, dump, print_conditions, print_table
from chunked_ce.cli import memory
from chunked_ce.cli.implementations import BACKWARD, DEVICE, DTYPES, FILTERED, FORWARD, FULL, train_step
from chunked_ce.cli.memory_models import predicted
from chunked_ce.cli.synthetic_inputs import LossInputs
from chunked_ce.cli.worker import WARM_UP
from chunked_ce.plan import MemoryPrediction

__all__ = ["Case", "allowed", "measure", "why_not"]


class Case(NamedTuple):
    """One measurement."""

    implementation: str
    dtype: str
    tokens: int
    hidden: int = 256
    vocab: int = 131072
    device: str = DEVICE

    @property
    def gradients(self) -> int:
        """Bytes of the gradients of hidden states and head."""
        return (self.tokens + self.vocab) * self.hidden * DTYPES[self.dtype].itemsize

    @property
    def prediction(self) -> MemoryPrediction | None:
        """The memory law's; None for implementations without one."""
        sizes = self.tokens, self.vocab, self.hidden
        return predicted(self.implementation, *sizes, dtype=DTYPES[self.dtype], device=self.device)


def allowed(case: Case) -> int:
    """Bytes that the chunked loss may take above its inputs: the gradients, 96 MiB and, where gradients are computed in
    the forward, the fp32 sum of a bf16 head's gradient over the chunks."""
    sums = case.implementation == FORWARD and case.dtype != "fp32"
    return case.gradients + 96 * MIB + sums * 4 * case.vocab * case.hidden


def why_not(device: str = DEVICE) -> str | None:
    """Why the peak cannot be measured here; None if it can."""
    return memory.why_not_measured(device)


def measure(case: Case) -> int:
    """The peak in bytes, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure_in_process, case).result()


def _measure_in_process(case: Case) -> int:
    dtype = DTYPES[case.dtype]
    # A filter has something to drop only where the softmax is as sharp as a trained model's.
    inputs_of = LossInputs.trained if case.implementation == FILTERED else LossInputs.random
    inputs = inputs_of(case.tokens, case.hidden, case.vocab, dtype, device=case.device)
    train_step(case.implementation, LossInputs.random(*WARM_UP, dtype, device=case.device))
    return memory.peak_of(lambda: train_step(case.implementation, inputs), case.device)


def main() -> None:
    arguments = _arguments()
    reason = why_not()
    if reason:
        raise SystemExit(reason)
    where = conditions()
    print_conditions(where)
    results = []
    for dtype, vocab, tokens in itertools.product(arguments.dtype, arguments.vocab, arguments.tokens):
        for name in (FORWARD, BACKWARD, FULL) if tokens <= arguments.full_up_to else (FORWARD, BACKWARD):
            case = Case(name, dtype, tokens, arguments.hidden, vocab)
            results.append(_result(case, measure(case)))
            print(_progress(results[-1]), flush=True)
        if arguments.json:
            dump({"conditions": where, "results": results, "worst": worst(results)}, arguments.json)
    print()
    print_table(
        ("implementation", "dtype", "N", "D", "V", "peak MiB", "of it gradients", "predicted", "peak / predicted"),
        [tuple("-" if value is None else str(value) for value in result.values()) for result in results],
    )
    for name, result in worst(results).items():
        print(f"furthest from the law, {name}: {result['peak_to_predicted']} at {_progress(result)}")


def worst(results: list[dict[str, object]]) -> dict[str, dict[str, object]]:
    """For each implementation with a law, the result that is furthest from it."""
    furthest: dict[str, dict[str, object]] = {}
    for result in results:
        ratio, name = result["peak_to_predicted"], str(result["implementation"])
        if ratio and (name not in furthest or abs(ratio - 1) > abs(furthest[name]["peak_to_predicted"] - 1)):
            furthest[name] = result
    return furthest


def _result(case: Case, peak: int) -> dict[str, object]:
    prediction = case.prediction
    return {
        "implementation": case.implementation,
        "dtype": case.dtype,
        "tokens": case.tokens,
        "hidden": case.hidden,
        "vocab": case.vocab,
        "peak_mib": round(peak / MIB, 1),
        "gradients_mib": round(case.gradients / MIB, 1),
        "predicted_mib": prediction and round(prediction.peak / MIB, 1),
        "peak_to_predicted": prediction and round(peak / prediction.peak, 3),
    }


def _progress(result: dict[str, object]) -> str:
    sizes = f"N={result['tokens']} D={result['hidden']} V={result['vocab']}"
    return f"{result['implementation']}, {result['dtype']}, {sizes}: {result['peak_mib']} MiB"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096, 16384])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", nargs="+", type=int, default=[131072])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--full-up-to", type=int, default=4096, help="the most tokens with full logits")
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
