"""The benchmark's command: a dry run of every family over NumPy arrays, cases that fail, the sweep."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import bench_host, bench_lora, bench_norm, model, precompile, runner, sweep, targets
from bench.harness import DryRig

ROOT = Path(__file__).resolve().parent.parent


def test_dry_run_of_every_family(tmp_path, capsys):
    path = tmp_path / "dry.json"
    assert command.main(["all", "--dry-run", "--json", str(path), "--cases", "^(?!host (first call|start))"]) == 0
    rows = model.read_report(path)[1]
    states = {}
    for row in rows:
        states.setdefault(row.family, set()).add(row.status)
    for family in runner.FAMILIES:
        try:
            runner.load_family(family)
        except LookupError:
            assert states[family] == {"missing"}
        else:
            assert states[family] <= ({"dry", "missing"} if family == "host" else {"dry"}), family
    assert states["lora"] == states["norm"] == states["kv"] == {"dry"}
    checked = [row for row in rows if row.status == "dry"]
    assert all(row.error is not None and row.error <= 1.0 for row in checked)
    assert len(checked) > 200
    assert "lora decode 64 r16 distinct" in capsys.readouterr().out


def test_first_call_runs_in_its_own_process():
    cold, warm = bench_host.first_call_rows("rms_norm", dry=True)
    assert (cold.mode, warm.mode) == ("cold cache", "warm cache")
    assert cold.status == "dry"
    assert "first_call" in cold.note


def test_start_runs_in_its_own_process():
    cold, warm = bench_host.start_rows(dry=True)
    assert (cold.mode, warm.mode) == ("cold cache", "warm cache")
    assert warm.target_us == 1e3 * targets.START_TO_RESULT_MS
    for step in ("import_cupy", "context", "weights", "batch", "add_lora", "whole process"):
        assert f"{step} " in warm.note


class _Family:
    """Three cases: one wrong, one that raises, one right."""

    __name__ = "bench.bench_nothing"
    FAMILY = "norm"
    NEEDS = ()

    @staticmethod
    def cases():
        return [model.Case("norm", name, 8, name) for name in ("wrong", "raises", "right")]

    @staticmethod
    def shrunk(case):
        return case

    @staticmethod
    def build(case, rig, sets):
        def call():
            if case.params == "raises":
                raise ValueError("no such shape")

        return model.Work([call] * sets, lambda: 7.0 if case.params == "wrong" else call() or 0.5)


def test_a_bad_case_is_reported_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(runner, "load_family", lambda family: [_Family])
    path = tmp_path / "report.json"
    assert command.main(["norm", "--dry-run", "--json", str(path)]) == 1
    rows = model.read_report(path)[1]
    assert [(row.case, row.status) for row in rows] == [
        ("wrong", "wrong"),
        ("raises", "failed"),
        ("right", "dry"),
        ("right", "dry"),
    ]
    assert rows[0].median_us is None
    assert rows[1].note == "ValueError: no such shape"
    assert "no such shape" in capsys.readouterr().err


def test_a_lost_device_stops_the_run(monkeypatch):
    class Lost(DryRig):
        def sync(self):
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(runner, "load_family", lambda family: [_Family])
    report = model.Report(None, {}, [])
    runner.run_families(["norm"], Lost(), report, runner.Options(cases="raises|right"))
    assert [row.case for row in report.rows] == ["raises"]


def test_a_hanging_case_ends_the_process():
    code = "import time; from bench.model import watchdog\nwith watchdog(0.2, 'a case'): time.sleep(30)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode == 3
    assert "a case did not end" in done.stderr
    with model.watchdog(30.0, "nothing"):
        pass


def test_a_spent_budget_skips(monkeypatch):
    monkeypatch.setattr(runner, "load_family", lambda family: [_Family])
    report = model.Report(None, {}, [])
    runner.run_families(["norm"], DryRig(), report, runner.Options(budget=-1.0))
    assert {row.status for row in report.rows} == {"skipped"}


def test_a_missing_module_is_missing_not_fatal(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_norm, "NEEDS", ("rms_norm_of_the_future",))
    assert command.main(["norm", "--dry-run"]) == 1
    assert "cupy_lora.rms_norm_of_the_future is not there" in capsys.readouterr().out


def test_a_shard_calls_its_share_once(monkeypatch):
    called = []

    class Counting(_Family):
        @staticmethod
        def build(case, rig, sets):
            assert sets == 1
            return model.Work([lambda: called.append(case.name)], lambda: pytest.fail("a shard checks nothing"))

    monkeypatch.setattr(runner, "load_family", lambda family: [Counting])
    runner.run_families(["norm"], DryRig(), model.Report(None, {}, []), runner.Options(shard=(1, 2)))
    assert called == ["raises"]


def test_every_module_of_a_family_says_so():
    for family, stems in runner.FAMILIES.items():
        for stem in stems:
            if stem != "bench_attention" or (ROOT / "bench" / f"{stem}.py").exists():
                assert family == importlib.import_module(f"bench.{stem}").FAMILY


def test_bad_arguments(capsys):
    assert command.main(["nothing", "--dry-run"]) == 2
    assert "expected families among" in capsys.readouterr().err


def test_nothing_imports_cupy_or_torch():
    code = "import sys, bench.__main__; sys.exit(bool({'torch', 'cupy', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0


# -- the sweep and the compile processes


def test_specs():
    specs = sweep.parse_specs(["direct:8:2|4:8", "ring:16:1:8:3|4", "direct:8:2:8"])
    assert [spec.name for spec in specs] == ["direct:8:2:8", "direct:8:4:8", "ring:16:1:8:3", "ring:16:1:8:4"]
    config = specs[3].config()
    assert (config.form, config.rows, config.cluster, config.warps, config.stages) == ("ring", 16, 1, 8, 4)
    for bad in ("a:1:2:3:4:5", "direct:8:", "direct:8,split"):
        with pytest.raises(ValueError, match="--configs: expected"):
            sweep.parse_specs([bad])
    with pytest.raises(ValueError, match="expected fields of LoraConfig"):
        sweep.parse_specs(["direct:8,nothing=1"])[0].config()
    assert sweep.parse_specs(sweep.DEFAULT)


def test_random_layers_repeat_and_differ():
    layers = sweep.random_layers(50, 3)
    assert len(set(layers)) == 50
    assert layers == sweep.random_layers(50, 3)
    assert layers != sweep.random_layers(50, 4)
    tuned = {case.params for case in bench_lora.cases()}
    assert not tuned & set(layers)
    assert all(bench_lora.slots_of(layer).shape == (layer.tokens,) for layer in layers)


def test_sweep_text():
    def row(case, config, us, status="ok"):
        times = {} if us is None else {"median_us": us, "p10_us": us, "p90_us": us}
        return {"case": case, "config": config, "status": status, "floor_us": 1.0, "target_us": 4.0, **times}

    rows = [row("a", sweep.CHOSEN, 5.0), row("a", "direct:8:2:8", 4.0), row("a", "ring:16:1:8:3", None, "wrong")]
    rows += [row("b", sweep.CHOSEN, 4.1), row("b", "direct:8:2:8", 4.0)]
    text = sweep.text(rows)
    assert "a: best direct:8:2:8 4.00 us (1.00 x target), chosen 5.00 (1.25 x best)" in text
    assert "wrong  ring:16:1:8:3" in text
    assert "within 10% of the best on 1 of 2 cases" in text


def test_dry_sweep(tmp_path, capsys):
    path = tmp_path / "sweep.json"
    configs = ["--configs", "direct:8:1:4"]
    code = command.main(["sweep", "--dry-run", "--cases", "decode 8 ", "--json", str(path), *configs])
    rows = json.loads(path.read_text())["rows"]
    assert code == 0, rows
    assert {row["config"] for row in rows} == {sweep.CHOSEN, "direct:8:1:4"}
    assert all(row["error"] <= 1.0 for row in rows if row["config"] == sweep.CHOSEN)
    capsys.readouterr()
    assert command.main(["table", str(path)]) == 0
    assert "decode 8 r16 distinct" in capsys.readouterr().out


def test_child_arguments():
    given = ["lora", "--quick", "--json", "a.json", "--jobs=8", "--peers", "auto", "--plot", "p", "--cases", "r16"]
    assert precompile.child_arguments(given) == ["lora", "--quick", "--cases", "r16", "--peers", "none"]
