"""The page docs/models.md, from what was found."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
import transformers

from tests.families.exceptions import REASONS
from tests.families.steps import HEADLESS_STATE, LAZY, REFUSED, STATES, UNBUILT, Finding

LONGEST = 120  # characters of a detail
MEANINGS = dict(
    zip(
        STATES,
        (
            "the loss comes from the hidden states, and no logits exist",
            "the logits are computed once, with a warning that names the operation",
            "the model's code does not call its output embedding, so that `wrap` has no effect",
            "`LMHead.wrap` raises an error",
            "the class is trained by another loss than the cross-entropy of words, and was not tried",
            "no tiny model of it can be built and trained here",
            "loss or gradients differ",
        ),
        strict=True,
    )
)


def page(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.state for finding in findings)
    summary = [(state, MEANINGS[state], str(counts[state])) for state in STATES if counts[state]]
    tried = len(findings) - counts[UNBUILT] - counts[HEADLESS_STATE]
    others = sorted((one for one in findings if one.state != LAZY), key=lambda one: (STATES.index(one.state), one.name))
    lazy = [(f"`{one.name}`", one.detail) for one in findings if one.state == LAZY]
    return "\n".join(
        [
            "# Models of Transformers",
            "",
            "`python -m tests.families --write docs/models.md` builds a tiny model of every class with a",
            "head of words, and takes one training step in float32 with `LMHead.wrap` and one without. Loss",
            "and gradients must be as close to those of the model in float64 as the plain model's are; where",
            "a model's code casts to float32, marked below, within 1e-6 of the plain model's. No allocation",
            "may be as large as the logits.",
            "",
            f"With Transformers {transformers.__version__} and torch {torch.__version__.split('+')[0]}, "
            f"{len(findings)} classes, of which {tried} were built and trained:",
            "",
            *table(("class", "meaning", "number"), summary),
            "",
            "A class that is not lazy trains as without `wrap`. [drop_in.md](drop_in.md) says what is followed,",
            "and what to do where the logits are a function of an embedding.",
            "",
            "## Not lazy",
            "",
            *table(("class", "state", "why"), [(f"`{one.name}`", one.state, why(one)) for one in others]),
            "",
            "## Lazy",
            "",
            *table(("class", "compared in"), [(name, detail or "float64") for name, detail in lazy]),
            "",
        ]
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells]


def why(finding: Finding) -> str:
    """The error up to its first colon, or the operation, and the reason."""
    reason, detail = REASONS.get(finding.name), finding.detail
    if finding.state == UNBUILT:
        shortened = f"{detail[: LONGEST - 3].rsplit(' ', 1)[0]} ..."
        return reason or (detail if len(detail) <= LONGEST else shortened)
    if finding.state == REFUSED:
        detail = re.sub(r"^\w+: ", "", detail).split(": ")[0]
    return f"{detail}: {reason}" if reason else detail


def rows_of(text: str) -> dict[str, str]:
    """The state of each class, by the page."""
    lazy = text.index("## Lazy")
    others = re.findall(r"^\| `(\w+)` \| ([\w ]+) \|", text[:lazy], re.MULTILINE)
    return dict(others) | dict.fromkeys(re.findall(r"^\| `(\w+)` \|", text[lazy:], re.MULTILINE), LAZY)


def counts_of(text: str) -> dict[str, int]:
    """The number of classes in each state, by the page's summary."""
    found = re.findall(r"^\| ([\w ]+) \| [^|]+ \| (\d+) \|$", text, re.MULTILINE)
    return {state: int(number) for state, number in found}
