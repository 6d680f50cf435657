"""What is compiled before it is called for: the kernels of the next call, each once, and never an error of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import fake_gpu
import numpy as np
import pytest
from fake_gpu import on_gpu

from cupy_lora import LoraBatch, LoraWeights, _ahead, _cubins, _jit, _lora_plan, add_lora
from cupy_lora._arrays import FLOAT16, INT32


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[_cubins.Unit]:
    """The units that were compiled from now on, by a compiler that only says so."""
    pytest.importorskip("cupy_backends")
    units: list[_cubins.Unit] = []

    def compile_unit(unit: _cubins.Unit) -> bytes:
        units.append(unit)
        return b"code"

    fake_gpu.install(monkeypatch)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_cubins, "compile_unit", compile_unit)
    for name in ("_found", "_started"):
        monkeypatch.setattr(_cubins, name, type(getattr(_cubins, name))())
    _ahead._weights.clear()
    _ahead._batches.clear()
    monkeypatch.setattr("cupy_lora._device.capturing", lambda stream: False)
    monkeypatch.setattr("cupy_lora.lora_weights.on_device", lambda array: array)
    for name in ("stream_for", "stream_of"):
        monkeypatch.setattr(f"cupy_lora.lora_weights.{name}", lambda *args: SimpleNamespace(ptr=5))
    return units


def soon(condition: Callable[[], bool]) -> None:
    """Wait for the threads that compile."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "nothing was compiled"
        time.sleep(0.001)


def layer(width: int, ranks: tuple[int, ...] = (16,)) -> LoraWeights:
    weights = LoraWeights(width, width, max_adapters=8, dtype="float16")
    for slot, rank in enumerate(ranks):
        weights.load(slot, on_gpu((rank, width), FLOAT16), on_gpu((width, rank), FLOAT16), copy=False)
    return weights


def taken(weights: LoraWeights, batch: LoraBatch, width: int) -> _cubins.Unit:
    """The unit of the kernel that add_lora runs."""
    x, y = (on_gpu((batch.num_tokens, width), FLOAT16) for _ in range(2))
    seen: list[_jit.Kernel] = []
    with _jit.watcher(lambda launch: seen.append(launch.kernel)):
        add_lora(y, x, weights, batch)
    (kernel,) = seen
    return _cubins.unit_of(kernel, 90)


def test_table_and_schedule_are_compiled_from_the_start(compiled: list[_cubins.Unit]) -> None:
    weights = LoraWeights(64, (64, 32), max_adapters=8, dtype="float16")
    batch = LoraBatch(64, max_adapters=8)
    soon(lambda: len(compiled) == 2)
    assert {unit[0] for unit in compiled} == {"lora_weights", "lora_batch"}
    slots = on_gpu((64,), INT32)
    assert _cubins.unit_of(_lora_plan.build_tiles(slots, batch).kernel, 90) in compiled
    assert ("lora_weights", (("SLICES", 2),), 90) in compiled
    del weights


def test_the_layers_kernels_are_compiled_once_there_is_a_batch(compiled: list[_cubins.Unit]) -> None:
    layers = {width: layer(width) for width in (64, 128)}
    same = layer(64)
    batch = LoraBatch(64, max_adapters=8)
    batch.update(on_gpu((40,), INT32))
    soon(lambda: len(compiled) == 4)
    for width, weights in layers.items():
        assert taken(weights, batch, width) in compiled
    assert taken(same, batch, 64) in compiled
    batch.update(on_gpu((40,), INT32))
    assert len(set(compiled)) == len(compiled) == 4


def test_other_ranks_are_compiled_as_they_are_loaded(compiled: list[_cubins.Unit]) -> None:
    batch = LoraBatch(64, max_adapters=8)
    batch.update(on_gpu((40,), INT32))
    weights = layer(64, (16, 64))
    soon(lambda: len(compiled) == 4)
    assert taken(weights, batch, 64) in compiled


def test_a_caller_waits_for_a_compile_that_has_begun(
    compiled: list[_cubins.Unit], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()

    def compile_unit(unit: _cubins.Unit) -> bytes:
        compiled.append(unit)
        begun.set()
        assert go.wait(10)
        return b"late"

    monkeypatch.setattr(_cubins, "compile_unit", compile_unit)
    weights = LoraWeights(64, 64, max_adapters=8, dtype="float16")
    assert begun.wait(10)
    threading.Timer(0.05, go.set).start()
    kernel = _lora_plan.set_slot(weights.table_view, 0, np.zeros(1), _jit.RUNNER_FACTS).kernel
    assert _cubins.cubin(kernel, 90) == b"late"
    assert len(compiled) == 1


def test_an_error_is_left_to_the_call(
    compiled: list[_cubins.Unit], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def compile_unit(unit: _cubins.Unit) -> bytes:
        compiled.append(unit)
        raise RuntimeError("it did not compile")

    monkeypatch.setattr(_cubins, "compile_unit", compile_unit)
    weights = LoraWeights(64, 64, max_adapters=8, dtype="float16")
    soon(lambda: _cubins._threads == 0 and len(compiled) == 1)
    kernel = _lora_plan.set_slot(weights.table_view, 0, np.zeros(1), _jit.RUNNER_FACTS).kernel
    with pytest.raises(RuntimeError, match="it did not compile"):
        _cubins.cubin(kernel, 90)
    assert capfd.readouterr().err == ""


def test_nothing_is_compiled_for_the_loop_or_the_host(
    compiled: list[_cubins.Unit], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISABLE_SGMV", "1")
    LoraWeights(64, 64, max_adapters=8, dtype="float16")
    LoraBatch(64, max_adapters=8)
    monkeypatch.delenv("DISABLE_SGMV")
    monkeypatch.undo()
    LoraBatch(64, max_adapters=8, device="cpu").update(np.zeros(4, np.int32))
    time.sleep(0.05)
    assert compiled == []
