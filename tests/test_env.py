"""The table of environment switches: what counts as on, documented, and complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cupy_lora import _env

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("value", ["1", "true", "yes", "on", "2", " 1 "])
def test_set_switch_is_on(monkeypatch, value):
    monkeypatch.setenv(_env.DEBUG.name, value)
    assert _env.DEBUG.on


@pytest.mark.parametrize("value", ["", "0", "false", "False", "no", "off", " OFF "])
def test_negative_switch_is_off(monkeypatch, value):
    monkeypatch.setenv(_env.DEBUG.name, value)
    assert not _env.DEBUG.on


def test_absent_switch_is_off(monkeypatch):
    monkeypatch.delenv(_env.DEBUG.name, raising=False)
    assert not _env.DEBUG.on


def test_switch_is_read_at_each_use(monkeypatch):
    monkeypatch.setenv(_env.DISABLE_SGMV.name, "1")
    assert _env.DISABLE_SGMV.on
    monkeypatch.setenv(_env.DISABLE_SGMV.name, "0")
    assert not _env.DISABLE_SGMV.on


def test_table_holds_every_switch_of_the_module():
    defined = {value for value in vars(_env).values() if isinstance(value, _env.Switch)}
    assert defined == set(_env.SWITCHES)
    assert len({switch.name for switch in _env.SWITCHES}) == len(_env.SWITCHES)


def test_package_reads_no_other_variable():
    of_others = {"CUPY_CACHE_DIR", "XDG_CACHE_HOME"}  # where caches are, by convention; no switches
    for path in sorted((ROOT / "cupy_lora").rglob("*.py")):
        if path.name == "_env.py":
            continue
        reads = re.findall(r"\bos\.(?:environ|getenv)\b(?:\.get\(|\[|\()?(?:\"(\w+)\")?", path.read_text())
        assert set(reads) <= of_others, f"{path.name}: expected a switch of _env.SWITCHES"


@pytest.mark.parametrize("switch", _env.SWITCHES, ids=lambda switch: switch.name)
def test_readme_documents_the_switch(switch):
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| `{switch.name}`")]
    assert len(rows) == 1, f"README.md: expected one table row for {switch.name}, got {len(rows)}"
    assert switch.effect in rows[0], f"README.md: expected {switch.name}'s row to say {switch.effect!r}"
