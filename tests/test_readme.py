"""The README and CONTRIBUTING say what is there: examples, targets, links, versions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import cupy_lora
from cupy_lora import dispatch, metadata, punica_kernels

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md")
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def python_blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.S | re.M)


def test_the_table_of_lorax_names_what_is_there():
    """Each function of the drop-in module and each rule by rank has its row; ours in the middle column exist."""
    table = (ROOT / "README.md").read_text().partition("## Coming from LoRAX")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    theirs = " ".join(row[0] for row in rows[2:])
    rules = [name for name in vars(dispatch) if name.isupper() and name[0] != "_" and name != "TYPE_CHECKING"]
    rules += ["has_sgmv", "pad_rank", "pad_to_min_rank", "use_cutlass_shrink", "orient_for_rank"]
    for name in (*(f"punica_kernels.{name}" for name in punica_kernels.__all__), *rules):
        assert re.search(rf"`{re.escape(name)}\b", theirs), f"{name}: expected a row"
    for name in re.findall(r"`([a-zA-Z_]+)[`(.]", " ".join(row[1] for row in rows[2:])):
        assert name == "cupy_lora" or name == "kv_ptrs" or hasattr(cupy_lora, name), name
    for name in ("bgmv", "sgmv"):
        assert all(f"`{name}_{half}`" in theirs for half in ("shrink", "expand", "expand_slice"))
    for name in metadata.__all__:
        assert re.search(rf"`{name}\b", table), f"{name}: expected a row"


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
