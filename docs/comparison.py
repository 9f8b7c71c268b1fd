"""Writes the figures of README and docs: the README's one number and its comparison, and every table of results.

python docs/comparison.py    # rewrites README.md and docs/**/*.md between their markers
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import markdown
from chunked_ce.cli.documents import read_document

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
SWEEP = "vocabulary.json"  # time and peak, by the size of the vocabulary
RATIOS = "ratios.json"  # time beside the implementations that torch and DeepSpeed have
PACKAGES = "ratios_packages.json"  # time beside those of packages, at a shape of its own
TABLE = re.compile(r"<!-- (benchmarks/results/\S+\.json) -->\n.*?<!-- end -->", re.DOTALL)
OURS, FULL, COMPILED = "chunked_ce", "full logits", "full logits, compiled"
DTYPES = ("fp32", "bf16")


class Row(NamedTuple):
    """An implementation: facts about it, and its name in the results, if it was measured."""

    title: str
    logits: str
    hardware: str
    losses: str
    ranks: str
    better: str
    implementation: str | None = None


ROWS = (
    Row(
        "**chunked_ce**",
        "a chunk",
        "CPU; CUDA untried",
        "[all of these](docs/reference/losses.md), [your own](docs/objectives.md)",
        "vocabulary shards, ZeRO-3, FSDP2, token mean",
        "",
        OURS,
    ),
    Row('with `gradients="backward"`', "a block", "", "", "", "", "chunked_ce, backward way"),
    Row("with a budget of 4 MiB", "a block", "", "", "", "", "chunked_ce, least memory"),
    Row("full logits in torch", "all", "any", "smoothing, class weights", "", "the logits are there", FULL),
    Row(
        "full logits, compiled",
        "all",
        "any",
        "smoothing, class weights",
        "",
        "nothing to install",
        "full logits, compiled",
    ),
    Row(
        "torch 2.13 `linear_cross_entropy`, 512 rows",
        "a chunk",
        "any",
        "class weights; smoothing with all logits",
        "",
        "nothing to install",
        "torch, 512 rows",
    ),
    Row(
        "DeepSpeed 0.19.8",
        "a block",
        "any",
        "cross-entropy",
        "vocabulary shards",
        "less memory by default",
        "deepspeed",
    ),
    Row(
        "TRL 1.16",
        "a chunk",
        "any; Triton on CUDA",
        "log-probabilities, divergences",
        "",
        "on by default in its trainers",
        "trl",
    ),
    Row(
        "Liger 0.8.5",
        "a chunk",
        "CUDA, partly torch",
        "smoothing, z-loss, softcap, preferences, GRPO, JSD",
        "equal shards",
        "tuned on GPUs",
        "liger, loss per token",
    ),
    Row(
        "CCE 25.1",
        "none",
        "CUDA; compiled elsewhere",
        "softcap, a gradient filter",
        "",
        "the least memory on a GPU",
    ),
    Row("quack 0.6.5", "a chunk", "H100, H200, B200", "cross-entropy", "", "near the limit of these GPUs"),
    Row(
        "Megatron's vocabulary-parallel loss",
        "all of a shard",
        "any",
        "smoothing on one rank",
        "equal shards",
        "part of a whole framework",
    ),
)


def table() -> str:
    """The table of implementations, with what was measured of them."""
    sweep, ratios, packages = (_results(name) for name in (SWEEP, RATIOS, PACKAGES))
    largest = max(result["vocab"] for result in sweep)
    header = ["", "logits", "runs on", "losses", "ranks", "time", "MiB", "better at"]
    lines = [header, ["---"] * len(header)]
    for row in ROWS:
        time, peak = _time(row, ratios, packages), _peak(row, sweep, largest)
        if row.implementation is None or time or peak:
            lines.append([row.title, row.logits, row.hardware, row.losses, row.ranks, time, peak, row.better])
    first = ratios[0]
    note = (
        "Time: forward and backward on a CPU, as a multiple of the three matrix products alone, in fp32 / bf16, at "
        f"{_shape(first)} (†: {_shape(packages[0])}; `benchmarks/results/{RATIOS}`, `{PACKAGES}`). MiB: the peak above "
        f"the inputs in {sweep[0]['dtype']} at {_shape(next(r for r in sweep if r['vocab'] == largest))} (`{SWEEP}`)."
    )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + _wrapped(note)


def headline() -> str:
    """The README's one number."""
    sweep = _results(SWEEP)
    largest = max(result["vocab"] for result in sweep)
    ours, full = (_only(sweep, implementation=name, vocab=largest) for name in (OURS, FULL))
    size = f"{ours['tokens']:,} tokens and {largest:,} words in {ours['dtype']}"
    text = (
        f"**{ours['peak_mib']:,.0f} MiB instead of {full['peak_mib']:,.0f} MiB**, and "
        f"{ours['ratio'] / full['ratio']:.2f} of the time: a loss and its gradients, for {size}, on a CPU."
    )
    compiled = [r for r in sweep if r["implementation"] == COMPILED and r["vocab"] == largest]
    if compiled:
        text += (
            f" Compiled full logits take {compiled[0]['ratio'] / ours['ratio']:.2f} of this library's time, and "
            f"{compiled[0]['peak_mib'] / ours['peak_mib']:.0f} times its memory."
        )
    return _wrapped(text)


PARTS = {"headline": headline, "comparison": table}


def written(text: str) -> str:
    """``text`` with its generated parts as they should be."""
    for name, part in PARTS.items():
        start = f"<!-- {name}: docs/comparison.py -->\n"
        if text.count(start) != 1:
            raise ValueError(f"README.md must have one place for {name}, has {text.count(start)}")
        before, _, rest = text.partition(start)
        _, end, after = rest.partition("<!-- end -->")
        text = f"{before}{start}{part()}\n{end}{after}"
    return text


def _results(name: str) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = read_document(RESULTS / name)["results"]
    return results


def _only(results: list[dict[str, Any]], **values: object) -> dict[str, Any]:
    found = [result for result in results if all(result.get(key) == value for key, value in values.items())]
    if len(found) != 1:
        raise ValueError(f"{values} has {len(found)} results, must have one")
    return found[0]


def _time(row: Row, ratios: list[dict[str, Any]], packages: list[dict[str, Any]]) -> str:
    for results, mark in ((ratios, ""), (packages, "†")):
        found = {
            r["dtype"]: r["ratio"] for r in results if r["implementation"] == row.implementation and not r["ignored"]
        }
        if found:
            return " / ".join(f"{found[dtype]:.2f}" for dtype in DTYPES) + mark
    return ""


def _peak(row: Row, sweep: list[dict[str, Any]], vocab: int) -> str:
    found = [r for r in sweep if r["implementation"] == row.implementation and r["vocab"] == vocab]
    return f"{found[0]['peak_mib']:,.0f}" if found else ""


def _shape(result: dict[str, Any]) -> str:
    return f"N={result['tokens']} D={result['hidden']} V={result['vocab']}"


def _wrapped(text: str) -> str:
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > 100:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    return "\n".join([*lines, line])


def with_tables(text: str) -> str:
    """``text`` with its tables of results as they should be, each between a marker with its file and an end."""

    def table_of(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{markdown(read_document(ROOT / match[1])).strip()}\n<!-- end -->"

    return TABLE.sub(table_of, text)


def main() -> None:
    README.write_text(written(README.read_text("utf-8")), "utf-8")
    for page in (README, *sorted((ROOT / "docs").rglob("*.md"))):
        text = page.read_text("utf-8")
        if (changed := with_tables(text)) != text:
            page.write_text(changed, "utf-8")
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
