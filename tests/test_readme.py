"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.filterwarnings("default")
def test_python_blocks_run():
    """The blocks marked ``python``, in order and in one namespace; those marked ``py`` need several processes."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 2
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)


def test_commands_exist():
    """Every ``make`` target that the README names is in the Makefile."""
    targets = set(re.findall(r"^`?make (\w+)", README.read_text(encoding="utf-8"), flags=re.MULTILINE))
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    assert targets
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)
