"""Every kernel specialisation that is compiled without a GPU: a function per op family, through its plan functions."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cupy_lora import _jit

PACKAGE = Path(_jit.__file__).resolve().parent
ARCHS = (80, 86, 89, 90, 100, 120)
SM_COUNTS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 170}

Named = tuple[str, _jit.Kernel]
_FAMILIES: dict[str, Callable[[Any, int, int], Iterator[Named]]] = {}


def family(module: str) -> Callable[[Callable[[Any, int, int], Iterator[Named]]], Callable[..., Iterator[Named]]]:
    """Register a function (module, arch, SM count) -> (id, kernel) pairs for ``cupy_lora.<module>``."""

    def register(function: Callable[[Any, int, int], Iterator[Named]]) -> Callable[..., Iterator[Named]]:
        _FAMILIES[module] = function
        return function

    return register


def kernels(arch: int) -> list[Named]:
    """Every distinct kernel for one architecture, with an id that says what asked for it."""
    found: dict[_jit.Kernel, str] = {}
    for module, function in _FAMILIES.items():
        for name, kernel in function(importlib.import_module(f"cupy_lora.{module}"), arch, SM_COUNTS[arch]):
            found.setdefault(kernel, f"{module}-{name}")
    return [(name, kernel) for kernel, name in found.items()]


def one_per_source(arch: int) -> list[Named]:
    """The first kernel of each source file."""
    first: dict[str, Named] = {}
    for name, kernel in kernels(arch):
        first.setdefault(kernel.source, (name, kernel))
    return list(first.values())
