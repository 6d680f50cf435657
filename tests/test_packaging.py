"""The wheel: built from the sdist, installed in an empty environment, it carries the CUDA sources and compiles them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.xdist_group("packaging")  # one process builds and installs once for all

# Runs in the environment of the wheel. The last line it prints is for the test.
CHECK = """
import json, sys
import cupy_lora
from cupy_lora import _paths
before = sorted(name for name in ("cupy", "torch", "jax") if name in sys.modules)
sys.path.append(sys.argv[1])
import kernel_list, nvrtc
compiled = {}
for name, kernel in kernel_list.one_per_source(90):
    compiled[kernel.source] = nvrtc.compile_kernel(kernel, 90, cache=False).registers
print(json.dumps({"file": cupy_lora.__file__, "cuda_src": str(_paths.cuda_src()), "imported": before,
                  "compiled": compiled}))
"""


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", folder, cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder, cwd=source)
    (path,) = folder.glob("*.whl")
    return path


def borrow_dependencies(site: Path) -> None:
    """Link what the tests' environment has into another, this package and all .pth files (the checkout) excepted.

    A search path is not enough: NVRTC is looked for in the folders of site packages only.
    """
    names = ("numpy", "ml_dtypes", "cupy", "nvidia")
    specs = [spec for spec in map(importlib.util.find_spec, names) if spec is not None]
    for folder in {Path(place).parent for spec in specs for place in spec.submodule_search_locations}:
        for entry in folder.iterdir():
            ours = entry.name.startswith(("cupy_lora", "_cupy_lora", "__"))
            if not ours and entry.suffix != ".pth" and not (site / entry.name).exists():
                (site / entry.name).symlink_to(entry)


@pytest.fixture(scope="module")
def report(wheel, tmp_path_factory) -> dict:
    """What a Python with the wheel and without the checkout says."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "env", symlinks=True)
    python = folder / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    borrow_dependencies(site)
    out = run(python, "-I", "-c", CHECK, ROOT / "tests", cwd=folder)
    return {**json.loads(out.splitlines()[-1]), "site": str(site)}


def sources() -> set[str]:
    return {path.name for path in (ROOT / "cuda_src").iterdir() if path.is_file()}


def test_sdist_holds_what_the_tests_and_the_build_need(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"cuda_src/{name}" for name in sources()} <= names
    assert {"pyproject.toml", "Makefile", "LICENSE", "README.md", "cupy_lora/py.typed", "tests/nvrtc.py"} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith(".venv")]


def test_wheel_holds_the_package_and_its_sources_only(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"cupy_lora/cuda_src/{name}" for name in sources()} <= names
    assert {"cupy_lora/__init__.py", "cupy_lora/py.typed"} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"cupy_lora"}
    assert not [name for name in names if "__pycache__" in name]


def test_installed_package_is_the_wheel(report):
    assert report["file"] == f"{report['site']}/cupy_lora/__init__.py"
    assert report["cuda_src"] == f"{report['site']}/cupy_lora/cuda_src"


def test_import_needs_no_array_library(report):
    assert report["imported"] == []


def test_installed_sources_compile(report):
    expected = {path.stem for path in (ROOT / "cuda_src").glob("*.cu")}
    assert set(report["compiled"]) == expected
    assert all(registers > 0 for registers in report["compiled"].values())
