"""Scratch memory of the kernels: one piece a stream, at an address that does not change."""

from __future__ import annotations

import threading
from typing import Any, Final

from . import _arrays, _device
from ._arrays import CPU, Array

NBYTES: Final = (1 << 16) + (16 << 20)  # counters, then 16 MiB of partial results

_lock = threading.Lock()
_of_stream: dict[tuple[int, int], Array] = {}
_spare: dict[int, Array] = {}  # for the next stream that is first met while it is captured


def for_stream(device: int, stream: Any, nbytes: int = NBYTES) -> Array:
    """The workspace of a stream, all of whose first 64 KiB are zeros between launches; of the host a new one.

    Any call outside of capture sees to it that there is a spare one for the next stream that is first met under it.

    Raises
    ------
    ValueError
        If the stream is being captured, has no workspace yet, and there is no spare one: nothing ran before.
    """
    if device == CPU:
        return _new(nbytes, device)
    key = device, stream.ptr
    found = _of_stream.get(key)
    if found is not None and device in _spare:
        return found
    with _lock:
        if key not in _of_stream:
            if not _device.capturing(stream):
                _of_stream[key] = _new(NBYTES, device)
            elif device in _spare:
                _of_stream[key] = _spare.pop(device)
            else:
                raise ValueError(
                    "workspace: expected a call on this GPU outside of stream capture first (or a workspace of the "
                    "caller's), got the first one under capture"
                )
        if device not in _spare and not _device.capturing(stream):
            _spare[device] = _new(NBYTES, device)
        return _of_stream[key]


def _new(nbytes: int, device: int) -> Array:
    import numpy as np

    if device == CPU:
        memory = _arrays.empty((nbytes,), np.dtype(np.uint8), device)
        memory[: 1 << 16] = 0
        return _arrays.view("workspace", memory)
    return _arrays.view("workspace", _device.filled((nbytes,), np.dtype(np.uint8), device, 0))
