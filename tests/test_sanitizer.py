"""compute-sanitizer over the GPU tests: accesses outside an array, and races in shared memory."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import engines
import pytest

TESTS = Path(__file__).resolve().parent
FILES = (
    "test_lora.py", "test_lora_gpu.py", "test_bgmv.py", "test_sgmv.py", "test_lora_batch.py", "test_lora_weights.py",
    "test_attention.py", "test_attention_input.py", "test_norm.py", "test_paged_kv.py", "test_metadata.py",
    "test_metadata_step.py", "test_punica_kernels.py",
)  # fmt: skip
# What needs other libraries, streams that wait on each other, or thousands of launches.
LEFT_OUT = "not fuzz and not torch and not jax and not wait and not graph and not capture"


def program() -> str | None:
    """compute-sanitizer: of the package nvidia-cuda-sanitizer-api, of the PATH, or of the toolkit."""
    try:
        package = importlib.metadata.distribution("nvidia-cuda-sanitizer-api")
    except importlib.metadata.PackageNotFoundError:
        return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    return str(package.locate_file("nvidia/cu13/bin/compute-sanitizer"))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(engines.SANITIZED in os.environ, reason="runs within itself")
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_nothing_to_report(file: str, tool: str) -> None:
    sanitizer = program()
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "86", "--print-limit", "5"]
    command += [sys.executable, "-m", "pytest"]
    command += ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-m", "gpu", "-k", LEFT_OUT, str(TESTS / file)]
    environment = {**os.environ, engines.SANITIZED: "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS.parent, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in result.stdout or "RACECHECK SUMMARY: 0 hazards" in result.stdout
