"""Kernels compiled ahead: what a model needs, the cache, and the folder for images without a compiler."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import cases
import engines
import numpy as np
import pytest

import cupy_lora
from cupy_lora import _cubins, _device, _env, _jit, _paths, _warmup
from cupy_lora.__main__ import main

FACTS = _jit.DeviceFacts(90, 132)
KERNEL = _jit.Kernel("lora_weights", "set_slot", (("SLICES", 1),), 32)
CONFIG = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
LAYERS = [(64, (64, 32, 32)), (64, (64,)), (64, (96, 96)), (96, (64,))]


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own, nothing found before, no folder."""
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(_env.CUBINS.name, raising=False)
    monkeypatch.setattr(_cubins, "_found", {})
    _cubins._check_folder.cache_clear()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[_cubins.Unit]:
    """The units that were compiled from now on, by a compiler that only says so."""
    pytest.importorskip("cupy_backends")
    units: list[_cubins.Unit] = []

    def compile_unit(unit: _cubins.Unit) -> bytes:
        units.append(unit)
        return repr(unit).encode()

    monkeypatch.setattr(_cubins, "compile_unit", compile_unit)
    return units


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise RuntimeError("cupy_lora: a compiler is needed")

    _cubins.target.cache_clear()
    monkeypatch.setattr(_cubins, "_nvrtc", missing)


