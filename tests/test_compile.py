"""Every specialisation compiles for every supported architecture, without spills and within the launch's limits."""

from __future__ import annotations

import re
from pathlib import Path

import kernel_list
import nvrtc
import pytest

from cupy_lora import _jit, _paths

REGISTERS_PER_SM = 65536
SHARED_PER_BLOCK = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB, the opt-in limit of the architecture

# Bytes of local memory that a kernel may take, at most, and why it is chosen all the same.
SPILLS = {
    # Long leaves of a rank that is no power of two: 80 us, of the direct form without any 119.
    "sm90-lora-add-3128x13568to1536-r48-runs-bfloat16": 212,
    # Tall tiles of such a rank: 64 us, lower ones 71.
    "sm90-lora-add-4793x2560to3584-r48-runs-bfloat16": 136,
    # Blocks of 16 warps where a tile's rows of A are long: 24 us for 25 by 8 warps, 356 for 389 and 115 for 120.
    "sm90-lora-add-294x13184to6528-r24-runs-bfloat16": 718,
    "sm90-lora-add-3964x13696to3584-r96-runs-bfloat16": 1006,
    "sm90-lora-add-1478x15232to1792-r96-runs-bfloat16": 150,
}

CASES = [
    pytest.param(arch, kernel, SPILLS.get(f"sm{arch}-{name}", 0), id=f"sm{arch}-{name}")
    for arch in kernel_list.ARCHS
    for name, kernel in kernel_list.kernels(arch)
]


@pytest.mark.parametrize(("arch", "kernel", "local"), CASES)
def test_specialisation_compiles_and_fits(arch: int, kernel: _jit.Kernel, local: int):
    assert 32 <= kernel.block <= 1024
    assert kernel.shared <= SHARED_PER_BLOCK[arch] * 1024
    assert kernel.cluster in (1, 2, 4, 8, 16)
    assert kernel.cluster == 1 or arch >= 90, "thread-block clusters start with compute capability 9.0"
    used = nvrtc.compile_kernel(kernel, arch)
    assert used.local_bytes <= local, f"expected at most {local} bytes of local memory, got {used}"
    assert used.static_shared_bytes <= 1024, f"expected dynamic shared memory only, got {used}"
    # The register file is handed out by warp in blocks of 256 registers.
    warps = -(-kernel.block // 32)
    allocated = warps * (-(-used.registers * 32 // 256) * 256)
    assert 1 <= used.registers <= 255
    assert allocated <= REGISTERS_PER_SM, f"one block needs {allocated} registers; an SM has {REGISTERS_PER_SM}"
    assert used.warnings == ""


def test_only_listed_kernels_may_take_local_memory():
    assert SPILLS.keys() <= {case.id for case in CASES}


def test_what_the_assembler_makes_slower_is_a_warning():
    """Warpgroup products that it serialises: of no other effect than time, and said as information."""
    note = "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    log = f"""{note} due to insufficient register resources for the wgmma pipeline in the function 'k'
ptxas info    : Compiling entry function 'k' for 'sm_90a'
ptxas info    : Function properties for k
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
"""
    assert "C7515" in nvrtc.read_log(log, "k").warnings
    assert nvrtc.read_log(log.split("\n", 1)[1], "k").warnings == ""


def entry_points(source: Path) -> set[str]:
    text = re.sub(r"//[^\n]*", "", source.read_text())
    found = set()
    for declaration in re.findall(r'extern "C" __global__([^{;]*)', text):
        called = re.findall(r"(\w+)\s*\(", declaration)
        found.add(next(name for name in called if not name.startswith("__") and not name.isupper()))
    return found


@pytest.mark.parametrize("source", sorted(_paths.cuda_src().glob("*.cu")), ids=lambda path: path.stem)
def test_every_entry_point_is_compiled(source: Path):
    compiled = {kernel.symbol for arch in kernel_list.ARCHS for _, kernel in kernel_list.kernels(arch)}
    missing = entry_points(source) - compiled
    assert entry_points(source), f"{source.name}: expected a kernel, found none"
    assert not missing, f"{source.name}: kernels that tests/kernel_list.py does not reach: {sorted(missing)}"
