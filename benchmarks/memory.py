"""Peak memory of forward and backward above their inputs, beside the memory law's prediction.

Each measurement has a process of its own, warmed up by a small call. On the CPU the peak is that of the process's
resident memory (Linux), so it holds what the matrix library and the C allocator keep too; on a GPU it is the peak of
torch's allocator.

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

from benchmarks.contestants import BACKWARD, DEVICE, DTYPES, FORWARD, FULL, Problem, train_step
from benchmarks.report import MIB, conditions, print_conditions, print_table, write
from chunked_ce.cli import memory
from chunked_ce.cli.laws import predicted
from chunked_ce.plan import MemoryPrediction

__all__ = ["Case", "allowed", "measure", "why_not"]

_WARM_UP = (64, 64, 4100)  # N, D and V: small, and more words than one product covers on a CPU


class Case(NamedTuple):
    """One measurement."""

    contestant: str
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
        """What the memory law says; None for those it says nothing about."""
        sizes = self.tokens, self.vocab, self.hidden
        return predicted(self.contestant, *sizes, dtype=DTYPES[self.dtype], device=self.device)


def allowed(case: Case) -> int:
    """Bytes that the chunked loss may take above its inputs: the gradients, what bf16 gradients of the head are summed
    in over chunks (in the forward way), and 96 MiB."""
    sums = case.contestant == FORWARD and case.dtype != "fp32"
    return case.gradients + 96 * MIB + sums * 4 * case.vocab * case.hidden


def why_not(device: str = DEVICE) -> str | None:
    """Why nothing can be measured here; None if it can."""
    return memory.why_not_measured(device)


def measure(case: Case) -> int:
    """The peak in bytes, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure_here, case).result()


def _measure_here(case: Case) -> int:
    dtype = DTYPES[case.dtype]
    problem = Problem.random(case.tokens, case.hidden, case.vocab, dtype, device=case.device)
    train_step(case.contestant, Problem.random(*_WARM_UP, dtype, device=case.device))
    return memory.peak_of(lambda: train_step(case.contestant, problem), case.device)


def main() -> None:
    arguments = _arguments()
    reason = why_not()
    if reason:
        raise SystemExit(reason)
    where = conditions()
    print_conditions(where)
    results = []
    for dtype, vocab, tokens in itertools.product(arguments.dtype, arguments.vocab, arguments.tokens):
        contestants = (FORWARD, BACKWARD, FULL) if tokens <= arguments.full_up_to else (FORWARD, BACKWARD)
        for contestant in contestants:
            case = Case(contestant, dtype, tokens, arguments.hidden, vocab)
            results.append(_result(case, measure(case)))
            print(_progress(results[-1]), flush=True)
        if arguments.json:
            write(arguments.json, where, results, worst=worst(results))
    print()
    print_table(
        ("contestant", "dtype", "N", "D", "V", "peak MiB", "of it gradients", "predicted", "peak / predicted"),
        [tuple(_cell(value) for value in result.values()) for result in results],
    )
    for contestant, result in worst(results).items():
        print(f"furthest from the law, {contestant}: {result['peak_to_predicted']} at {_progress(result)}")


def worst(results: list[dict[str, object]]) -> dict[str, dict[str, object]]:
    """For each contestant with a law, the result that is furthest from it."""
    found: dict[str, dict[str, object]] = {}
    for result in results:
        ratio, name = result["peak_to_predicted"], str(result["contestant"])
        if ratio and (name not in found or abs(ratio - 1) > abs(found[name]["peak_to_predicted"] - 1)):
            found[name] = result
    return found


def _result(case: Case, peak: int) -> dict[str, object]:
    prediction = case.prediction
    return {
        "contestant": case.contestant,
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
    return f"{result['contestant']}, {result['dtype']}, {sizes}: {result['peak_mib']} MiB"


def _cell(value: object) -> str:
    return "-" if value is None else str(value)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096, 16384])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", nargs="+", type=int, default=[131072])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--full-up-to", type=int, default=4096, help="tokens that the full logits are measured for")
    parser.add_argument("--json", type=Path, help="where to write the results too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
