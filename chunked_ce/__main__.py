"""``python -m chunked_ce``: the command line of `chunked_ce.cli`."""

from chunked_ce.cli import main

if __name__ == "__main__":
    main()
