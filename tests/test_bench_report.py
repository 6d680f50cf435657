"""What the benchmark writes: statistics, targets, the report, its tables and plots."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys

import pytest

from bench import model, peers, plot, runner, table


def test_stats():
    found = model.stats(range(1, 12), calls=7)
    assert (found.median, found.p10, found.p90, found.samples, found.calls) == (6.0, 2.0, 10.0, 11, 7)
    with pytest.raises(ValueError, match="at least one"):
        model.stats([])


def test_geometric_mean():
    assert model.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert math.isnan(model.geometric_mean([]))


def test_a_target_over_the_floor_of_the_run():
    case = model.Case("lora", "mixed", 1, None, over_read=(1.25, 1.0))
    assert case.target_us(8.0) == 11.0
    assert case.target_us(None) is None
    assert model.Case("lora", "plain", 1, None, target=3.0).target_us(None) == 3.0


def test_row_rates():
    row = model.Row("lora", "a", model.OURS, "cold", target_us=5.0, nbytes=4_000_000)
    row.set_time(model.stats([4.0]), copy_gbps=4000.0)
    assert row.gbps == pytest.approx(1000.0)  # 4 MB in 4 us
    assert row.percent_copy == pytest.approx(25.0)
    assert row.copy_floor_us == pytest.approx(1.0)


# -- the report


def _rows():
    ours = model.Row("lora", "a", model.OURS, "cold", target_us=5.0, nbytes=1000, floor_us=2.0, record={"vLLM": 9.0})
    ours.set_time(model.stats([4.0, 4.1, 4.2]), 4000.0)
    peer = model.Row("lora", "a", "torch loop", "cold", nbytes=1000)
    peer.set_time(model.stats([8.2]), 4000.0)
    slow = model.Row("lora", "b", model.OURS, "cold", target_us=2.0, nbytes=1000)
    slow.set_time(model.stats([3.0]), 4000.0)
    broken = model.Row("norm", "c", model.OURS, "", status="failed", note="ValueError: x")
    return [ours, peer, slow, broken]


def test_report_file(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_COMMIT", "abc123")
    path = tmp_path / "deep" / "report.json"
    report = model.Report(path, {"gpu": "none"}, ["lora", "--quick"])
    for row in _rows():
        report.add(row)
        head, rows = model.read_report(path)  # whole after every row
        assert rows[-1].case == row.case
    assert head["commit"] == "abc123"
    assert head["command"] == "python -m bench lora --quick"
    assert {"python", "numpy"} <= set(head["versions"])
    assert head["machine"] == {"gpu": "none"}
    content = json.loads(path.read_text())
    fields = {"family", "case", "engine", "median_us", "p10_us", "p90_us", "floor_us", "target_us", "status", "error"}
    assert all(fields <= set(row) for row in content["rows"])
    assert rows[0].median_us == pytest.approx(4.1)
    assert [row.case for row in report.bad] == ["c"]
    content["schema"] = -1
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="expected schema"):
        model.read_report(path)


def test_commit_without_a_checkout(tmp_path, monkeypatch):
    monkeypatch.delenv("BENCH_COMMIT", raising=False)
    monkeypatch.setattr(model, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert model.commit() == "unknown"


def test_the_table_is_aligned_and_names_the_best_peer():
    text = table.text_table(_rows())
    block = text.split("\n\n")[0].split("\n")
    assert block[0] == "[lora]"
    heads, rule, first = block[1], block[2], block[3]
    assert set(rule) == {"-", " "}
    for head in ("us", "1-read", "target"):
        end = heads.index(f" {head} ") + 1 + len(head)
        assert rule[end - 1] == "-"
        assert end == len(rule) or rule[end] == " "
    assert "torch loop 8.2" in first
    assert "0.82" in first  # times its target
    assert "2.00" in first  # times faster than that peer
    assert "FAILED ValueError: x" in text


def test_the_summary_counts_targets_and_names_misses():
    lines = table.summary(_rows())
    assert lines[0].startswith("lora: 1 of 2 rows at target; against the best peer of 1 rows: geometric mean 2.00x")
    assert any("misses: b" in line and "1.50 x target" in line for line in lines)
    assert any(line.strip().startswith("failed: norm c") for line in lines)


def test_a_record_counts_where_no_peer_runs():
    ours = _rows()[0]
    assert table.best_peer(ours, [ours]) == ("vLLM*", 9.0)
    warm = dataclasses.replace(ours, mode="warm")
    assert table.best_peer(warm, [warm]) is None


def test_a_peer_of_this_run_takes_the_place_of_its_record():
    ours, peer = _rows()[:2]
    ours.record = {"torch": 1.0, "vLLM 0.33": 2.0, "FlashInfer FA3": 3.0}
    assert table.record_of(ours, [ours, peer]) == {"vLLM 0.33": 2.0, "FlashInfer FA3": 3.0}
    rows = [ours, peer, *(dataclasses.replace(peer, engine=name) for name in ("vLLM", "FlashInfer FA2"))]
    assert table.record_of(ours, rows) == {"FlashInfer FA3": 3.0}
    assert table.best_peer(ours, rows) == ("FlashInfer FA3*", 3.0)
    wrong = dataclasses.replace(peer, engine="FlashInfer FA3", median_us=None, status="wrong")
    assert table.best_peer(ours, [*rows, wrong]) == ("FlashInfer FA3*", 3.0)
    assert table.best_peer(ours, [*rows, dataclasses.replace(peer, engine="FlashInfer FA3")]) == ("torch loop", 8.2)


def test_every_record_names_a_peer_or_one_that_only_a_record_has():
    engines = {engine for found in peers.PEERS.values() for engine in found}
    for case in (case for names in runner.FAMILIES.values() for stem in names for case in _cases_of(stem)):
        row = model.Row(case.family, case.name, model.OURS, "cold", record=dict(case.record))
        live = [model.Row(case.family, case.name, engine, "cold", median_us=1.0) for engine in engines]
        assert set(table.record_of(row, live)) <= {"LoRAX CUDA"}, case.name


def _cases_of(stem):
    return getattr(importlib.import_module(f"bench.{stem}"), "cases", list)()


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    written = plot.plot({"machine": {"gpu": "none"}, "commit": "abc"}, _rows(), tmp_path / "speed.png")
    assert written == [tmp_path / "speed-lora.png"]
    assert written[0].read_bytes()[:4] == b"\x89PNG"


def test_plot_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RuntimeError, match="expected the package matplotlib"):
        plot.plot({}, _rows(), tmp_path / "speed.png")
