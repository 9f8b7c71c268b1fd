"""What the other two of three ranks see when one is lost, and after how many seconds: the table of docs/distributed.md.

python -m benchmarks.faults [--timeout 4] [--how killed stopped]
"""

import argparse

from tests.distributed.lost_ranks import ODD_ONE, RANKS, Scene, Seen, lose

HOW = "killed", "stopped", "a call more", "a call less"
PHASES = {
    "own": {
        "forward": (
            "the comparison of calls",
            "the start of the forward",
            "tokens",
            "hidden states",
            "row statistics",
            "hidden gradients",
            "the end of a call",
            "upstream gradients",
        ),
        "backward": ("the start of the backward",),
    },
    "same": {
        "forward": ("the comparison of calls", "row statistics", "hidden gradients"),
        "backward": ("the start of the backward",),
    },
}


def scenes() -> list[Scene]:
    found = [
        Scene(how, tokens, collective, way)
        for how in ("killed", "stopped")
        for tokens, ways in PHASES.items()
        for way, collectives in ways.items()
        for collective in collectives
    ]
    return found + [Scene(how, tokens) for how in ("a call more", "a call less") for tokens in PHASES]


def row(scene: Scene, seen: dict[int, Seen]) -> str:
    """A row of a table in Markdown."""
    ranks = [rank for rank in range(RANKS) if rank != ODD_ONE]
    missing = [rank for rank in ranks if rank not in seen]
    if missing:
        return f"| {scene.how} | {scene.tokens} | {scene.collective} | no error on {missing} | |"
    names = {_named(each.message) for each in seen.values()}
    seconds = ", ".join(f"{seen[rank].seconds:.2f}" for rank in ranks)
    codes = {each.exit_code for each in seen.values()}
    ended = "" if codes == {0} else f", exit codes {codes}"
    return f"| {scene.how} | {scene.tokens} | {scene.collective} | {'; '.join(sorted(names))}{ended} | {seconds} |"


def _named(message: str) -> str:
    """The collective that failed; the one after the loss is torch's own."""
    name, found, _ = message.partition(" over the vocabulary group failed")
    return name if found else "torch's all-reduce"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timeout", type=float, default=4.0, help="of the process group, in seconds")
    parser.add_argument("--how", nargs="*", default=HOW, choices=HOW, help="what happens to the odd rank")
    arguments = parser.parse_args()
    print("| the odd rank is | tokens | at | the others' error names | after seconds |\n|---|---|---|---|---|")
    for scene in scenes():
        if scene.how in arguments.how:
            print(row(scene, lose([scene], arguments.timeout)[scene]), flush=True)


if __name__ == "__main__":
    main()
