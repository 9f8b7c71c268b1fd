"""Metadata that depends on where the project is hosted: its URLs, and the README with links that work elsewhere.

``CHUNKED_CE_REPOSITORY``, the address of the repository, makes links absolute; without it, the description keeps their
texts only. Everything else is in setup.cfg.
"""

import os
import re
from pathlib import Path

from setuptools import setup


def description(text: str, repository: str) -> str:
    """The README ``text`` for a page that has no file of the repository beside it."""
    image, link = r"!\[([^\]]*)\]\((?!https?:)([^)]*)\)\n*", r"(?<!!)\[([^\]]*)\]\((?!https?:|#)([^)]*)\)"
    if not repository:
        return re.sub(link, r"\1", re.sub(image, "", text))
    text = re.sub(image, rf"![\1]({repository}/raw/main/\2)\n\n", text)
    return re.sub(link, rf"[\1]({repository}/blob/main/\2)", text)


if __name__ == "__main__":
    repository = os.environ.get("CHUNKED_CE_REPOSITORY", "").rstrip("/")
    setup(
        long_description=description(Path("README.md").read_text(encoding="utf-8"), repository),
        long_description_content_type="text/markdown",
        project_urls={
            "Source": repository,
            "Issues": f"{repository}/issues",
            "Changelog": f"{repository}/blob/main/CHANGELOG.md",
        }
        if repository
        else {},
    )
