"""Files that commands write are whole, whatever ends the command, and the checks before it leave nothing behind."""

import json
import os
import sys
from pathlib import Path

import pytest

from chunked_ce.cli import files, main


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    files.dump({"a": 1}, path)

    def full(self, data):
        raise OSError("no space")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        files.dump({"a": 2}, path)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_goes_on_pointing(tmp_path):
    path, link = tmp_path / "out.json", tmp_path / "link.json"
    link.symlink_to(path)
    files.write_whole(link, "text")
    assert link.is_symlink() and path.read_text() == "text"


def test_a_device_is_not_replaced():
    files.write_whole(Path(os.devnull), "text")
    assert not Path(os.devnull).is_file()
    assert files.prepare(Path(os.devnull), "--json") is None


def test_the_check_makes_folders_and_nothing_else(tmp_path):
    path = tmp_path / "new" / "out.json"
    assert files.prepare(path, "--json") == path.parent
    assert files.prepare(path, "--json") is None
    assert list(path.parent.iterdir()) == []
    with pytest.raises(ValueError, match="--json must be a file that can be written"):
        files.prepare(path.parent, "--json")


@pytest.mark.parametrize("arguments", [["plan", "--model", "gpt2"], ["plan", "--model", "gpt2", "--json"], ["--help"]])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_goes_away(arguments, stream, monkeypatch, capsys):
    """As in ``chunked-ce plan | head``, where head has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, stream, pipe)
        with pytest.raises(SystemExit) as ending:
            main(arguments if stream == "stdout" else ["plan"])
        monkeypatch.undo()
    assert ending.value.code == 141
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""
