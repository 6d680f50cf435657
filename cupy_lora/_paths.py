"""Where the CUDA sources are: in the package when installed, beside it in a checkout."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


@functools.cache
def cuda_src() -> Path:
    """The folder that holds the ``.cu`` and ``.cuh`` files."""
    package = Path(__file__).resolve().parent
    for folder in (package / "cuda_src", package.parent / "cuda_src"):
        if (folder / "common.cuh").is_file():
            return folder
    raise RuntimeError(f"cupy_lora: the CUDA sources are missing: expected a cuda_src folder in or beside {package}")


@functools.cache
def source_digest() -> str:
    """SHA-256 over every CUDA source: CuPy's cache key does not see headers reached through ``-I``."""
    digest = hashlib.sha256()
    for path in sorted(cuda_src().glob("*.cu*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
