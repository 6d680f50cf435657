"""Each wrapper of cuda_src/ptx_wgmma.cuh: the GPU's instruction and the CPU's body against NumPy, by the same tests."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import engines
import numpy as np
import nvrtc
import pytest
from simt import runner
from test_ptx import BFLOAT16

from cupy_lora import _cubins, _jit, _paths
from cupy_lora._arrays import CPU, view

KERNELS = Path(__file__).parent / "ptx_wgmma_kernels.cu"
HALVES = {"bf16": BFLOAT16, "f16": np.dtype(np.float16)}


def kernel(symbol: str, block: int, shared: int, **defines: int | str) -> _jit.Kernel:
    macros = {"ELEMENT": "bf16", "EIGHTS": 8, "DEPTH": 64, **defines, _cubins.ARCH_SPECIFIC: 1}
    return _jit.Kernel("../tests/ptx_wgmma_kernels", symbol, tuple(macros.items()), block, shared)


def launch(engine: engines.Engine, one: _jit.Kernel, *args: Any) -> None:
    if engine.name == "gpu" and _jit.device_facts(0).arch != 90:
        pytest.skip("warpgroup products are compute capability 9.0's")
    device = CPU if engine.name == "simt" else 0
    passed = tuple(arg if isinstance(arg, np.generic) else view("argument", arg) for arg in args)
    _jit.run(_jit.Launch(one, (1, 1, 1), passed), device)


def assert_product(got: np.ndarray, start: np.ndarray, a: np.ndarray, b: np.ndarray, times: int) -> None:
    wide = [v.astype(np.float64) for v in (start, a, b)]
    # As test_ptx.py: a few units in the last place of the sum of magnitudes, each 16 of k.
    bound = (np.abs(wide[1]) @ np.abs(wide[2]) * times + np.abs(wide[0])) * 2.0**-21
    assert (np.abs(got - (wide[0] + times * (wide[1] @ wide[2]))) <= bound).all()


@pytest.mark.parametrize("exact", [True, False], ids=["integers", "floats"])
@pytest.mark.parametrize("depth", [64, 128])
@pytest.mark.parametrize("eights", [8, 12, 16])
@pytest.mark.parametrize("element", ["bf16", "f16"])
def test_both_matrices_from_shared_memory(
    kernels: engines.Engine, element: str, eights: int, depth: int, exact: bool
) -> None:
    a, b, c = operands((64, depth), (eights * 8, depth), (64, eights * 8), element, exact)
    for twice in (0, 1):
        out = kernels.array(np.full_like(c, np.nan))  # what was there does not count
        one = kernel("along_k", 128, 1024 + (64 + eights * 8) * depth * 2, ELEMENT=element, EIGHTS=eights, DEPTH=depth)
        launch(kernels, one, *(kernels.array(v.view(np.uint16)) for v in (a, b)), out, np.int32(twice))
        got = kernels.numpy(out)
        if exact:
            np.testing.assert_array_equal(got, (1 + twice) * (a.astype(np.float32) @ b.astype(np.float32).T))
        else:
            assert_product(got, np.zeros_like(c), a, b.T, 1 + twice)


@pytest.mark.parametrize("exact", [True, False], ids=["integers", "floats"])
@pytest.mark.parametrize("depth", [64, 96, 128])
@pytest.mark.parametrize("eights", [8, 16])
@pytest.mark.parametrize("element", ["bf16", "f16"])
def test_the_first_matrix_from_registers(
    kernels: engines.Engine, element: str, eights: int, depth: int, exact: bool
) -> None:
    a, b, c = operands((64, depth), (depth, eights * 8), (64, eights * 8), element, exact)
    out = kernels.array(c)
    one = kernel("across_k", 128, 1024 + depth * eights * 16, ELEMENT=element, EIGHTS=eights, DEPTH=depth)
    launch(kernels, one, *(kernels.array(v.view(np.uint16)) for v in (a, b)), out)
    got = kernels.numpy(out)
    if exact:
        np.testing.assert_array_equal(got, c + a.astype(np.float32) @ b.astype(np.float32))
    else:
        assert_product(got, c, a, b, 1)


def operands(
    a: tuple[int, int], b: tuple[int, int], c: tuple[int, int], element: str, exact: bool
) -> tuple[np.ndarray, ...]:
    """Small integers (every sum is exact in float32: a single misplaced element shows), or floats."""
    rng = np.random.default_rng(7)
    dtype = HALVES[element]
    if exact:
        left, right = (rng.integers(-8, 9, shape).astype(dtype) for shape in (a, b))
        return left, right, rng.integers(-100, 101, c).astype(np.float32)
    left, right = (rng.standard_normal(shape).astype(dtype) for shape in (a, b))
    return left, right, rng.standard_normal(c).astype(np.float32)


@pytest.mark.parametrize("rounds", [0, 1, 5])
def test_warpgroups_take_turns(kernels: engines.Engine, rounds: int) -> None:
    out = kernels.array(np.zeros(128, np.int32))
    launch(kernels, kernel("turns", 384, 1024), out, np.int32(rounds))
    expected = np.arange(128, dtype=np.int32)
    for _ in range(rounds):
        expected = (expected * 3 + 2) * 3 + 1
    np.testing.assert_array_equal(kernels.numpy(out), expected)


@pytest.mark.parametrize("symbol", ["along_k", "across_k", "turns"])
def test_the_instructions_compile(symbol: str) -> None:
    """Without a GPU: what NVRTC's assembler takes, and nothing that it serialises or ignores."""
    used = nvrtc.compile_kernel(kernel(symbol, 128, 0, EIGHTS=16, DEPTH=128), 90)
    assert used.warnings == ""
    assert used.local_bytes == 0


