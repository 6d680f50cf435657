"""Launches kept from call to call: checks and plan depend on shapes, dtypes and alignment, not on addresses."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

from . import _env, _jit
from ._arrays import CPU, Array

_MOST = 1024  # kept per op: a server's batch sizes, not every one a program ever used

Arrays = tuple[Array | None, ...]


class Kept:
    """A launch without the caller's arrays, which it must not keep alive.

    Attributes
    ----------
    reach : int
        Arrays whose first elements are at least so many bytes apart do not overlap, whatever their strides.
    """

    __slots__ = ("grid", "kernel", "places", "reach", "template")

    def __init__(self, launch: _jit.Launch, arrays: Arrays) -> None:
        self.kernel, self.grid, self.template = launch.kernel, launch.grid, list(launch.args)
        self.places = []
        for position, arg in enumerate(launch.args):
            if isinstance(arg, Array):
                self.places.append((position, next(i for i, array in enumerate(arrays) if array is arg)))
                self.template[position] = None
        self.reach = 2 * max(
            (high - low for low, high in (array.span for array in arrays if array is not None)), default=0
        )

    def launch(self, arrays: Arrays, scalars: dict[int, np.generic] | None = None) -> _jit.Launch:
        """The launch over these arrays; ``scalars``: arguments (by position) that the key does not cover."""
        args: list[Any] = self.template.copy()
        for position, index in self.places:
            args[position] = arrays[index]
        if scalars is not None:
            for position, value in scalars.items():
                args[position] = value
        return _jit.Launch(self.kernel, self.grid, tuple(args))


class Plans:
    """The launches of one op, by all that its checks and its plan look at.

    An array enters the key with its shape, strides, dtype, device and its address modulo 16. A
    check of addresses (overlap) is not covered: the op repeats it on every call.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, Kept] = {}

    def key(self, arrays: Arrays, *scalars: Hashable) -> Hashable:
        """What identifies a call: the arrays' layouts and the scalar arguments."""
        layouts = [a if a is None else (a.shape, a.strides, a.dtype, a.device, a.ptr % 16) for a in arrays]
        return (scalars, *layouts)

    def find(self, key: Hashable, arrays: Arrays) -> Kept | None:
        """What an earlier call with this key kept; None under debug, and where NumPy does the work."""
        try:
            kept = self._kept.get(key)
        except TypeError:  # a scalar that cannot be hashed: the checks will name it
            return None
        if kept is None or _env.DEBUG.on:
            return None
        first = arrays[0]
        if first is not None and first.device == CPU and not _jit.has_host_runner():
            return None
        return kept

    def keep(self, key: Hashable, launch: _jit.Launch, arrays: Arrays) -> None:
        """Keep a launch whose array arguments are all among ``arrays``."""
        if len(self._kept) >= _MOST:
            self._kept.clear()
        self._kept[key] = Kept(launch, arrays)

    def clear(self) -> None:
        """Forget every launch."""
        self._kept.clear()
