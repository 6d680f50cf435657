"""The CPU runner catches what a GPU would punish: faults planted in the kernels of this repository, and its reports."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import engines
import numpy as np
import pytest
import test_lora_forms
from simt import build, runner
from simt.devices import on_cpu
from simt.runner import SimtError, alloc, patched

import cupy_lora
from cupy_lora import _jit

pytestmark = pytest.mark.simt


def rms_norm(rows: int, columns: int, *, edge: str = "end", clusters: int | None = None) -> None:
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((rows, columns)).astype(np.float16), rng.standard_normal(columns).astype(np.float16)
    with on_cpu(edge, clusters) as engine:
        out = engine.array(np.full_like(x, np.nan))
        cupy_lora.rms_norm(engine.array(x), engine.array(w), 1e-6, out)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-6) * w
    np.testing.assert_allclose(out, expected, rtol=2e-3, atol=1e-6)


def add_lora(tokens: int, *, rank: int = 16, clusters: int | None = None, arch: int = 90) -> None:
    rng = np.random.default_rng(2)
    wide_in, wide_out, adapters = 512, 256, 3
    slots = np.arange(tokens) % adapters
    a = rng.standard_normal((adapters, rank, wide_in)).astype(np.float16)
    b = rng.standard_normal((adapters, wide_out, rank)).astype(np.float16)
    x, y = rng.standard_normal((tokens, wide_in)).astype(np.float16), rng.standard_normal((tokens, wide_out))
    with on_cpu(clusters=clusters, arch=arch) as engine:
        weights = cupy_lora.LoraWeights(wide_in, wide_out, max_adapters=adapters, dtype="float16", device="cpu")
        for slot in range(adapters):
            weights.load(slot, engine.array(a[slot]), engine.array(b[slot]), copy=False)
        batch = cupy_lora.LoraBatch(tokens, max_adapters=adapters, device="cpu")
        batch.update(engine.array(slots))
        out = engine.array(y.astype(np.float32))
        cupy_lora.add_lora(out, engine.array(x), weights, batch)
    v = np.einsum("ti,tri->tr", x.astype(np.float64), a[slots].astype(np.float64))
    expected = y + np.einsum("tr,tor->to", v, b[slots].astype(np.float64))
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-2 * np.abs(expected).max() / 100)


def schedule(tokens: int) -> None:
    """The tiles of a batch: each token in one tile of its slot."""
    slots = np.random.default_rng(3).integers(-1, 9, tokens)
    with on_cpu() as engine:
        batch = cupy_lora.LoraBatch(tokens, max_adapters=9, device="cpu")
        batch.update(engine.array(slots))
        a, b = engine.array(np.ones((9, 8, 16), np.float16)), engine.array(np.ones((9, 16, 8), np.float16))
        weights = cupy_lora.LoraWeights(16, 16, max_adapters=9, dtype="float16", device="cpu")
        for slot in range(9):
            weights.load(slot, a[slot], b[slot], scale=float(slot + 1), copy=False)
        out = engine.array(np.zeros((tokens, 16), np.float32))
        cupy_lora.add_lora(out, engine.array(np.ones((tokens, 16), np.float16)), weights, batch)
    np.testing.assert_array_equal(out, np.repeat(128.0 * (slots + 1)[:, None], 16, axis=1))


def attention(queries: int, keys: int, arch: int = 90) -> None:
    """Prefill of one sequence with one KV head, against the reference."""
    rng = np.random.default_rng(4)
    heads, dim, page = 2, 64, 16
    count = -(-keys // page)
    pages, q = (
        rng.standard_normal(shape).astype(np.float16) for shape in ((count, 2, page, dim), (queries, heads, dim))
    )
    outs = []
    for engine_of in (contextlib.nullcontext(engines.Numpy()), on_cpu(arch=arch)):
        with engine_of as engine:
            held = engine.array(pages)
            address = held.__array_interface__["data"][0]
            ptrs = address + np.arange(count, dtype=np.int64) * pages[0].nbytes
            tables = [np.array([0, queries], np.int32), ptrs, np.array([0, count], np.int32)]
            last = np.array([keys - (count - 1) * page], np.int32)
            out = engine.array(np.full_like(q, np.nan))
            arrays = [engine.array(table) for table in (*tables, last)]
            cupy_lora.batch_prefill(engine.array(q), *arrays, 1, 0, 1, page, out=out, rope=None)
            outs.append(out.astype(np.float64))
    np.testing.assert_allclose(outs[1], outs[0], rtol=4e-3, atol=2e-3)


@dataclasses.dataclass(frozen=True)
class Fault:
    """A change of a source, the run that must fail with it (and pass without), and what the report says."""

    file: str
    changes: tuple[tuple[str, str], ...]
    run: Callable[[], None]
    says: str


ROW_SUM = "        __syncthreads();\n        float part[WARPS];"
SHUFFLE = "        v += __shfl_xor_sync(0xffffffffu, v, offset);"
TAIL_STORE = "reinterpret_cast<u16*>(p)[i] = v.halves[i];"

FAULTS = {
    "missing barrier before a read": Fault(
        "norm.cu", ((ROW_SUM, "        float part[WARPS];"),), lambda: rms_norm(2, 4096), "a race"
    ),
    "missing barrier before reuse": Fault(
        "sgmv.cu",
        (("__syncthreads();  // the next tile's parts", "// the next tile's parts"),),
        lambda: test_lora_forms.sgmv(16, clusters=1),
        "a race: this thread writes",
    ),
    "missing barrier before reuse, stages": Fault(
        "attention*.cuh",
        (("        __syncthreads();  // the tile has landed", "        // the tile has landed"),),
        lambda: attention(40, 300, arch=80),
        ".",
    ),
    "wrong wait count, copies": Fault(
        "attention*.cuh",
        (("copy_async_wait<STAGES - 2 - AHEAD>", "copy_async_wait<STAGES - 1 - AHEAD>"),),
        lambda: attention(40, 300, arch=80),
        ".",
    ),
    "stage overwritten too early": Fault(
        "attention*.cuh",
        (("    ptx::mbarrier_wait_block(empty + turn.slot, turn.parity);\n", ""),),
        lambda: attention(40, 600),
        "a race|stuck",
    ),
    "product not waited for": Fault(
        "attention*.cuh", (("ptx::wgmma_wait<1>();", "ptx::wgmma_wait<2>();"),), lambda: attention(40, 300), "."
    ),
    "copies not waited for": Fault(
        "attention*.cuh",
        (
            (
                "            wait_for(rings_.full_values, values_);\n            ptx::wgmma_fence",
                "            ptx::wgmma_fence",
            ),
        ),
        lambda: attention(40, 100),
        "a race: this thread reads",
    ),
    "wrong wait count": Fault(
        "lora_exchange.cuh", (("rows * kWidth * 4 * kCluster", "rows * kWidth * 4"),), lambda: add_lora(5), "."
    ),
    "wrong wait count, too many": Fault(
        "lora_exchange.cuh",
        (("rows * kWidth * 4 * kCluster", "(rows + 1) * kWidth * 4 * kCluster"),),
        lambda: add_lora(5),
        "stuck:\n.*waiting in mbarrier_wait",
    ),
    "wrong phase": Fault(
        "lora_exchange.cuh", (("ex.uses >> 1 & 1", "ex.uses & 1"),), lambda: add_lora(40, clusters=1), "."
    ),
    "unpredicated tail": Fault(
        "norm.cu",
        (
            (
                f"if (i < n) {{\n                if constexpr (sizeof(T) == 2) {{\n                    {TAIL_STORE}",
                f"{{\n                if constexpr (sizeof(T) == 2) {{\n                    {TAIL_STORE}",
            ),
        ),
        lambda: rms_norm(3, 1003),
        "illegal address .* past the end of the array",
    ),
    "divergent shuffle": Fault(
        "norm.cu",
        ((SHUFFLE, f"        if (threadIdx.x % 32 < 16) {SHUFFLE.strip()}"),),
        lambda: rms_norm(2, 4096),
        "stuck:|exit|divergent",
    ),
    "divergent barrier": Fault(
        "norm.cu",
        ((ROW_SUM, f"        if (threadIdx.x < 32) __syncthreads();\n        else\n    {ROW_SUM}"),),
        lambda: rms_norm(2, 4096),
        r"divergent __syncthreads: this thread is at line \d+, others wait at line \d+",
    ),
    "lane outside its mask": Fault(
        "norm.cu",
        ((SHUFFLE, SHUFFLE.replace("0xffffffffu", "0x0000ffffu")),),
        lambda: rms_norm(2, 4096),
        "lane 16 is not in its own mask 0000ffff|reads lane .* not in the mask 0000ffff",
    ),
    "shuffle from a lane outside the mask": Fault(
        "norm.cu",
        ((SHUFFLE, "        if (threadIdx.x % 32 < 16) v += __shfl_xor_sync(0x0000ffffu, v, offset);"),),
        lambda: rms_norm(2, 4096),
        "reads lane .* not in the mask 0000ffff",
    ),
    "one past the end": Fault(
        "norm.cu", ((TAIL_STORE, TAIL_STORE.replace("[i] =", "[i + 1] =")),), lambda: rms_norm(3, 1003), "past the end"
    ),
    "one ahead of the start": Fault(
        "norm.cu",
        (("out + offset_of(out_strides, first)", "out + offset_of(out_strides, first) - 8"),),
        lambda: rms_norm(3, 1024, edge="start"),
        "16 bytes ahead of the array",
    ),
    "one ahead of the start, at the end of a page": Fault(
        "norm.cu",
        (("out + offset_of(out_strides, first)", "out + offset_of(out_strides, first) - 8"),),
        lambda: rms_norm(3, 1024),
        "wrote 16 bytes ahead of the array",
    ),
    "read ahead of the start": Fault(
        "norm.cu",
        (("raw[k] = fetch(in, ", "raw[k] = fetch(in - 8, "),),
        lambda: rms_norm(3, 1024),
        r"descending .* illegal address .* .\d+ bytes ahead of the array",
    ),
    "stale shared memory": Fault(
        "norm.cu",
        (("            kept[me + (k - REG_VECS) * THREADS] = v.quad;\n", ""),),
        lambda: rms_norm(1, 40000),
        ".",
    ),
    "stale counters": Fault("lora_batch.cuh", (("count[s] = 0;", ";"),), lambda: schedule(300), "."),
    "misaligned access": Fault(
        "norm.cu",
        (("load_16<ACCESS>(p)", "load_16<ACCESS>(p + 1)"),),
        lambda: rms_norm(3, 1024),
        "misaligned",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(name: str) -> None:
    fault = FAULTS[name]
    fault.run()
    with patched(fault.file, *fault.changes), pytest.raises((SimtError, AssertionError), match=f"(?s){fault.says}"):
        fault.run()


def test_a_race_is_reported_where_no_order_of_the_threads_shows_it() -> None:
    """All threads write one value to one place: every order gives the same."""
    change = ("mine[threadIdx.x / 32] = v;", "mine[threadIdx.x / 32] = v, sums[48] = 1.f;")
    with patched("norm.cu", change), pytest.raises(SimtError, match=r"a race: .* thread 0 wrote .* at norm\.cu:"):
        rms_norm(1, 4096)


def test_illegal_address_names_array_block_thread_and_line() -> None:
    change = ("out + offset_of(out_strides, first);", "out + offset_of(out_strides, first) + 1024;")
    with patched("norm.cu", change), pytest.raises(SimtError) as caught:
        rms_norm(3, 1024)
    text = str(caught.value)
    assert "norm.rms_norm (ascending thread order" in text
    assert "(0 bytes past the end of the array (float16 (3, 1024)))" in text
    assert "block (2, 0, 0) thread 0 at vectors.cuh:" in text
    lines = (runner.sources() / "vectors.cuh").read_text().splitlines()
    stores = [i for i, line in enumerate(lines, 1) if "(p) = v.quad" in line]
    assert any(f"vectors.cuh:{line} < norm.cu:" in text for line in stores)


def test_stuck_launch_reports_the_waiting_lines() -> None:
    change = (
        ROW_SUM,
        ROW_SUM.replace("__syncthreads();", "if (threadIdx.x != 70) __syncthreads(); else __syncwarp();"),
    )
    with patched("norm.cu", change), pytest.raises(SimtError, match="stuck:") as caught:
        rms_norm(1, 4096)
    line = 1 + (runner.sources() / "norm.cu").read_text().split(ROW_SUM)[0].count("\n")
    for thread, what in ((0, "__syncthreads"), (70, "__syncwarp"), (71, "__syncthreads")):
        assert f"from block (0, 0, 0) thread {thread} at norm.cu:{line} < norm.cu:" in str(caught.value)
        assert f"on: waiting in {what}" in str(caught.value)


def test_endless_loop_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_SECONDS", 1)
    change = (SHUFFLE, f"        while (*static_cast<volatile float*>(sums) != 1.f) {{}}\n{SHUFFLE}")
    with patched("norm.cu", change), pytest.raises(SimtError, match=r"ran for too long .* block .* at norm\.cu:"):
        rms_norm(1, 4096)


@pytest.mark.parametrize(
    ("offset", "says"),
    [(-1, "wrote outside its 256 bytes of shared memory, at byte -4"), (64, "0 bytes past the end of shared memory")],
)
def test_writing_outside_shared_memory_is_caught(offset: int, says: str) -> None:
    change = ("mine[threadIdx.x / 32] = v;", f"mine[threadIdx.x / 32] = v, sums[{offset}] = v;")
    with patched("norm.cu", change), pytest.raises(SimtError, match=says):
        rms_norm(1, 4096)


def test_arguments_must_have_the_kinds_of_the_parameters() -> None:
    launches: list[_jit.Launch] = []
    with _jit.host_runner(launches.append):
        cupy_lora.rms_norm(np.ones((1, 8), np.float16), np.ones(8, np.float16), 1e-6, np.ones((1, 8), np.float16))
    (launch,) = launches
    for i, wrong in ((4, np.int32(1)), (4, np.uint64(1)), (9, np.float64(1e-6)), (0, np.int64(0)), (4, None)):
        args = (*launch.args[:i], wrong, *launch.args[i + 1 :])
        with pytest.raises(SimtError, match=f"argument {i}: expected a parameter of kind"):
            runner.run(dataclasses.replace(launch, args=args))
    with pytest.raises(SimtError, match="expected 10 arguments, got 9"):
        runner.run(dataclasses.replace(launch, args=launch.args[:-1]))
    runner.run(launch)


def test_launches_that_no_gpu_takes() -> None:
    launches: list[_jit.Launch] = []
    with _jit.host_runner(launches.append):
        cupy_lora.rms_norm(np.ones((1, 8), np.float16), np.ones(8, np.float16), 1e-6, np.ones((1, 8), np.float16))
    (launch,) = launches
    for change in ({"block": 2048}, {"shared": 228 << 10}, {"cluster": 2}):
        with pytest.raises(SimtError, match="expected"):
            runner.run(dataclasses.replace(launch, kernel=dataclasses.replace(launch.kernel, **change)))
    with pytest.raises(SimtError, match="CUDA's limits"):
        runner.run(dataclasses.replace(launch, grid=(1, 65536, 1)))


def test_a_build_is_named_by_every_source_of_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_HERE", tmp_path / "simt")
    shutil.copytree(Path(build.__file__).parent, build._HERE)
    sources = [build._HERE / "simt.h", *(build._HERE / "engine").iterdir()]
    names = {build._digest(build._engine_unit(), build._HERE, ())}
    for path in sources:
        path.write_text(f"{path.read_text()}// changed\n")
        names.add(build._digest(build._engine_unit(), build._HERE, ()))
    assert len(sources) > 5
    assert len(names) == 1 + len(sources)


@pytest.mark.parametrize("edge", ["end", "start"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.int64])
@pytest.mark.parametrize("size", [0, 1, 7, 16, 5000])
def test_alloc_lies_at_the_edge(edge: str, dtype: type, size: int) -> None:
    values = np.arange(size).astype(dtype)
    for align in (np.dtype(dtype).itemsize, 16):
        array = alloc(values, edge, align)
        np.testing.assert_array_equal(array, values)
        first, last = array.__array_interface__["data"][0], array.__array_interface__["data"][0] + array.nbytes
        assert first % align == 0
        if size:
            assert (-last % runner.PAGE if edge == "end" else first % runner.PAGE) < align
