"""Examines all classes, some at a time, and writes the page."""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.families.classes import examine_all, names
from tests.families.page import page


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__)
    parser.add_argument("--write", type=Path, help="the page; without it, the findings are printed")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="the names of classes")
    options = parser.parse_args()
    findings = []
    for finding in examine_all(options.only or names(), options.processes):
        findings.append(finding)
        print(*finding, sep="\t", flush=True)
    if options.write is not None:
        options.write.write_text(page(findings), encoding="utf-8")


if __name__ == "__main__":
    main()
