"""The benchmark's pure parts, and a dry run of every family over NumPy arrays."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from bench import __main__ as command
from bench import (
    bench_attention,
    bench_bgmv,
    bench_host,
    bench_lora,
    bench_lora_batch,
    bench_lora_weights,
    bench_metadata,
    bench_norm,
    bench_paged_kv,
    bench_sgmv,
    model,
    peers,
    plot,
    precompile,
    runner,
    sweep,
    table,
    targets,
)
from bench.bench_lora import Layer
from bench.harness import BFLOAT16, CALLS_PER_GRAPH, DryRig, graph_plan, random_host

ROOT = Path(__file__).resolve().parent.parent
CASE_FAMILIES = [
    bench_lora,
    bench_lora_batch,
    bench_lora_weights,
    bench_bgmv,
    bench_sgmv,
    bench_norm,
    bench_paged_kv,
    bench_metadata,
    bench_attention,
    bench_host,
]


# -- cases and their bytes


@pytest.mark.parametrize("name", targets.LORA)
def test_lora_bytes_are_those_of_record(name):
    case = {case.name: case for case in bench_lora.cases()}[name]
    record = targets.LORA_MB[name]
    assert case.nbytes / 1e6 == pytest.approx(record, abs=0.06 if record < 100 else 0.6)
    assert case.quick
    assert case.target == targets.LORA[name].target


def test_layer_bytes_by_hand():
    # 4 rows of adapters 0, 0, 1, none; ranks 8 and 16; two slices.
    layer = Layer(4, (8, 16), "half uniform 2", 32, (48, 16))
    slots = bench_lora.slots_of(layer)
    assert sorted(slots) == [-1, -1, 0, 0]  # every second token of 0, 1, 0, 1 keeps slot 0
    weights = 8 * (2 * 32) + (48 + 16) * 8
    rows = 2 * (32 + 2 * 64)
    assert bench_lora.layer_bytes(layer) == 2 * (weights + rows)


@pytest.mark.parametrize(
    ("pattern", "tokens", "sizes"),
    [
        ("distinct", 5, [1] * 5),
        ("one", 5, [5]),
        ("none", 5, []),
        ("uniform 3", 7, [3, 2, 2]),
        ("zipf", 64, [1, 2, 3, 4, 6, 8, 12, 18, 10]),
        ("seq 4", 10, [4, 4, 2]),
        ("half seq 2", 8, [2, 2]),
        ("half distinct", 6, [1, 1, 1]),
    ],
)
def test_patterns(pattern, tokens, sizes):
    slots = bench_lora.slots_of(Layer(tokens, pattern=pattern))
    assert slots.shape == (tokens,)
    assert slots.dtype == np.int32
    counts = np.bincount(slots[slots >= 0]).tolist()
    assert counts == sizes
    if not pattern.startswith("half") and pattern != "none":
        assert slots.min() == 0
    assert np.array_equal(slots, bench_lora.slots_of(Layer(tokens, pattern=pattern)))


def test_prefill_rows_are_contiguous_and_decode_rows_are_not():
    assert (np.diff(bench_lora.slots_of(Layer(64, pattern="seq 16"))) >= 0).all()
    assert (np.diff(bench_lora.slots_of(Layer(64, pattern="uniform 8"))) < 0).any()


def test_an_unknown_pattern_is_an_error():
    with pytest.raises(ValueError, match="pattern: expected one of"):
        bench_lora.slots_of(Layer(4, pattern="random"))


def test_the_case_list_covers_the_shapes_that_matter():
    layers = [case.params for case in bench_lora.cases()]
    for width in (2048, 3584, 5120, 8192, 11008, 14336):
        assert any(layer.in_features == width and layer.out_features == (4096,) for layer in layers)
        assert any(layer.in_features == 4096 and layer.out_features == (width,) for layer in layers)
    assert {4, 8, 16, 32, 64, 128, 256} <= {rank for layer in layers for rank in layer.ranks}
    assert {1, 512} <= {layer.tokens for layer in layers if "seq" not in layer.pattern}
    assert {128, 16384} <= {layer.tokens for layer in layers if "seq" in layer.pattern}
    assert any(len(set(layer.ranks)) > 1 for layer in layers)
    kinds = {layer.pattern.split(" ")[0] for layer in layers}
    assert {"distinct", "uniform", "zipf", "one", "half", "none", "seq"} <= kinds
    updates = bench_lora_batch.cases()
    assert {case.params.tokens for case in updates} >= {1, 64, 256, 8192}
    assert all(case.target == (3.0 if case.params.tokens <= 256 else 6.0) for case in updates if case.quick)


@pytest.mark.parametrize("module", CASE_FAMILIES, ids=lambda module: module.__name__)
def test_case_names_are_unique(module):
    cases = module.cases()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert all(case.family == module.FAMILY for case in cases)
    without_figures = (bench_bgmv, bench_sgmv, bench_lora_weights)
    assert any(case.quick for case in cases) or module in without_figures


def test_every_figure_of_record_has_its_case():
    names = {case.name for case in bench_lora.cases()}
    assert set(targets.LORA) <= names
    norms = {(case.params.rows, case.params.columns) for case in bench_norm.cases() if case.target}
    assert norms == set(targets.NORM)
    appended = {case.params.tokens for case in bench_paged_kv.cases() if case.target}
    assert appended == set(targets.KV_APPEND)
    steps = {(case.params.function, case.params.batch) for case in bench_metadata.cases() if case.target}
    assert steps == set(targets.METADATA)
    attended = {case.name.removesuffix(" rope"): case for case in bench_attention.cases() if case.target}
    assert set(targets.ATTENTION) <= set(attended)
    assert attended["decode 1 context 131072"].target == pytest.approx(179.2, abs=0.2)  # 0.537 GB


def test_other_families_bytes_by_hand():
    assert bench_norm.norm_bytes(bench_norm.Norm(3, 10)) == 2 * (30 + 30 + 10)
    assert bench_norm.norm_bytes(bench_norm.Norm(3, 10, add=True)) == 2 * (4 * 30 + 10)
    append = bench_paged_kv.Append(2, 3, 9, heads=4, head_dim=8)
    assert bench_paged_kv.append_bytes(append) == 2 * (2 * 6 * 4 * 8 * 2)
    decode = bench_attention.Attention((5, 3), heads=2, group=4, head_dim=16)
    assert bench_attention.attention_bytes(decode) == 2 * 16 * (2 * 8 * 2 + 2 * 2 * 8)
    prefill = dataclasses.replace(decode, new=3)
    assert bench_attention.attention_bytes(prefill) == 2 * 16 * (2 * 8 * 2 + 2 * 6 * 8)
    shrink = bench_bgmv.Half("shrink", 4, 8, 32, "one")
    assert bench_bgmv.half_bytes(shrink) == 2 * 8 * 32 + 4 * (4 * 8 + 2 * 32)
    expand = dataclasses.replace(shrink, op="expand")
    assert bench_bgmv.half_bytes(expand) == 2 * 8 * 32 + 4 * (4 * 8 + 4 * 32)


def test_segments_cover_the_rows():
    starts, lengths, owners = bench_sgmv.segments(bench_bgmv.Half("shrink", 10, 8, 32, "seq 4"))
    assert starts.tolist() == [0, 4, 8]
    assert lengths.tolist() == [4, 4, 2]
    assert owners.tolist() == [0, 1, 2]


# -- statistics, targets, rows


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
    assert row.ratio == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("sets", "expected_us"), [(2, 60.0), (1, 2.0), (18, 7.0), (1100, 2.5), (20_000, 2.0), (3, 900.0)]
)
def test_a_graph_plan_visits_every_set_in_turn(sets, expected_us):
    graphs, length = graph_plan(sets, expected_us)
    visited = [(g * length + i) % sets for g in range(graphs) for i in range(length)]
    assert set(visited) == set(range(sets))
    assert length >= min(CALLS_PER_GRAPH[0], sets)
    if graphs == 1:
        assert length % sets == 0  # replays go on where the last one ended
    # The next use of a set is nearly a whole rotation away.
    last = {}
    for at, which in enumerate(visited):
        assert at - last.get(which, -sets) >= sets
        last[which] = at


def test_random_data_is_spread_and_repeats():
    values = random_host(10_000, np.dtype(np.float32), 5, 2.0)
    assert -2.0 <= values.min() < -1.9
    assert 1.9 < values.max() < 2.0
    assert abs(values.mean()) < 0.05
    assert len(np.unique(values)) > 9_900
    assert np.array_equal(values, random_host(10_000, np.dtype(np.float32), 5, 2.0))
    assert not np.array_equal(values, random_host(10_000, np.dtype(np.float32), 6, 2.0))
    rig = DryRig()
    first, second = rig.random((4, 4)), rig.random((4, 4))
    assert first.dtype == BFLOAT16
    assert not np.array_equal(first, second)
    rig.reseed()
    assert np.array_equal(first, rig.random((4, 4)))


def test_the_benchmarks_own_kernels_compile():
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc")
    source = (ROOT / "bench" / "kernels.cu").read_text()
    for unroll in (1, 4, 8):
        program = nvrtc.createProgram(source, "kernels.cu", [], [])
        nvrtc.compileProgram(program, ("--std=c++17", f"-DUNROLL={unroll}", "-arch=sm_80"))
        text = nvrtc.getPTX(program)
        nvrtc.destroyProgram(program)
        for name in ("fill_float32", "fill_bfloat16", "read_once", "copy_once", "empty"):
            assert f".entry {name}(" in (text.decode() if isinstance(text, bytes) else text)


# -- correctness checks can fail


def _broken(layer: Layer, spoil):
    rig = DryRig()
    data = bench_lora.build_set(layer, rig, bench_lora.build_batch(layer, rig))
    call = bench_lora.layer_calls([data])[0]

    def spoiled():
        call()
        spoil(data.y)

    return rig, data, call, spoiled


def test_the_layer_check_sees_one_wrong_element():
    layer = Layer(6, (4, 8), "distinct", 64, (48, 16))

    def spoil(y):
        y[5, 60] += BFLOAT16.type(0.05)

    rig, data, call, spoiled = _broken(layer, spoil)
    assert bench_lora.check_layer(layer, rig, data, call) <= 1.0
    assert bench_lora.check_layer(layer, rig, data, spoiled) > 1.0


def test_the_layer_check_sees_nan_and_touched_idle_rows():
    layer = Layer(6, (4,), "half distinct", 64, (48,))
    slots = bench_lora.slots_of(layer)

    def nan(y):
        y[np.flatnonzero(slots >= 0)[0], 0] = np.nan

    def touch(y):
        y[np.flatnonzero(slots < 0)[0], 0] += BFLOAT16.type(1)

    rig, data, _, spoiled = _broken(layer, nan)
    assert bench_lora.check_layer(layer, rig, data, spoiled) == math.inf
    rig, data, _, spoiled = _broken(layer, touch)
    with pytest.raises(AssertionError, match="without an adapter changed"):
        bench_lora.check_layer(layer, rig, data, spoiled)


def test_the_loose_check_allows_a_rounded_delta_and_no_more():
    layer = Layer(6, (16,), "one", 64, (48,))

    def check(change):
        rig, data, _, _ = _broken(layer, None)
        a, b = (data_[0][0].astype(np.float64) for data_ in (data.a, data.b))
        delta = bench_lora.scale_of(0) * (data.x.astype(np.float64) @ a.T) @ b.T

        def call():
            data.y[...] = data.y + change(delta).astype(BFLOAT16)

        return bench_lora.check_layer_loosely(layer, rig, data, call)

    assert check(lambda delta: delta) <= 1.0
    assert check(lambda delta: delta * 1.1) > 1.0
    assert check(lambda delta: delta * 0) > 1.0


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


# -- the runner


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


# -- peers


def test_peers(monkeypatch):
    monkeypatch.setattr(peers, "available", lambda: {"torch": True, "vllm": False})
    assert list(peers.chosen("bench_lora", "auto")) == ["torch loop"]
    assert peers.chosen("bench_lora", "none") == {}
    assert peers.chosen("bench_metadata", "auto") == {}
    with pytest.raises(ValueError, match="expected installed packages among"):
        peers.chosen("bench_lora", "vllm")
    with pytest.raises(ValueError, match="expected installed packages among"):
        peers.survey("vllm")


class _Device:
    """What a rig needs to have for peers to compile on it."""

    dry = False
    id = 0

    def __init__(self):
        self.device = self.torch = self.cuda = self

    def __getattr__(self, name):
        return lambda *_: None


def _package(folder, name, text):
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)
    return peers.Package("numpy", (name,))


def test_a_peer_that_does_not_import_is_a_failed_row(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(tmp_path))
    packages = {
        "good": _package(tmp_path, "a_good_peer", ""),
        "bad": _package(tmp_path, "a_bad_peer", "raise OSError('libnothing.so: not here')"),
        "none": peers.Package("none", ("a_peer_that_nobody_has",)),
    }
    monkeypatch.setattr(peers, "PACKAGES", packages)
    report, options = model.Report(None, {}, []), runner.Options()
    runner._find_peers([], _Device(), report, options)
    assert report.head["peers"] == {"good": np.__version__}
    assert options.peers == "good"
    assert [(row.engine, row.status) for row in report.rows] == [("bad", "failed")]
    assert "peer bad: OSError: libnothing.so: not here" in capsys.readouterr().out
    assert report.bad


def test_a_peer_whose_kernels_do_not_build_is_a_failed_row(monkeypatch, capsys):
    built = []

    def builder(case, rig, work):
        built.append(case.params)
        if case.params.add:
            raise RuntimeError("nvcc: exit 1")
        return model.Work([lambda: None], lambda: 0.0)

    module = types.SimpleNamespace(__name__="bench.bench_norm", build=lambda case, rig, sets: None)
    monkeypatch.setattr(peers, "available", lambda: {"torch": True})
    monkeypatch.setattr(peers, "PEERS", {"bench_norm": {"FlashInfer": ("torch", builder)}})
    cases = [bench_norm._case(bench_norm.Norm(rows, 2048, add)) for rows in (2, 3) for add in (False, True)]
    unbuilt = peers.compile_ahead([(module, case) for case in cases], "torch", _Device())
    assert sorted(norm.add for norm in built) == [False, True]  # once for each kernel, not for each case
    assert "2/2" in capsys.readouterr().out
    assert peers.build("bench_norm", "FlashInfer", cases[0], None, None, unbuilt) is not None
    with pytest.raises(RuntimeError, match="did not build: RuntimeError: nvcc: exit 1"):
        peers.build("bench_norm", "FlashInfer", cases[1], None, None, unbuilt)
    assert len(built) == 3  # the one that failed was not tried again


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
