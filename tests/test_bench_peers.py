"""The libraries that the benchmark compares with: found, compiled ahead, or a row that says why not."""

from __future__ import annotations

import types

import numpy as np
import pytest

from bench import bench_norm, model, peers, runner


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
