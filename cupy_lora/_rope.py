"""Rotary embedding: its arguments, and the frequencies that the kernels take."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from ._lora_checks import real


class Rope(NamedTuple):
    """Pair ``d`` turns by ``theta ** (-2 d / head_dim) / scale`` a position."""

    theta: float
    scale: float


def positive(name: str, value: Any) -> float:
    """A finite real number above 0.

    Raises
    ------
    TypeError, ValueError
        For anything else.
    """
    number = real(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, got {number}")
    return number


def checked(rope: Any, rope_theta: Any, rope_scale: Any) -> Rope | None:
    """The three arguments as one; None for no rotation.

    Raises
    ------
    TypeError, ValueError
        For a ``rope`` other than ``"llama"`` and None, and for a theta or scale that is not a number above 0.
    """
    if rope is not None and not isinstance(rope, str):
        raise TypeError(f"rope: expected 'llama' or None, got {type(rope).__name__}")
    if rope not in ("llama", None):
        raise ValueError(f"rope: expected 'llama' or None, got {rope!r}")
    found = Rope(positive("rope_theta", rope_theta), positive("rope_scale", rope_scale))
    return None if rope is None else found


@functools.lru_cache(maxsize=64)
def frequencies(dim: int, rope: Rope | None) -> np.ndarray:
    """Turns per position of each pair: the struct ``Frequencies`` of rope.cuh; zeros without rotation."""
    by_value = np.zeros(1, np.dtype([("turns", np.float64, (dim // 2,))]))
    if rope is not None:
        exponents = -np.arange(0, dim, 2, dtype=np.float64) / dim
        by_value["turns"][0] = rope.theta**exponents / (2 * math.pi * rope.scale)
    return by_value
