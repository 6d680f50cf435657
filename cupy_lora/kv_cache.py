"""The pages of a KV cache: who owns them, handed out and taken back, with the tables on the device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from . import _arrays, _device, _jit
from ._arrays import CPU, FLOATS, INT32, INT64, dtype_among, stream_for, view
from ._lora_checks import integer


class OutOfPagesError(RuntimeError):
    """The cache has fewer free pages than were asked for. Nothing was changed."""


class KvBatch(NamedTuple):
    """The tables of a batch, as :func:`cupy_lora.init_kv`, :func:`cupy_lora.append_kv` and attention take them."""

    kv_ptrs: Any
    kv_indptr: Any
    last_page_offset: Any


class _Sequence:
    __slots__ = ("count", "length", "pages")

    def __init__(self) -> None:
        self.pages = np.empty(4, np.int32)  # grows by doubling; the first ``count`` are its pages
        self.count = 0
        self.length = 0

    def push(self, pages: np.ndarray) -> None:
        need = self.count + pages.shape[0]
        if need > self.pages.shape[0]:
            grown = np.empty(max(need, 2 * self.pages.shape[0]), np.int32)
            grown[: self.count] = self.pages[: self.count]
            self.pages = grown
        self.pages[self.count : need] = pages
        self.count = need


class PagedKvCache:
    """Owns the pages of a KV cache; hands them out to sequences, takes them back, and keeps the tables on the device.

    A page belongs to at most one sequence. Giving out or taking back a page is O(1). All
    bookkeeping is on the host; nothing here waits for the device.

    Parameters
    ----------
    num_pages, num_layers, num_kv_heads, page_size, head_dim : int
        Sizes of the pool; ``head_dim`` is a multiple of 8.
    dtype : dtype or str
        float16, bfloat16 or float32 (``"bfloat16"`` is understood).
    device : None, "cpu" or int
        None: the current GPU where there is one, else the host.

    Attributes
    ----------
    pages : array, shape (num_pages, num_layers, 2, num_kv_heads, page_size, head_dim)
        The pool, not initialised.
    page_ptrs : array of int64, shape (num_pages,)
        Address of each page: for block tables that name pages by their index, ``kv_ptrs = page_ptrs[table]``.
    kv_ptrs, kv_indptr, last_page_offset : array
        The tables at full capacity (``num_pages``, ``num_pages + 1``, ``num_pages`` entries), at addresses that do
        not change: what a captured graph should refer to. :meth:`batch` fills their beginning.

    Raises
    ------
    TypeError, ValueError
        For a size below 1, a head_dim or dtype that the kernels do not take, or a device that is not there.

    Examples
    --------
    >>> cache = PagedKvCache(64, num_layers=2, num_kv_heads=8, page_size=16, head_dim=128, dtype="bfloat16")
    >>> one = cache.add(100)  # a prompt of 100 tokens: 7 pages
    >>> tables = cache.batch([one])  # for init_kv(*tables, k, v, ...)
    >>> cache.extend([one])  # one more token, for append_kv
    >>> cache.free(one)
    """

    def __init__(
        self,
        num_pages: int,
        num_layers: int,
        num_kv_heads: int,
        page_size: int,
        head_dim: int,
        dtype: Any,
        *,
        device: int | str | None = None,
    ) -> None:
        self.num_pages = integer("num_pages", num_pages, 1, 2**31 - 2)
        self.num_layers = integer("num_layers", num_layers, 1)
        self.num_kv_heads = integer("num_kv_heads", num_kv_heads, 1)
        self.page_size = integer("page_size", page_size, 1)
        self.head_dim = integer("head_dim", head_dim, 8)
        if self.head_dim % 8:
            raise ValueError(f"head_dim: expected a multiple of 8, got {head_dim}")
        self.dtype = dtype_among(dtype, FLOATS)
        self.device = _device.resolve(device)
        shape = (num_pages, num_layers, 2, num_kv_heads, page_size, head_dim)
        self.pages = _arrays.empty(shape, self.dtype, self.device)
        self.kv_ptrs = _arrays.empty((num_pages,), INT64, self.device)
        self.kv_indptr = _arrays.empty((num_pages + 1,), INT32, self.device)
        self.last_page_offset = _arrays.empty((num_pages,), INT32, self.device)
        self._base = view("pages", self.pages).ptr
        self._page_bytes = self.num_layers * 2 * self.num_kv_heads * page_size * head_dim * self.dtype.itemsize
        self.page_ptrs = self._addresses()
        self._free = np.arange(num_pages - 1, -1, -1, dtype=np.int32)  # a stack; page 0 goes first
        self._num_free = self.num_pages
        self._sequences: dict[int, _Sequence] = {}
        self._next = 0
        self._sent: list[np.ndarray | None] = [None, None, None]
        self._staging: list[tuple[Any, np.ndarray]] = []  # events, and the pinned memory they guard

    # ---- sequences
    @property
    def free_pages(self) -> int:
        """Pages that belong to no sequence."""
        return self._num_free

    @property
    def sequences(self) -> tuple[int, ...]:
        """The ids of the sequences in the cache, oldest first."""
        return tuple(self._sequences)

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        return self._sequence(sequence).length

    def pages_of(self, sequence: int) -> list[int]:
        """The pages of a sequence in order: indices into ``pages``."""
        held = self._sequence(sequence)
        return [int(page) for page in held.pages[: held.count]]

    def add(self, num_tokens: int = 0) -> int:
        """A new sequence with room for ``num_tokens`` tokens, which count as its length; returns its id.

        Raises
        ------
        OutOfPagesError
            If there are not enough free pages; nothing is changed then.
        """
        num_tokens = integer("num_tokens", num_tokens, 0)
        held = _Sequence()
        held.push(self._take(-(-num_tokens // self.page_size)))
        held.length = num_tokens
        sequence = self._next
        self._next += 1
        self._sequences[sequence] = held
        return sequence

    def extend(self, sequences: int | Iterable[int], num_tokens: int | Iterable[int] = 1) -> None:
        """Lengthen a sequence, or several distinct ones, by ``num_tokens`` tokens (each, or one number per sequence).

        All of them are lengthened, or none.

        Raises
        ------
        OutOfPagesError
            If there are not enough free pages for all of them; nothing is changed then.
        ValueError
            If a sequence is not in the cache or is named twice, or the numbers do not match the sequences.
        """
        held = [self._sequence(s) for s in self._ids(sequences)]
        if isinstance(num_tokens, Iterable):
            counts = [integer("num_tokens", n, 0) for n in num_tokens]
            if len(counts) != len(held):
                raise ValueError(f"num_tokens: expected {len(held)} numbers (one per sequence), got {len(counts)}")
        else:
            counts = [integer("num_tokens", num_tokens, 0)] * len(held)
        grown = list(zip(held, counts, strict=True))
        needs = [-(-(each.length + count) // self.page_size) - each.count for each, count in grown]
        pages = self._take(sum(needs))
        start = 0
        for (each, count), need in zip(grown, needs, strict=True):
            if need:
                each.push(pages[start : start + need])
                start += need
            each.length += count

    def free(self, sequence: int) -> None:
        """Take a sequence's pages back; its id is not used again.

        The pages may be handed out again at once: work that is queued on the same stream is
        ordered before their next use, work on other streams must be ordered by the caller.
        """
        held = self._sequence(sequence)
        del self._sequences[sequence]
        self._free[self._num_free : self._num_free + held.count] = held.pages[: held.count]
        self._num_free += held.count

    def batch(self, sequences: Iterable[int] | None = None) -> KvBatch:
        """Bring the device's tables up to date for these sequences, in this order (default: all, oldest first).

        Asynchronous, on CuPy's current stream, ordered there with the kernels that read the
        tables. The arrays are views of the cache's own (``kv_ptrs`` ...): the next call overwrites them.

        Returns
        -------
        KvBatch
            ``(kv_ptrs, kv_indptr, last_page_offset)``, cut to the batch.

        Raises
        ------
        ValueError
            If a sequence is not in the cache or named twice, if there are more sequences than
            pages, or while the stream is being captured into a graph.
        """
        held = [self._sequence(s) for s in (self._sequences if sequences is None else self._ids(sequences))]
        if len(held) > self.num_pages:
            raise ValueError(f"sequences: expected at most {self.num_pages} (num_pages), got {len(held)}")
        counts = np.array([each.count for each in held], np.int64)
        lengths = np.array([each.length for each in held], np.int64)
        indptr = np.zeros(len(held) + 1, np.int32)
        np.cumsum(counts, out=indptr[1:])
        offsets = (lengths - np.maximum(counts - 1, 0) * self.page_size).astype(np.int32)
        pages = np.concatenate([each.pages[: each.count] for each in held]) if held else np.empty(0, np.int32)
        pointers = self._base + pages.astype(np.int64) * self._page_bytes
        tables = (pointers, indptr, offsets)
        targets = (self.kv_ptrs, self.kv_indptr, self.last_page_offset)
        self._send(tables, targets)
        return KvBatch(*(target[: table.shape[0]] for table, target in zip(tables, targets, strict=True)))

    # ---- inside
    def _addresses(self) -> Any:
        if self.device == CPU:
            return self._base + np.arange(self.num_pages, dtype=np.int64) * self._page_bytes
        cupy = _jit._cupy()
        with cupy.cuda.Device(self.device):
            return self._base + cupy.arange(self.num_pages, dtype=np.int64) * self._page_bytes

    def _ids(self, sequences: int | Iterable[int]) -> list[int]:
        if isinstance(sequences, (int, np.integer)):
            return [int(sequences)]
        ids = [integer("sequences", s, 0) for s in sequences]
        if len(set(ids)) != len(ids):
            raise ValueError(f"sequences: expected distinct sequences, got {ids}")
        return ids

    def _sequence(self, sequence: int) -> _Sequence:
        held = self._sequences.get(sequence)
        if held is None:
            raise ValueError(f"sequence: expected one that is in the cache, got {sequence}")
        return held

    def _take(self, count: int) -> np.ndarray:
        if count > self._num_free:
            raise OutOfPagesError(f"PagedKvCache: expected at least {count} free pages, got {self._num_free}")
        self._num_free -= count
        taken: np.ndarray = self._free[self._num_free : self._num_free + count][::-1].copy()
        return taken

    def _send(self, tables: tuple[np.ndarray, ...], targets: tuple[Any, ...]) -> None:
        # Most steps change last_page_offset only: an array that is on the device already is not sent again.
        changed = [i for i, t in enumerate(tables) if not _same(t, self._sent[i])]
        if self.device == CPU:
            for i in changed:
                targets[i][: tables[i].shape[0]] = tables[i]
        elif changed:
            stream = stream_for(self.device)
            if _device.capturing(stream):
                raise ValueError("PagedKvCache.batch: expected a stream that is not being captured, got one that is")
            starts = np.cumsum([0] + [-(-tables[i].nbytes // 16) * 16 for i in changed])
            with _jit._cupy().cuda.Device(self.device):
                event, memory = self._staging_memory(int(starts[-1]))
                for i, start in zip(changed, starts.tolist(), strict=False):
                    size = tables[i].nbytes
                    memory[start : start + size] = tables[i].view(np.uint8)
                    if size:
                        targets[i].data.copy_from_host_async(memory.ctypes.data + start, size, stream)
                event.record(stream)
        for i in changed:
            self._sent[i] = tables[i]

    def _staging_memory(self, size: int) -> tuple[Any, np.ndarray]:
        """Pinned memory that no copy is reading, with the event to record behind the copies."""
        cupy = _jit._cupy()
        for event, memory in self._staging:
            if memory.shape[0] >= size and event.done:
                return event, memory
        self._staging = [(event, memory) for event, memory in self._staging if not event.done]
        room = 1 << max(12, (size - 1).bit_length())
        memory = np.frombuffer(cupy.cuda.alloc_pinned_memory(room), np.uint8, room)
        event = cupy.cuda.Event(disable_timing=True)
        self._staging.append((event, memory))
        return event, memory


def _same(table: np.ndarray, sent: np.ndarray | None) -> bool:
    return sent is not None and bool(np.array_equal(table, sent))
