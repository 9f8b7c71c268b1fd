import json
import sys
from pathlib import Path

import pytest

from tests.examples.commands import EXAMPLES

sys.path.insert(0, str(EXAMPLES))  # the examples import each other as scripts do


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A text that is quick to tokenize."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(Path(json.__file__).with_name("decoder.py").read_text())
    return path
