"""The README and CONTRIBUTING say what is there: examples, targets, links, versions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import cupy_lora

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md")
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def python_blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.S | re.M)


def test_there_is_an_example_per_library():
    assert {"cupy", "jax", "torch"} <= {path.stem.partition("_")[0] for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_readme_shows_the_example_as_it_is(path):
    assert path.read_text() in python_blocks("README.md"), f"README.md: expected a block equal to {path.name}"


def test_readme_shows_no_other_code():
    files = {path.read_text() for path in EXAMPLES}
    assert [block for block in python_blocks("README.md") if block not in files] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_targets_exist(name):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    named = set(re.findall(r"(?:`|^    )make ([a-z-]+)", (ROOT / name).read_text(), re.M))
    assert named, f"{name}: expected make targets"
    assert named <= targets


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_versions_agree():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version is not None
    assert version.group(1) == cupy_lora.__version__


def test_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.M).group(1).split()
    assert sorted(phony) == sorted(re.findall(r"^([a-z-]+):.*## ", makefile, re.M))
