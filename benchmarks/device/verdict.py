"""What the rows of a run say: derived rates, the table of whole losses, and which claims hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from benchmarks.device.ceilings import BURST, COPY
from benchmarks.device.jobs import Row
from benchmarks.device.losses import Case
from benchmarks.device.timing import Shape
from chunked_ce.cli.implementations import BACKWARD, CCE, CCE_EXACT, FILTERED, FORWARD

__all__ = ["Claim", "Rates", "claims", "markdown", "skipped"]

EXACT_LIMIT = 1.10  # of the floor
FILTERED_LIMITS = {3072: 0.6, None: 0.48}  # up to this D, and above
_WHOLE = ("losses", "peers")  # the sections of whole losses


class Rates:
    """The device's own rates, as soon as its ceilings are measured."""

    def __init__(self) -> None:
        self.burst: float | None = None  # operations per second
        self.copy: float | None = None  # bytes per second

    def derived(self, row: Row) -> Row:
        """The rates of a row, and their shares of the device's own."""
        ms, found = row.get("ms"), {}
        if not ms:
            return found
        if "operations" in row:
            rate = row["operations"] / ms * 1e3
            self.burst = rate if row.get("what") == BURST else self.burst
            found["tflops"] = round(rate / 1e12, 4)
            if self.burst:
                found["of_floor"] = round(self.burst / rate, 4)
        if "bytes" in row:
            rate = row["bytes"] / ms * 1e3
            self.copy = rate if row.get("what") == COPY else self.copy
            found["tbs"] = round(rate / 1e12, 4)
            if self.copy:
                found["of_copy"] = round(rate / self.copy, 4)
        return found


class Claim(NamedTuple):
    """``holds`` is None where it was not measured at every shape; ``details`` has the worst of each shape."""

    text: str
    holds: bool | None
    details: str

    def __str__(self) -> str:
        verdict = {True: "holds", False: "DOES NOT HOLD", None: "not measured"}[self.holds]
        return f"{verdict}: {self.text}" + (f" ({self.details})" if self.details else "")


Losses = dict[str, Row]  # of one case, by name


def claims(rows: Sequence[Row], shapes: Sequence[Shape]) -> list[Claim]:
    """Every target, and whether it was reached; a shape that failed counts as not measured."""
    cases = {shape: _losses(rows, str(Case(shape))) for shape in shapes}

    def everywhere(text: str, value: Callable[[Shape, Losses], float | None], most: float = 1.0) -> Claim:
        """``value`` may be at most ``most`` at every shape."""
        values = {shape: value(shape, losses) for shape, losses in cases.items()}
        details = ", ".join(f"{shape}: {value:.2f}" for shape, value in values.items() if value is not None)
        known = [value for value in values.values() if value is not None]
        if any(value > most for value in known):
            return Claim(text, False, details)
        return Claim(text, True if known and len(known) == len(values) else None, details)

    def of_floor(name: str) -> Callable[[Shape, Losses], float | None]:
        return lambda shape, losses: losses.get(name, {}).get("of_floor")

    def filtered(shape: Shape, losses: Losses) -> float | None:
        share = of_floor(FILTERED)(shape, losses)
        most = FILTERED_LIMITS[3072 if shape.hidden <= 3072 else None]
        return share and share / most

    def ours_over(quantity: str, ours: Sequence[str], peers: Callable[[Row], bool]):
        def ratio(shape: Shape, losses: Losses) -> float | None:
            own = [losses[name][quantity] for name in ours if losses.get(name, {}).get(quantity)]
            others = [row[quantity] for row in losses.values() if peers(row) and row.get(quantity)]
            return min(own) / min(others) if own and others else None

        return ratio

    def exact_peer(row: Row) -> bool:
        return row["section"] == "peers" and bool(row.get("exact"))

    def peer(row: Row) -> bool:
        return row["section"] == "peers"

    def cce(row: Row) -> bool:
        return row["what"] in (CCE, CCE_EXACT)

    limits = " and ".join(f"{most:g}" for most in FILTERED_LIMITS.values())
    return [
        _checks("what the code relies on", rows, "behaviour"),
        _checks("every way is as exact as the plain loss", rows, "correctness"),
        everywhere(f"exact: at most {EXACT_LIMIT:g} of the floor", of_floor(FORWARD), EXACT_LIMIT),
        everywhere("exact: faster than every exact peer", ours_over("ms", (FORWARD,), exact_peer)),
        everywhere(f"filtered: at most {limits} of the floor (D of 2,048, of 4,096)", filtered),
        everywhere("filtered: faster than every peer", ours_over("ms", (FILTERED, FORWARD), peer)),
        everywhere("exact, forward way: at most CCE's memory", ours_over("peak_mib", (FORWARD,), cce)),
        everywhere("exact, backward way: at most CCE's memory", ours_over("peak_mib", (BACKWARD,), cce)),
    ]


def _checks(text: str, rows: Iterable[Row], section: str) -> Claim:
    checked = [row for row in rows if row["section"] == section and ("ok" in row or "error" in row)]
    wrong = [str(row.get("what", row["job"])) for row in checked if not row.get("ok")]
    return Claim(text, not wrong if checked else None, ", ".join(wrong))


def _losses(rows: Iterable[Row], item: str) -> Losses:
    return {row["what"]: row for row in rows if row["section"] in _WHOLE and row.get("item") == item and "what" in row}


def markdown(rows: Sequence[Row]) -> str:
    """Whole losses: a line for each, and for each case the time, its multiple of the floor and the peak in MiB."""
    whole = [row for row in rows if row["section"] in _WHOLE and "what" in row and "skipped" not in row]
    items = list(dict.fromkeys(row["item"] for row in whole))
    lines = [["", *items], ["---"] * (1 + len(items))]
    for name in dict.fromkeys(row["what"] for row in whole):
        by_item = {row["item"]: row for row in whole if row["what"] == name}
        lines.append([str(name), *(_cell(by_item.get(item)) for item in items)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    if "error" in row:
        return "out of memory" if "out of memory" in str(row["error"]).lower() else "failed"
    share = f" = {row['of_floor']:.2f}" if "of_floor" in row else ""
    peak = "" if row.get("peak_mib") is None else f", {row['peak_mib']:,.0f} MiB"
    return f"{row['ms']:.4g} ms{share}{peak}"


def skipped(rows: Iterable[Row]) -> dict[str, str]:
    """What was left out or failed, and why, once each."""
    found = {}
    for row in rows:
        reason = row.get("skipped") or row.get("error")
        if reason:
            name = row.get("what") or row["job"]
            found.setdefault(f"{row['section']}, {name}", str(reason))
    return found
