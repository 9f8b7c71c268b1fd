"""Planning a training step: what it takes on each rank, whether that fits, and the smallest change that makes it fit.

All functions are pure and need no torch. A `Run` is a request; `estimate` gives its terms in bytes on one path of the
loss, and `verdict` compares all paths with the memory of a rank.
"""

from chunked_ce.cli.planning.changes import Change
from chunked_ce.cli.planning.estimate import Estimate, Term, estimate
from chunked_ce.cli.planning.loss import LABELS, loss_of, paths_of
from chunked_ce.cli.planning.run import Path, Run
from chunked_ce.cli.planning.verdict import Verdict, verdict

__all__ = [
    "LABELS",
    "Change",
    "Estimate",
    "Path",
    "Run",
    "Term",
    "Verdict",
    "estimate",
    "loss_of",
    "paths_of",
    "verdict",
]
