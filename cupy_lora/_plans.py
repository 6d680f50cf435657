"""Launches kept from call to call: checks and plan depend on shapes, dtypes and alignment, not on addresses."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from . import _env, _jit
from ._arrays import CPU, Array, handle_for, read

_MOST = 1024  # kept per op: a server's batch sizes, not every one a program ever used

Arrays = Sequence[Array | None]


class Kept:
    """A launch without the caller's arrays, which it must not keep alive.

    Parameters
    ----------
    launch : Launch
    arrays : sequence of Array or None
        What the caller passes on each call. An argument of the launch that views one of them (from a column on)
        moves with it; any other array belongs to the library and stays where it is.
    apart : sequence of (int, int)
        Which of the arrays must not overlap: an output and another. All that :meth:`clear` looks at.
    """

    __slots__ = ("_args", "_places", "_ready", "apart", "device", "grid", "kernel")

    def __init__(self, launch: _jit.Launch, arrays: Arrays, apart: Sequence[tuple[int, int]] = ()) -> None:
        self.kernel, self.grid = launch.kernel, launch.grid
        self.device = next(array.device for array in arrays if array is not None)
        self._args: list[Any] = list(launch.args)
        self._places: list[tuple[int, int, int]] = []
        for position, arg in enumerate(launch.args):
            if isinstance(arg, Array):
                index = _index_of(arg, arrays)
                if index is not None:
                    owner = arrays[index]
                    assert owner is not None
                    self._places.append((position, index, arg.ptr - owner.ptr))
                    # Its memory is the caller's; where it views an array, its shape is not.
                    self._args[position] = Array(0, arg.shape, arg.strides, arg.dtype, arg.device, None)
        self.apart = [_bounds(out, other, arrays) for out, other in apart if _sized(out, other, arrays)]
        self._ready: _jit.Ready | None = None
        if self.device != CPU and 0 not in self.grid:
            launch = _jit.Launch(self.kernel, self.grid, tuple(self._args))
            self._ready = _jit.Ready(launch, self.device, self._places, len(arrays))

    def clear(self, pointers: Sequence[int]) -> bool:
        """Whether arrays at these addresses are apart."""
        for out, other, above, below in self.apart:  # noqa: SIM110 - a generator costs as much again
            if above < pointers[other] - pointers[out] < below:
                return False
        return True

    def run(
        self,
        pointers: Sequence[int],
        objs: Sequence[Any],
        on_torch: bool,
        values: Sequence[tuple[int, int | np.generic | np.ndarray]] = (),
    ) -> int | None:
        """Launch over these arrays, on their stream, and return that stream's handle (None on the host).

        Parameters
        ----------
        pointers : sequence of int
            Addresses, in the order of the arrays that it was made from; 0 for None.
        objs : sequence
            The arrays as :func:`read` returned them: on the host, :class:`Array`.
        on_torch : bool
        values : sequence of (int, integer or array)
            Arguments that the key does not cover, as :class:`Ready` takes them. An int gets the type that the
            argument had at first.
        """
        if self.device == CPU:
            _jit.run(self.launch(objs, values), CPU)
            return None
        stream = handle_for(self.device, on_torch)
        if self._ready is not None:
            self._ready(pointers, stream, values)
        return stream

    def launch(self, arrays: Arrays, values: Sequence[tuple[int, int | np.generic | np.ndarray]] = ()) -> _jit.Launch:
        """The launch over these arrays of the host: the CPU runner wants their shapes too."""
        args = self._args.copy()
        for position, index, delta in self._places:
            array, like = arrays[index], args[position]
            if delta and array is not None:  # a view of it, from a column on
                args[position] = Array(array.ptr + delta, like.shape, like.strides, like.dtype, like.device, array.obj)
            else:
                args[position] = array
        for position, value in values:
            args[position] = type(args[position])(value) if isinstance(value, int) else value
        return _jit.Launch(self.kernel, self.grid, tuple(args))


def _index_of(arg: Array, arrays: Arrays) -> int | None:
    for i, array in enumerate(arrays):
        if array is arg:
            return i
    for i, array in enumerate(arrays):
        if array is not None and array.obj is not None and array.obj is arg.obj:
            return i
    return None


def _sized(out: int, other: int, arrays: Arrays) -> bool:
    pair = arrays[out], arrays[other]
    return all(array is not None and array.size > 0 for array in pair)


def _bounds(out: int, other: int, arrays: Arrays) -> tuple[int, int, int, int]:
    """The distances (bytes from ``out`` to ``other``, both excluded) at which the two overlap."""
    one, two = arrays[out], arrays[other]
    assert one is not None
    assert two is not None
    (low, high), (start, stop) = one.span, two.span
    return out, other, (low - one.ptr) - (stop - two.ptr), (high - one.ptr) - (start - two.ptr)


Found = tuple[Kept | None, Hashable, list[int], Sequence[Any], bool]


class Plans:
    """The launches of one op, by all that its checks and its plan look at.

    An array enters the key with its shape, strides (contiguous ones are alike), dtype, device and its
    address modulo 16, a scalar with its type (True is not 1). Whether arrays overlap is looked at on every call.

    Parameters
    ----------
    switch : Switch, optional
        One that leads another way than a kept launch; debug always does.
    """

    def __init__(self, switch: _env.Switch = _env.DEBUG) -> None:
        self._kept: dict[Hashable, Kept] = {}
        self._switch = switch

    def find(self, names: Sequence[str], objs: Sequence[Any], *scalars: Any) -> Found:
        """What an earlier call of this kind kept, if the arrays are apart as it demands.

        Parameters
        ----------
        names : sequence of str
            Of the arrays, for errors.
        objs : sequence of array or None
            What the caller passed.
        scalars : object
            What else the checks and the plan look at.

        Returns
        -------
        Kept or None
            None under debug too, and where NumPy does the work.
        key : hashable
            For :meth:`run`; None where a scalar cannot be hashed.
        pointers, objs, on_torch
            As of :func:`read`, for :meth:`Kept.run`.
        """
        layout, pointers, objs, on_torch = read(names, objs)
        key: Hashable = (*scalars, *map(type, scalars), *layout)
        try:
            kept = self._kept.get(key)
        except TypeError:  # the checks will name the scalar, or do without its plan
            return None, None, pointers, objs, on_torch
        if (
            kept is None
            or _env.DEBUG.on
            or (kept.device == CPU and not _jit.has_host_runner())
            or (self._switch is not _env.DEBUG and self._switch.on)
            or (kept.apart and not kept.clear(pointers))
        ):
            kept = None
        return kept, key, pointers, objs, on_torch

    def run(
        self,
        key: Hashable,
        launch: _jit.Launch,
        arrays: Arrays,
        on_torch: bool,
        apart: Sequence[tuple[int, int]] = (),
        values: Sequence[tuple[int, np.generic | np.ndarray]] = (),
    ) -> None:
        """Run a new plan, and keep it under ``key`` (unless that is None).

        Parameters
        ----------
        key : hashable
        launch : Launch
        arrays, apart
            As :class:`Kept` takes them, after the caller's checks.
        on_torch : bool
        values
            As of :meth:`Kept.run`.
        """
        kept = Kept(launch, arrays, apart)
        kept.run([0 if array is None else array.ptr for array in arrays], arrays, on_torch, values)
        if key is not None:
            if len(self._kept) >= _MOST:
                self._kept.clear()
            self._kept[key] = kept

    def clear(self) -> None:
        """Forget every launch."""
        self._kept.clear()
