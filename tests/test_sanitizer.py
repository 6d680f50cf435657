"""compute-sanitizer over the GPU tests: accesses outside an array, and races in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import engines
import pytest

TESTS = Path(__file__).resolve().parent
FILES = (
    "test_lora.py", "test_bgmv.py", "test_sgmv.py", "test_lora_batch.py", "test_lora_weights.py", "test_attention.py",
    "test_norm.py", "test_paged_kv.py", "test_metadata.py", "test_punica_kernels.py"
)  # fmt: skip
# What needs other libraries, streams that wait on each other, or thousands of launches.
LEFT_OUT = "not fuzz and not torch and not jax and not wait and not graph and not capture"


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(engines.SANITIZED in os.environ, reason="runs within itself")
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_nothing_to_report(file: str, tool: str) -> None:
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [program, "--tool", tool, "--error-exitcode", "86", "--print-limit", "5", sys.executable, "-m", "pytest"]
    # One lane arrives at an mbarrier for its warp: racecheck versions with this switch follow that only where told to.
    indirect = "--racecheck-indirect-barrier-dependency"
    if tool == "racecheck" and indirect in subprocess.run([program, "--help"], capture_output=True, text=True).stdout:
        command[3:3] = [indirect, "yes"]
    command += ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-m", "gpu", "-k", LEFT_OUT, str(TESTS / file)]
    environment = {**os.environ, engines.SANITIZED: "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS.parent, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in result.stdout or "RACECHECK SUMMARY: 0 hazards" in result.stdout
