"""Fixtures of every test: the engines, what happens where there is no GPU, the demo's checkpoints."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import engines
import hypothesis
import pytest

from cupy_lora import _demo_model, _env
from cupy_lora._demo_model import ADAPTERS

# JAX takes three quarters of the GPU's memory at its first use otherwise, from every test process.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# Set once here: a case is a whole matrix product, so it may be slow on a shared machine, and must be repeatable.
hypothesis.settings.register_profile("cupy_lora", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("cupy_lora")


def pytest_configure(config: pytest.Config) -> None:
    if engines.SANITIZED in os.environ:
        import cupy

        # Without the pool each array is an allocation of its own, whose bounds the sanitizer knows.
        cupy.cuda.set_allocator(None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    reason = engines.gpu_missing()
    if reason is not None:
        if _env.REQUIRE_GPU.on:
            pytest.fail(f"{_env.REQUIRE_GPU.name} is set: {reason}", pytrace=False)
        pytest.skip(reason)


@pytest.fixture(
    params=["numpy", pytest.param("simt", marks=pytest.mark.simt), pytest.param("gpu", marks=pytest.mark.gpu)]
)
def engine(request: pytest.FixtureRequest) -> Iterator[engines.Engine]:
    """Each engine in turn: NumPy, the CUDA sources on the CPU, the GPU."""
    with engines.running(request.param) as active:
        yield active


@pytest.fixture(params=[pytest.param("simt", marks=pytest.mark.simt), pytest.param("gpu", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest) -> Iterator[engines.Engine]:
    """Each engine that runs the CUDA sources: what is promised of their bits."""
    with engines.running(request.param) as active:
        yield active


@pytest.fixture
def gpu() -> Iterator[engines.Engine]:
    """The GPU; only for tests marked ``gpu``."""
    with engines.running("gpu") as active:
        yield active


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder with a PEFT adapter of rank 4 over all modules, to be damaged."""
    return shutil.copytree(ADAPTERS / "rank4-fp32", tmp_path / "adapter")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model, to be read only."""
    path = tmp_path_factory.mktemp("model")
    _demo_model.write_demo_model(path)
    return path


@pytest.fixture
def model_copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to be damaged."""
    path = tmp_path / "model"
    shutil.copytree(checkpoint, path)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cupy_lora"
