"""The quickstart for TRL runs as it stands."""

import pytest

from tests.docs import pages
from tests.docs.test_start import FOLDER, check


@pytest.mark.filterwarnings("default")
def test_trl(capfd):
    page = FOLDER / "trl.md"
    for block in pages.blocks(page, "py"):
        exec(compile(block, str(page), "exec"), {})
    check(page, capfd.readouterr().out)
