"""Host memory for launches: arrays between pages without access, and copies of them at the other edge."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

PAGE = mmap.PAGESIZE
POISONS = (0xFF, 0x7E)  # of the two thread orders: what is read from outside an array differs between them

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Region(mmap.mmap):
    """The pages of one array, between two pages without access."""

    label: str
    edge: str
    align: int
    address: int  # of the first data page
    size: int  # of the data pages
    start: int  # of the array within them
    stop: int

    @classmethod
    def of(cls, nbytes: int, edge: str, align: int, label: str) -> Region:
        pages = max(1, -(-nbytes // PAGE))
        region = cls(-1, (pages + 2) * PAGE)
        region.label, region.edge, region.align = label, edge, align
        region.size = pages * PAGE
        region.start = 0 if edge == "start" else (region.size - nbytes) // align * align
        region.stop = region.start + nbytes
        region.address = np.frombuffer(region, np.uint8).ctypes.data + PAGE
        for guard in (region.address - PAGE, region.address + region.size):
            if _libc.mprotect(guard, PAGE, 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        region.poison(POISONS[0])
        return region

    def _pages(self) -> np.ndarray:
        return np.frombuffer(self, np.uint8)[PAGE : PAGE + self.size]

    def bytes(self) -> np.ndarray:
        """The array's bytes."""
        return self._pages()[self.start : self.stop]

    def holds(self, low: int, high: int) -> bool:
        """Whether the addresses lie within the array."""
        first = self.address + self.start
        return first <= low and high <= first + self.stop - self.start

    def poison(self, value: int) -> None:
        """Fill what lies around the array."""
        pages = self._pages()
        pages[: self.start] = value
        pages[self.stop :] = value

    def spoilt(self, value: int) -> str:
        """What was written around the array, or nothing."""
        pages = self._pages()
        before, after = pages[: self.start] != value, pages[self.stop :] != value
        if before.any():
            return f"wrote {self.start - int(before.argmax())} bytes ahead of the {self.label}"
        if after.any():
            return f"wrote {int(after.argmax())} bytes past the end of the {self.label}"
        return ""

    def twin(self) -> Region:
        """A copy that lies at the other edge."""
        edge = "end" if self.edge == "start" else "start"
        twin = Region.of(self.stop - self.start, edge, self.align, self.label)
        twin.bytes()[:] = self.bytes()
        return twin


_regions: weakref.WeakSet[Region] = weakref.WeakSet()


def regions() -> list[Region]:
    """Those of all arrays of :func:`alloc` that are alive."""
    return list(_regions)


def alloc(array: Any, edge: str = "end", align: int = 16, name: str = "array") -> np.ndarray:
    """A C-contiguous copy of ``array`` next to a page without access.

    Parameters
    ----------
    array : array_like
    edge : {"end", "start"}
        Whether the array ends or starts at the page without access. Launches in descending thread
        order see a copy at the other edge where the array is an argument of the kernel.
    align : int
        Alignment of the first byte, a power of two. An array that ends at the edge lies at most
        ``align - 1`` bytes ahead of it; those are poisoned, and checked after each launch. With the
        item size for ``align`` there are none, and the base is as misaligned as an array's may be.
    name : str
        Said in reports.
    """
    array = np.asarray(array)
    if edge not in ("end", "start"):
        raise ValueError(f"edge: expected 'end' or 'start', got {edge!r}")
    region = Region.of(array.nbytes, edge, align, f"{name} ({array.dtype} {array.shape})")
    copy = region.bytes().view(array.dtype).reshape(array.shape)
    copy[...] = array
    _regions.add(region)
    return copy


def place(address: int, known: Sequence[Region]) -> str:
    """Which array an illegal address belongs to."""
    best, text = 4 * PAGE, ""
    for region in known:
        first, last = region.address + region.start, region.address + region.stop
        for distance, side in ((first - address, "bytes ahead of"), (address - last, "bytes past the end of")):
            if 0 <= distance < best:
                best, text = distance, f" ({distance} {side} the {region.label})"
    return text
