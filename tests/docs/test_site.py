"""The documentation site: built strictly, once for all tests here, its links checked, and seen in a real browser."""

import functools
import importlib.util
import os
import posixpath
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.browser import needs_browser, opened

ROOT = Path(__file__).parents[2]
PAGES = ("index.html", "concepts/shards.html", "reference/losses.html", "figures.html", "models.html")
LOADS_NOTHING = {"canonical", "next", "prev"}  # `rel` of a link that loads nothing


class Document(HTMLParser):
    """What a page defines, links to and loads."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.classes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        self.classes |= set(values.get("class", "").split())
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and not LOADS_NOTHING & set(values.get("rel", "").split()):
            self.loads.append(values["href"])
        else:
            self.loads += [values[name] for name in ("src", "srcset", "poster", "data") if values.get(name)]
        if "style" in values:
            self.loads += in_css(values["style"])


def in_css(text: str) -> list[str]:
    return re.findall(r"url\(\s*['\"]?([^)'\"]+)", text) + re.findall(r"@import\s+['\"]([^'\"]+)", text)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def documents(site) -> dict[str, Document]:
    found = {page.relative_to(site).as_posix(): Document(page.read_text("utf-8")) for page in site.rglob("*.html")}
    del found["404.html"]  # its paths are those of a server's root
    return found


def resolved(page: str, link: str) -> tuple[str, str]:
    """The file of the site that a link names, and the anchor within it."""
    parts = urlsplit(link)
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), unquote(parts.path))) if parts.path else page
    return path, unquote(parts.fragment)


def test_links_and_anchors_lead_somewhere(site, documents):
    broken = []
    for page, document in documents.items():
        for link in document.links:
            if urlsplit(link).scheme or link in ("", "#"):
                continue
            path, anchor = resolved(page, link)
            if path == ".":
                path = "index.html"
            found = documents.get(path)
            if not (site / path).is_file() or (anchor and found and anchor not in found.ids):
                broken.append(f"{page}: {link}")
    assert not broken


def test_nothing_is_loaded_from_elsewhere(site, documents):
    loaded = [(page, url) for page, document in documents.items() for url in document.loads]
    for sheet in site.rglob("*.css"):
        loaded += [(sheet.relative_to(site).as_posix(), url) for url in in_css(sheet.read_text("utf-8"))]
    assert len(loaded) > 100
    outside = []
    for page, url in loaded:
        parts = urlsplit(url)
        if parts.scheme == "data":
            continue
        if parts.scheme or parts.netloc or not (site / resolved(page, url)[0]).is_file():
            outside.append(f"{page}: {url}")
    assert not outside
    # The theme's script fetches a drawing library where a page has such a block.
    assert not any("mermaid" in document.classes for document in documents.values())


def test_links_to_other_sites_are_to_papers_and_projects(documents):
    """No page sends a reader to an address of this project: it has none."""
    hosts = {urlsplit(link).netloc for document in documents.values() for link in document.links}
    assert not {host for host in hosts if "chunked" in host}


def test_reference_has_every_public_name_and_no_other(documents):
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "docstrings.py")
    docstrings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docstrings)
    ids = {name for page, document in documents.items() if page.startswith("reference/") for name in document.ids}
    names = [f"{module}.{name}" for module in docstrings.PUBLIC for name in docstrings.public_names(module)]
    assert len(names) > 60
    assert [name for name in names if name not in ids and name != "chunked_ce.preference"] == []
    modules = {name.rpartition(".")[0] for name in names}
    assert {name for name in ids if name.rpartition(".")[0] in modules} - set(names) - set(docstrings.PUBLIC) == set()


def test_examples_of_docstrings_are_blocks(site):
    """Not quotations, which is what Markdown makes of a prompt."""
    pages = [page.read_text("utf-8") for page in (site / "reference").glob("*.html")]
    assert not any("<blockquote>" in page for page in pages)
    assert sum(page.count('<span class="gp">&gt;&gt;&gt;') for page in pages) > 20


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def address(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@needs_browser
def test_pages_fit_a_phone_and_ask_no_other_host(address):
    with opened(address + PAGES[0], width=390) as (tab, asked):
        for path in PAGES:
            tab.goto(address + path)
            assert tab.evaluate("document.documentElement.scrollWidth") <= 390, path
    assert len(asked) > len(PAGES)
    assert [url for url in asked if not url.startswith((address, "data:"))] == []


@needs_browser
def test_pages_follow_the_system(address):
    with opened(address + "concepts/chunks.html") as (tab, _):
        for scheme, dark in (("light", False), ("dark", True)):
            tab.emulate_media(color_scheme=scheme)
            tab.reload()
            background, text, picture = tab.evaluate("""() => {
                const color = (element, name) =>
                    getComputedStyle(element)[name].match(/[\\d.]+/g).slice(0, 3).map(Number)
                return [color(document.body, "backgroundColor"), color(document.querySelector("article p"), "color"),
                        color(document.querySelector(".picture text"), "fill")]
            }""")
            assert (sum(background) < 3 * 128) is dark
            assert (sum(text) > 3 * 128) is dark
            assert (sum(picture) > 3 * 128) is dark


@needs_browser
@pytest.mark.parametrize("is_served", [True, False])
def test_search_finds_a_name(site, address, is_served):
    """On a server, and opened from its folder."""
    with opened(address if is_served else (site / "index.html").as_uri()) as (tab, _):
        tab.click("input[name=query]")
        tab.keyboard.type("TokenMean")  # keys, since the theme does not listen to other ways of changing the text
        tab.wait_for_selector(".md-search-result__item a", timeout=60000)
        found = tab.eval_on_selector_all(
            ".md-search-result__item a", "links => links.map(link => link.getAttribute('href'))"
        )
    assert any("reference/ranks.html" in link for link in found)
