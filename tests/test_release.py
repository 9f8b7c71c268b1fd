"""Versions agree wherever they are written, and what a release shows elsewhere works there."""

import configparser
import importlib.metadata
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import yaml

import chunked_ce

ROOT = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
TEXT = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CHANGELOG.md", "CITATION.cff")}


def test_versions_agree():
    newest = re.search(r"^## (\S+?),", TEXT["CHANGELOG.md"], flags=re.MULTILINE)[1]
    assert chunked_ce.__version__ == importlib.metadata.version("chunked_ce") == newest
    assert yaml.safe_load(TEXT["CITATION.cff"])["version"] == newest


def test_the_workflow_tests_every_supported_python_and_torch():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]
    classifiers = re.findall(r"Python :: (3\.\d+)", SETUP["metadata"]["classifiers"])
    assert matrix["python"] == classifiers
    least = re.search(r"torch>=(\S+)", SETUP["options"]["install_requires"])[1]
    newest = re.search(r"^torch==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)[1]
    assert (matrix["torch"][0], matrix["torch"][-1]) == (f"{least}.*", f"{newest}.*")
    assert workflow["jobs"]["gpu"]["if"] == "vars.GPU_RUNNER != ''"


def test_what_the_workflow_and_the_hooks_run_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for commands in re.findall(r"run: make (.*)", (ROOT / ".github/workflows/ci.yml").read_text()):
        assert {word for word in commands.split() if "=" not in word and word.isidentifier()} <= targets
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {hook["entry"].split()[0] for hook in hooks} == {".venv/bin/ruff", ".venv/bin/mypy"}


@pytest.mark.parametrize("form", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*_*.yml")), ids=lambda path: path.stem)
def test_issue_forms_are_complete(form):
    content = yaml.safe_load(form.read_text())
    assert content["name"] and content["description"]
    assert len({field["id"] for field in content["body"]}) == len(content["body"])
    assert all(field["attributes"]["label"] for field in content["body"])


@pytest.mark.parametrize("repository", ["", "https://example.org/a/b"])
def test_the_description_has_no_relative_links(repository):
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = re.sub(r"^```.*?^```", "", script.description(TEXT["README.md"], repository), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert all(link.startswith(("https://", "#")) for link in links)
    assert any(link.startswith("https://example.org") for link in links) == bool(repository)


def test_the_sdist_has_what_its_tests_need():
    """Every tracked file that is not CI's own goes into the sdist."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode or not tracked.stdout:
        pytest.skip("not a git checkout")
    manifest = (ROOT / "MANIFEST.in").read_text().split()
    always = {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.cfg", "setup.py", ".gitignore", ".ci"}
    packages = {"chunked_ce", "chunked_ce_command.py"}
    missing = {name.split("/")[0] for name in tracked.stdout.splitlines()} - set(manifest) - always - packages
    assert not missing
