"""The folder that an example writes to: a run that does not end leaves the files of an earlier one as they were."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "runs"


class Results:
    """The folder ``out``. A run writes to ``unfinished`` in it, whose files move to ``out`` once all are whole."""

    def __init__(self, out: Path):
        self.out, self.unfinished = out, out / "unfinished"

    def start(self) -> None:
        """Makes the folders, and removes the files of an unfinished run. Raises `OSError` if it cannot."""
        make(self.out)
        if self.unfinished.exists():
            shutil.rmtree(self.unfinished)
        self.unfinished.mkdir()

    def finish(self) -> None:
        """Moves each file and folder to ``out``, in place of one of the same name; nothing else there changes."""
        for new in sorted(self.unfinished.iterdir()):
            old = self.out / new.name
            if old.is_dir():
                shutil.rmtree(old)
            new.replace(old)
        self.unfinished.rmdir()

    @contextlib.contextmanager
    def kept_at_interrupt(self) -> Iterator[None]:
        """Says where the files are after an error or Ctrl-C, which ends the process with status 130, no traceback."""
        try:
            yield
        except KeyboardInterrupt:
            print(f"\n{Path(sys.argv[0]).stem}: interrupted. {self.files_left()}.", file=sys.stderr, flush=True)
            raise SystemExit(130) from None
        except BaseException:
            print(f"{self.files_left()}.", file=sys.stderr, flush=True)
            raise

    def files_left(self) -> str:
        if not self.unfinished.exists():
            return f"There are no new files in {shown(self.out)}"
        before = any(path != self.unfinished for path in self.out.iterdir())
        untouched = f"; {shown(self.out)} has those of the last complete run" if before else ""
        return f"The files so far are in {shown(self.unfinished)}{untouched}"


def make(folder: Path) -> None:
    """Makes a folder, and says so."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        print(f"Made the folder {shown(folder)}", flush=True)


def shown(path: Path) -> str:
    """A path as someone in the repository's folder would type it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
