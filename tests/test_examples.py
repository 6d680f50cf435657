"""The examples run as they are, from a folder of their own."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(path, cwd, **environment):
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(path)],
        check=False,
        capture_output=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(path, output):
    """The printed numbers are what the arrays' values imply."""
    numbers = [float(word) for word in re.findall(r"\d+\.?\d*(?:e-?\d+)?", output)]
    if path.stem == "cupy_example":
        assert len(numbers) == 4
        assert min(numbers[:3]) > 0.5
        assert numbers[3] == 0  # the row without an adapter
    else:
        assert len(numbers) == 1
        assert 0 < numbers[0] < 0.1  # rounding to 16 bits; the updates themselves reach several units


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_on_the_cpu(path, tmp_path):
    library = path.stem.removesuffix("_example")
    if library != "cupy" and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    check(path, run(path, tmp_path, CUDA_VISIBLE_DEVICES="", JAX_PLATFORMS="cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_on_the_gpu(path, tmp_path):
    library = path.stem.removesuffix("_example")
    if library != "cupy" and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    check(path, run(path, tmp_path))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short(path):
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith(('"""', "import", "from"))]
    assert len(lines) <= 22