# ---- what a model needs -------------------------------------------------------------------------
def test_a_config_names_the_layers(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    assert _warmup.read_model(path) == _warmup.read_model(tmp_path) == ((64,), LAYERS)
    path.write_text(json.dumps({**CONFIG, "head_dim": 32}))
    assert _warmup.read_model(path)[1][:2] == [(64, (128, 64, 64)), (128, (64,))]
    path.write_text(json.dumps({**CONFIG, "hidden_size": "64"}))
    with pytest.raises(ValueError, match=r"config.json: hidden_size: expected a number of at least 1, got '64'"):
        _warmup.read_model(path)
    with pytest.raises(ValueError, match="expected the config of a model"):
        _warmup.read_model(tmp_path / "nothing.json")


def test_every_kernel_of_a_served_model_was_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of several sizes, mixes of ranks and ways to update: each takes a kernel of the list."""
    monkeypatch.setattr(_jit, "device_facts", lambda device: FACTS)
    ahead = {
        _cubins.unit_of(kernel, 90)
        for kernel in [
            *_warmup.lora_kernels(LAYERS, (8, 16), (1, 8, 40, 300), 4, "float16", FACTS),
            *_warmup.norm_kernels((64,), (1, 8, 40, 300), "float16", FACTS),
        ]
    }
    taken: list[_cubins.Unit] = []
    with _jit.host_runner(lambda launch: taken.append(_cubins.unit_of(launch.kernel, 90))):
        for width, slices in LAYERS:
            weights = cupy_lora.LoraWeights(width, slices, max_adapters=4, dtype="float16", device="cpu")
            for slot, rank in enumerate((16, 8, 8)):
                a = np.zeros((rank, width), np.float16)
                weights.load(slot, [a] * len(slices), [np.zeros((out, rank), np.float16) for out in slices])
                for count in (1, 8, 40, 300):
                    batch = cupy_lora.LoraBatch(count, max_adapters=4, device="cpu")
                    x, y = np.zeros((count, width), np.float16), np.zeros((count, sum(slices)), np.float16)
                    for slots in (np.zeros(count, np.int32), np.arange(count) % 4):
                        batch.update(slots)
                        cupy_lora.add_lora(y, x, weights, batch)
        x, w = np.zeros((40, 64), np.float16), np.zeros(64, np.float16)
        cupy_lora.rms_norm(x, w)
        cupy_lora.fused_add_rms_norm(x, x.copy(), w)
    assert len(set(taken)) > 10
    assert set(taken) <= ahead


def test_more_ranks_are_compiled_alone_and_together() -> None:
    assert _warmup._mixes([16, 8, 16]) == [frozenset({8}), frozenset({16}), frozenset({8, 16})]
    mixes = _warmup._mixes([8, 16, 32, 64])
    assert len(mixes) == 5
    assert mixes[-1] == {8, 16, 32, 64}


def test_warmup_says_what_it_needs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["warmup"]) == 2
    assert "expected --model, or --in-features with --out-features" in capsys.readouterr().err
    monkeypatch.setattr(_device, "has_gpu_kernels", lambda: False)
    assert main(["warmup", "--in-features", "64", "--out-features", "64"]) == 2
    assert "warmup: expected a GPU and CuPy, or arch" in capsys.readouterr().err
    for bad, text in (
        ({"layers": [(64, 64)], "arch": 75}, "arch: expected an integer of at least 80"),
        ({"layers": [(64, 64)], "arch": 99}, "sm_count: expected the multiprocessors of the sm_99 GPU"),
        ({"arch": 90}, "warmup: expected a model or layers"),
        ({"layers": [(64, 64)], "arch": 90, "ranks": ()}, "ranks: expected at least one"),
        ({"layers": [(64, 64)], "arch": 90, "ranks": (0,)}, "ranks: expected an integer in 1"),
    ):
        with pytest.raises(ValueError, match=text):
            cupy_lora.warmup(**bad)


def test_the_command_compiles_each_kernel_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], compiled: list[_cubins.Unit]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    command = ["warmup", "--model", str(tmp_path / "config.json"), "--ranks", "8,16", "--arch", "90"]
    assert main(command) == 0
    shown = capsys.readouterr()
    count = len(compiled)
    assert len(set(compiled)) == count > 10
    assert {unit[0] for unit in compiled} == {"lora", "lora_batch", "lora_weights", "norm"}
    assert f"{count} kernels in " in shown.out
    assert re.fullmatch(rf"\[#{{30}}\] {count}/{count} kernels, \d+\.\d s\n", shown.err)
    assert main(command) == 0
    assert len(compiled) == count, "all were in the cache"


def test_the_bar_is_drawn_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    file = Terminal()
    bar = _warmup._Bar(3, file)
    for _ in range(3):
        bar.step()
    lines = file.getvalue().split("\r")
    assert [line[:32] for line in lines[1:]] == [f"[{'#' * n}{'.' * (30 - n)}]" for n in (10, 20, 30)]
    assert file.getvalue().endswith("\n")


# ---- the cache ----------------------------------------------------------------------------------
def test_a_kernel_in_the_cache_is_not_compiled(compiled: list[_cubins.Unit], monkeypatch: pytest.MonkeyPatch) -> None:
    code = _cubins.cubin(KERNEL, 90)
    assert _cubins.cubin(KERNEL, 90) is code, "kept until it is loaded"
    _cubins.forget(KERNEL, 90)
    assert _cubins.cubin(KERNEL, 90) == code
    assert len(compiled) == 1
    (path,) = _cubins.cache_folder().iterdir()
    path.write_bytes(path.read_bytes()[:-1])  # a damaged file is compiled again
    _cubins.forget(KERNEL, 90)
    assert _cubins.cubin(KERNEL, 90) == code
    assert len(compiled) == 2
    for change in (
        lambda: monkeypatch.setattr(_paths, "source_digest", lambda: "0" * 64),
        lambda: monkeypatch.setattr(_cubins._nvrtc(), "getVersion", lambda: (99, 0)),
    ):
        change()
        _cubins.forget(KERNEL, 90)
        _cubins.cubin(KERNEL, 90)
    assert len(compiled) == 4
    assert len(list(_cubins.cache_folder().iterdir())) == 3


def test_a_source_outside_the_folder_is_known_by_its_text(
    tmp_path: Path, compiled: list[_cubins.Unit], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the tests' own kernels are: the digest of the sources does not see an edit of them."""
    (tmp_path / "src").mkdir()
    monkeypatch.setattr(_paths, "cuda_src", lambda: tmp_path / "src")
    monkeypatch.setattr(_paths, "source_digest", lambda: "0" * 64)
    kernel = _jit.Kernel("../mine", "k", (), 32)
    for text in ("one", "two", "one"):
        (tmp_path / "mine.cu").write_text(text)
        _cubins.cubin(kernel, 90)
        _cubins.forget(kernel, 90)
    assert len(compiled) == 2
    assert {path.name[:11] for path in _cubins.cache_folder().iterdir()} == {"mine-sm_90-"}


def test_a_cache_that_cannot_be_written_is_said_once(
    compiled: list[_cubins.Unit], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(_cubins, "_unwritable", False)
    with pytest.warns(UserWarning, match="compiled kernels cannot be kept in"):
        _cubins.cubin(KERNEL, 90)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _cubins.cubin(_jit.Kernel("lora_weights", "set_slot", (("SLICES", 2),), 32), 90)
    assert len(compiled) == 2


def test_threads_share_one_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy_backends")
    begun, go = threading.Event(), threading.Event()
    compiled = []

    def compile_unit(unit: _cubins.Unit) -> bytes:
        compiled.append(unit)
        begun.set()
        assert go.wait(10)
        if len(compiled) == 1:
            raise RuntimeError("did not compile")
        return b"code"

    monkeypatch.setattr(_cubins, "compile_unit", compile_unit)
    got: list[object] = []

    def ask() -> None:
        try:
            got.append(_cubins.cubin(KERNEL, 90))
        except RuntimeError as error:
            got.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
        assert begun.wait(10)
    go.set()
    for thread in threads:
        thread.join()
    assert got.count("did not compile") >= 1
    assert set(got) <= {"did not compile", b"code"}
    assert _cubins.cubin(KERNEL, 90) == b"code", "a failure is not kept"
    assert len(compiled) == 2


def test_a_compiler_error_is_shown() -> None:
    pytest.importorskip("cupy_backends")
    kernel = _jit.Kernel("lora_weights", "set_slot", (("SLICES", "nonsense"),), 32)
    with pytest.raises(RuntimeError, match=r"(?s)lora_weights.cu did not compile for sm_90 with .*nonsense.*undefined"):
        _cubins.cubin(kernel, 90)


def test_an_architecture_takes_the_newest_of_its_generation() -> None:
    pytest.importorskip("cupy_backends")
    known = _cubins._nvrtc().getSupportedArchs()
    assert _cubins.target(90) == 90
    assert _cubins.target(89) == 89
    newest = max(known)
    assert _cubins.target(newest // 10 * 10 + 9) == newest
    with pytest.raises(RuntimeError, match=r"NVRTC \d+\.\d+ does not compile for sm_990: expected one of sm_"):
        _cubins.target(990)


# ---- the folder ---------------------------------------------------------------------------------
def test_the_folder_needs_no_compiler(
    tmp_path: Path, compiled: list[_cubins.Unit], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    folder = tmp_path / "cubins"
    layer = ["warmup", "--in-features", "64", "--out-features", "64", "--tokens", "1", "--arch", "90"]
    assert main([*layer, "--cubins", str(folder)]) == 0
    count = len(compiled)
    code = _cubins._cached(*_cubins.unit_of(KERNEL, 90))
    request.getfixturevalue("no_compiler")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "other"))
    with pytest.raises(RuntimeError, match=r"a compiler is needed \(wanted: lora_weights.cu for sm_90 with"):
        _cubins.cubin(KERNEL, 90)
    monkeypatch.setenv(_env.CUBINS.name, str(folder))
    assert _cubins.cubin(KERNEL, 90) == code
    assert len(compiled) == count
    missing = _jit.Kernel("lora_weights", "set_slot", (("SLICES", 7),), 32)
    with pytest.raises(RuntimeError, match=r"a compiler is needed .*'SLICES': 7"):
        _cubins.cubin(missing, 90)


def test_a_kernel_that_the_folder_lacks_is_compiled(
    tmp_path: Path, compiled: list[_cubins.Unit], monkeypatch: pytest.MonkeyPatch
) -> None:
    _cubins.build([KERNEL], 90, folder=tmp_path / "cubins")
    monkeypatch.setenv(_env.CUBINS.name, str(tmp_path / "cubins"))
    other = _jit.Kernel("lora_weights", "set_slot", (("SLICES", 2),), 32)
    assert _cubins.cubin(other, 90) == repr(_cubins.unit_of(other, 90)).encode()


def test_a_folder_serves_newer_gpus_of_its_generation_only(
    tmp_path: Path, compiled: list[_cubins.Unit], monkeypatch: pytest.MonkeyPatch
) -> None:
    _cubins.build([KERNEL], 80, folder=tmp_path / "cubins")
    monkeypatch.setenv(_env.CUBINS.name, str(tmp_path / "cubins"))
    assert _cubins._prebuilt(*_cubins.unit_of(KERNEL, 86)) is not None
    assert _cubins._prebuilt(*_cubins.unit_of(KERNEL, 90)) is None


def test_a_folder_that_does_not_fit_is_an_error(
    tmp_path: Path, compiled: list[_cubins.Unit], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cubins"
    monkeypatch.setenv(_env.CUBINS.name, str(folder))
    with pytest.raises(RuntimeError, match=r"CUPY_LORA_CUBINS=.*: expected a folder written by .*, got FileNotFound"):
        _cubins.cubin(KERNEL, 90)
    _cubins.build([KERNEL], 90, folder=folder)  # writes in spite of what is there
    assert _cubins.cubin(KERNEL, 90)
    _cubins.forget(KERNEL, 90)
    (file,) = folder.glob("*.cubin")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(RuntimeError, match="expected a whole file, got a damaged one"):
        _cubins.cubin(KERNEL, 90)
    file.write_bytes(whole)
    manifest = json.loads((folder / _cubins.MANIFEST).read_text())
    (folder / _cubins.MANIFEST).write_text(json.dumps({**manifest, "sources": "f" * 64}))
    _cubins._check_folder.cache_clear()
    with pytest.raises(RuntimeError, match=r"expected kernels of this version's sources \(\w{12}\), got those of ffff"):
        _cubins.cubin(KERNEL, 90)
    (folder / _cubins.MANIFEST).write_text("[]")
    _cubins._check_folder.cache_clear()
    with pytest.raises(RuntimeError, match="expected a folder written by"):
        _cubins.cubin(KERNEL, 90)


def test_machine_code_comes_from_the_compiler() -> None:
    """Not the stand-in of the other tests: what is kept is an ELF file with the kernel in it."""
    pytest.importorskip("cupy_backends")
    code = _cubins.cubin(KERNEL, 90)
    assert code[:4] == b"\x7fELF"
    assert b"set_slot" in code
    (path,) = _cubins.cache_folder().iterdir()
    assert _cubins.read(path) == code


# ---- on a GPU -----------------------------------------------------------------------------------
STEP = """
import sys
import cupy, numpy as np
if {no_nvrtc}:
    from cupy_lora import _cubins
    def missing(): raise RuntimeError("no compiler")
    _cubins._nvrtc = missing
from cupy_lora import LoraBatch, LoraWeights, add_lora
rng = np.random.default_rng(0)
weights = LoraWeights(64, 64, max_adapters=4, dtype="float16")
weights.load(0, rng.standard_normal((16, 64)), rng.standard_normal((64, 16)))
batch = LoraBatch(8, max_adapters=4)
batch.update(np.zeros(8, np.int32))
x = cupy.asarray(rng.standard_normal((8, 64)).astype(np.float16))
y = cupy.zeros((8, 64), np.float16)
add_lora(y, x, weights, batch)
print(y.get().tobytes().hex())
"""


@pytest.mark.gpu
def test_a_process_without_a_compiler_runs_from_the_folder(
    gpu: engines.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cubins"
    facts = _jit.device_facts(0)
    cupy_lora.warmup(
        layers=[(64, 64)], tokens=(8,), max_adapters=4, arch=facts.arch, sm_count=facts.sm_count, cubins=folder
    )

    def run(no_nvrtc: bool) -> str:
        monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / f"empty{no_nvrtc}"))
        done = subprocess.run(
            [sys.executable, "-c", STEP.format(no_nvrtc=no_nvrtc)], check=True, capture_output=True, text=True,
            cwd=Path(__file__).parents[1],
        )  # fmt: skip
        return done.stdout

    compiled = run(False)
    monkeypatch.setenv(_env.CUBINS.name, str(folder))
    assert run(True) == compiled
    assert len(compiled) == 2 * 2 * 8 * 64 + 1


@pytest.mark.gpu
def test_the_first_call_after_a_warmup_compiles_nothing(gpu: engines.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    cupy_lora.warmup(layers=[(128, 128)], ranks=(8, 16), tokens=(8,), max_adapters=2, dtype="bfloat16")

    def refuse(unit: _cubins.Unit) -> bytes:
        raise RuntimeError(f"compiled {unit}")

    monkeypatch.setattr(_cubins, "compile_unit", refuse)
    data = cases.build(cases.Case(8, 128, (128,), (8, 16), "random"))
    weights, batch = cases.load(data, gpu.device, gpu.array)
    y = gpu.array(data.y)
    cupy_lora.add_lora(y, gpu.array(data.x), weights, batch)
    cases.assert_added(gpu.numpy(y), data)
