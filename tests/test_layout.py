"""The shape of the repository: one stem an op, assembly apart, kernels that stand alone, a light import."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import cupy_lora

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "cuda_src").glob("*.cu"))
SOURCES = sorted((ROOT / "cuda_src").glob("*.cu*"))


def stem(path: Path) -> str:
    return path.stem


def code(path: Path) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.S)


@pytest.mark.parametrize("path", KERNELS, ids=stem)
def test_an_op_has_one_stem_everywhere(path):
    places = [f"cupy_lora/{path.stem}.py", f"tests/test_{path.stem}.py", f"bench/bench_{path.stem}.py"]
    assert [place for place in places if not (ROOT / place).is_file()] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_assembly_is_in_files_of_its_own(path):
    assert path.name in ("ptx.cuh", "ptx_barriers.cuh", "ptx_wgmma.cuh") or not re.search(r"\basm\b", code(path))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_sources_include_only_each_other(path):
    names = {other.name for other in SOURCES} | {"simt.h"}  # simt.h: the CPU runner's, in common.cuh
    assert set(re.findall(r"#\s*include\s*[<\"]([^>\"]+)", code(path))) <= names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_lambdas_have_types(path):
    """NVRTC 13.0 takes a lambda with a parameter of type auto for a host function; 13.5 does not."""
    assert re.findall(r"\[[&=\w\s,]*\]\s*\([^)]*\bauto\b[^)]*\)", code(path)) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_sources_can_be_read_in_one_sitting(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 400, f"expected at most 400 lines, got {len(lines)}"
    assert lines[0].startswith("// "), "expected a comment that says what the file computes"


@pytest.mark.parametrize("path", KERNELS, ids=stem)
def test_shared_memory_comes_through_the_macro(path):
    assert not re.search(r"\b__shared__\b", code(path))


def test_import_loads_no_array_library():
    script = (
        "import sys, cupy_lora; dir(cupy_lora); "
        "print(*[name for name in ('cupy', 'torch', 'jax', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_reference_path_loads_no_gpu_library():
    script = (
        "import sys, numpy as np, cupy_lora\n"
        "x, w = np.ones((2, 8), np.float32), np.ones(8, np.float32)\n"
        "cupy_lora.rms_norm(x, w)\n"
        "print(*[name for name in ('cupy', 'torch', 'jax') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", [name for name in cupy_lora.__all__ if name != "__version__"])
def test_public_name_exists_and_is_documented(name):
    value = getattr(cupy_lora, name)
    assert value.__doc__, f"{name}: expected a docstring"


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'no_such_op'"):
        _ = cupy_lora.no_such_op


def test_every_kernel_begins_by_waiting_for_the_launch_before() -> None:
    """A kernel is launched while the one before may still run: it reads and writes nothing until that one is done."""
    kernels = 0
    for path in KERNELS:
        for kernel in code(path).split('extern "C" __global__')[1:]:
            kernels += 1
            first = re.search(r"\) \{\n(?:#.*\n)*\s*(.*)", kernel)
            assert first is not None
            assert first[1].startswith("ptx::begin_launch("), f"{path.name}: a kernel that begins with {first[1]!r}"
    assert kernels > 15
