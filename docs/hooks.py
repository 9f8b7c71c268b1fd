"""Hooks of mkdocs: pages made of files outside ``docs/``, and links to them.

README is the home page. The other texts at the top are pages, and so is the text of every file of the repository that a
page links to. Links stay those that a reader of the repository follows.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
TOP = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
LANGUAGES = {".py": "python", ".json": "json", ".ipynb": "json", ".yml": "yaml", ".toml": "toml", ".cfg": "ini"}
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
NAMED = re.compile(r"\[(\w+\.md)\]\(([^)\s#:]*\1)(#[^)\s]*)?\)")  # a link to a page by the name of its file
TITLE = re.compile(r"^# (.+)$", re.MULTILINE)
PICTURE = re.compile(r'<img [^>]*src="[^"]*pictures/(\w+\.svg)"[^>]*>')
STYLE = re.compile(r"<style>.*?</style>\n?", re.DOTALL)
FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$", re.DOTALL | re.MULTILINE)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that come from outside ``docs/``."""
    for name, uri in TOP.items():
        if (ROOT / name).exists():
            files.append(File.generated(config, uri, content=(ROOT / name).read_text("utf-8")))
    for path in sorted(_linked(files)):
        files.append(File.generated(config, _source_uri(path), content=_source_page(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links to their pages, and names of files into titles."""
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]  # it lists nothing but the page, whose table is wide
    origin = _origin(page.file.src_uri)
    if origin is None:
        return markdown

    def link(match: re.Match[str]) -> str:
        uri = _uri((origin.parent / unquote(match[2])).resolve())
        if uri is None:
            return match[0]
        return match[1] + posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".") + match[3]

    def named(match: re.Match[str]) -> str:
        title = TITLE.search((origin.parent / match[2]).read_text("utf-8"))
        return f"[{title[1]}]({match[2]}{match[3] or ''})" if title else match[0]

    return _outside_fences(markdown, lambda text: LINK.sub(link, NAMED.sub(named, text)))


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the pictures of the concepts into the page, so that their text has the colour of the page's."""

    def picture(match: re.Match[str]) -> str:
        svg = (DOCS / "pictures" / match[1]).read_text("utf-8")
        return f'<div class="picture">{STYLE.sub("", svg)}</div>'

    return PICTURE.sub(picture, html)


def on_post_build(*, config: MkDocsConfig) -> None:
    """Write the index of the search as a script too, since a page that is opened from a folder reads no other file."""
    index = Path(config.site_dir) / "search" / "search_index.json"
    if index.exists():
        index.with_suffix(".js").write_text(f"var __index = {index.read_text('utf-8')}", "utf-8")


def _linked(files: Files) -> set[Path]:
    """Files outside ``docs/`` to which pages link."""
    found = set()
    for file in files.documentation_pages():
        origin = _origin(file.src_uri)
        if origin is None:
            continue
        for match in LINK.finditer(FENCE.sub("", origin.read_text("utf-8"))):
            path = (origin.parent / unquote(match[2])).resolve()
            if path.is_file() and ROOT in path.parents and DOCS not in path.parents and _top(path) not in TOP:
                found.add(path)
    return found


def _origin(uri: str) -> Path | None:
    """The file from which a page comes, to which its links are relative."""
    for name, top in TOP.items():
        if uri == top:
            return ROOT / name
    return DOCS / uri if (DOCS / uri).exists() else None


def _uri(path: Path) -> str | None:
    """The page or file of the site that shows ``path``, if one does."""
    if not path.is_file() or ROOT not in path.parents:
        return None
    if DOCS in path.parents:
        return path.relative_to(DOCS).as_posix()
    return TOP.get(_top(path)) or _source_uri(path)


def _top(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _source_uri(path: Path) -> str:
    return f"sources/{_top(path)}.md"


def _source_page(path: Path) -> str:
    language = LANGUAGES.get(path.suffix, "text")
    text = path.read_text("utf-8").rstrip()
    return f"# `{_top(path)}`\n\n`````` {language}\n{text}\n``````\n"


def _outside_fences(text: str, change: Any) -> str:
    """Apply ``change`` to all that is not within a fenced block."""
    parts, end = [], 0
    for fence in FENCE.finditer(text):
        parts += [change(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(text[end:])])