def test_kernels_of_one_architecture_are_compiled_for_it_alone() -> None:
    one = kernel("turns", 384, 1024)
    assert _cubins.options(_cubins.unit_of(one, 90))[-1] == "-arch=sm_90a"
    plain = _jit.Kernel(one.source, one.symbol, (), 384)
    assert _cubins.options(_cubins.unit_of(plain, 90))[-1] == "-arch=sm_90"
    assert _cubins.file_name(_cubins.unit_of(plain, 90)) != _cubins.file_name(_cubins.unit_of(one, 90))


# ---- what the CPU runner notices -----------------------------------------------------------------
FAULTS = {  # in across_k: what is replaced, by what, what is said
    "no fence of registers": ("    ptx::wgmma_fence();\n", "", "without wgmma_fence"),
    "no fence of shared memory": ("    ptx::wgmma_fence_shared();\n", "", "has not called wgmma_fence_shared"),
    "no wait": ("    ptx::wgmma_wait<1>();\n    ptx::wgmma_wait<0>();\n", "", "exited with products under way"),
    "a group is left": ("    ptx::wgmma_wait<0>();\n", "", "exited with products under way"),
    "accumulators are touched": ("ptx::wgmma_wait<1>", "sum[0][0] = 1.f, ptx::wgmma_wait<1>", "was written before"),
    "no barrier": ("    __syncthreads();\n", "", "a race"),
    "a warp does less": ("ptx::wgmma_across", "if (k < 3 || threadIdx.x < 96) ptx::wgmma_across", "took part in"),
    "a row too far": (
        "ptx::matrix_across_k(right,",
        "ptx::matrix_across_k(right + 128,",
        "is not in the first row of 8",
    ),
}


@pytest.mark.simt
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(fault: str, tmp_path: Path) -> None:
    old, new, message = FAULTS[fault]
    before, kernels = KERNELS.read_text().split("across_k(const u16* a", 1)
    body, after = kernels.split("#endif", 1)
    assert body.count(old) == 1
    changed = f"{before}across_k(const u16* a{body.replace(old, new)}#endif{after}"
    (tmp_path / "changed.cu").write_text(changed)
    one = dataclasses.replace(kernel("across_k", 128, 1024 + 64 * 64 * 2), source=str(tmp_path / "changed"))
    a, b, c = operands((64, 64), (64, 64), (64, 64), "bf16", True)
    with engines.running("simt") as engine, pytest.raises(runner.SimtError, match=message):
        launch(engine, one, *(engine.array(v.view(np.uint16)) for v in (a, b)), engine.array(c))


def test_every_wrapper_is_tested() -> None:
    text = (_paths.cuda_src() / "ptx_wgmma.cuh").read_text()
    wrappers = set(re.findall(r"^CUPY_LORA_DEVICE [\w*]+ (\w+)\(", text, re.M))
    wrappers.discard("matrix_address")  # only inside the others
    assert len(wrappers) > 10
    assert wrappers <= set(re.findall(r"ptx::(\w+)", KERNELS.read_text()))
