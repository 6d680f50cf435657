"""Parts of a LoRAX checkout (named by ``CUPY_LORA_LORAX_CHECKOUT``), imported without the server around them.

What had to be disabled, for the Triton of today: ``libentry`` (its launcher is written for an older Triton; the
kernels run as well without), a comma in the sgmv kernels that makes a tuple of a pointer, and quotes around
``tl.constexpr`` in the metadata kernels (Triton's interpreter does not see through them). The packages' own
``__init__`` modules are not run: they need the whole server. Triton kernels run on the GPU, or on the CPU
under ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import pytest

from cupy_lora import _device, _env

_scratch: list[tempfile.TemporaryDirectory[str]] = []


def server() -> Path:
    """The folder ``server`` of the checkout; skips the test where there is none."""
    path = os.environ.get(_env.LORAX_CHECKOUT.name, "")
    if not path:
        pytest.skip(f"{_env.LORAX_CHECKOUT.name} names no LoRAX checkout")
    folder = Path(path) / "server"
    assert (folder / "lorax_server").is_dir(), f"{_env.LORAX_CHECKOUT.name}: expected a LoRAX checkout, got {path}"
    return folder


def device() -> str:
    """Where its kernels run; skips the test where they cannot."""
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    if _device.has_gpu_kernels():
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set")
    return "cpu"


def load(name: str) -> Any:
    """The module ``lorax_server.<name>``, on :mod:`cupy_lora.punica_kernels`."""
    folder = server()
    if "lorax_server" not in sys.modules:
        _install(folder)
    return importlib.import_module(f"lorax_server.{name}")


def load_test(name: str) -> Any:
    """A module of the checkout's own tests."""
    load("utils.punica")
    path = server() / "tests" / "utils" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"lorax_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parameters(function: Any) -> list[dict[str, Any]]:
    """The combinations that the function's own ``pytest.mark.parametrize`` marks ask for."""
    combinations: list[dict[str, Any]] = [{}]
    for mark in function.pytestmark:
        if mark.name == "parametrize":
            names = [name.strip() for name in mark.args[0].split(",")]
            values = [value if len(names) > 1 else (value,) for value in mark.args[1]]
            combinations = [{**one, **dict(zip(names, value, strict=True))} for one in combinations for value in values]
    return combinations


def _install(folder: Path) -> None:
    from cupy_lora import punica_kernels

    scratch = tempfile.TemporaryDirectory(prefix="lorax_")
    _scratch.append(scratch)
    package, changed = folder / "lorax_server", Path(scratch.name)
    for source in (*(package / "utils" / "ops").glob("*.py"), package / "models" / "metadata_kernels.py"):
        target = changed / source.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_changed(source.read_text()))
    for name in ("", ".utils", ".models", ".utils.ops"):
        module = types.ModuleType(f"lorax_server{name}")
        module.__path__ = [str(root / name[1:].replace(".", "/")) for root in (changed, package)]
        sys.modules[module.__name__] = module
    if importlib.util.find_spec("loguru") is None:
        loguru = types.ModuleType("loguru")
        loguru.logger = types.SimpleNamespace(info=print, warning=print)  # type: ignore[attr-defined]
        sys.modules["loguru"] = loguru
    sys.modules["punica_kernels"] = punica_kernels


def _changed(text: str) -> str:
    text = re.sub(r"^from .*libentry import libentry\n", "", text, flags=re.M)
    text = re.sub(r"^@libentry\(\)\n", "", text, flags=re.M)
    text = re.sub(r"^( *a_ptr = )\((.*),\)$", r"\1\2", text, flags=re.M)
    return text.replace('"tl.constexpr"', "tl.constexpr")
