"""The console script ``chunked-ce``.

Importing torch takes seconds, and ``plan`` needs none of it. So `main` has `chunked_ce` imported without its library,
until a command asks for that (`chunked_ce.cli.load_library`).
"""

__all__ = ["is_light", "main"]

is_light = False  # whether `chunked_ce` is imported without torch: read by its ``__init__``


def main() -> None:
    """Run the command line of `chunked_ce.cli`."""
    global is_light
    is_light = True
    from chunked_ce.cli import main as run

    run()
