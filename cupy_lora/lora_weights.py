"""The adapters of one layer, each at its true size, behind a table of pointers that the kernels read."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from . import _ahead, _arrays, _device, _env, _jit
from ._arrays import (
    CPU,
    FLOATS,
    HALVES,
    INT64,
    Array,
    check_contiguous,
    check_shape,
    dtype_among,
    same_device,
    stream_for,
    stream_of,
    view,
)
from ._lora_checks import MAX_RANK, integer, on_device, real

# One slice of one slot, as the kernels read it; rank 0 means no adapter.
RECORD: Final = np.dtype(
    [("a", np.uint64), ("b", np.uint64), ("rank", np.int32), ("scale", np.float32), ("spare", INT64)]
)
ALIGNMENT: Final = 16  # of each matrix, in bytes: the kernels load 16 bytes at a time

_SOURCES = (*FLOATS, np.dtype(np.float64))


@dataclass(frozen=True)
class Part:
    """One slice of one loaded slot.

    Attributes
    ----------
    a : (rank, in_features) array
    b : (out_features of the slice, rank) array
    rank : int
    scale : float
        The slot's own scale (alpha / r).
    """

    a: Any
    b: Any
    rank: int
    scale: float


class LoraWeights:
    """The LoRA adapters of one layer, at most ``max_adapters`` at a time, each with its own rank.

    A layer with several outputs fused into one row (q, k, v; gate, up) has one slice per
    output, and an adapter may leave slices out. Memory is each adapter's true size.

    Construction waits for the device once, so that the object can be used on any stream.

    Parameters
    ----------
    in_features : int
        Width of x.
    out_features : int or sequence of int
        Width of y, or of each of its slices in order.
    max_adapters : int
        Number of slots.
    dtype : dtype or str
        float16 or bfloat16: of the weights, and of x.
    device : None, "cpu" or int
        None: the current GPU where there is one, else the host.

    Attributes
    ----------
    table : (max_adapters, num_slices, 4) array, int64
        Records of 32 bytes (pointer of A, pointer of B, int32 rank and float32 scale, spare).
    in_features, max_adapters, device : int
        As passed; ``device`` is -1 for the host.
    out_features : int or tuple of int
        As passed.
    slices : tuple of int
        Width of each slice; one entry where ``out_features`` is an int.
    dtype : numpy.dtype
    rank_set : frozenset of int
        The distinct ranks that are loaded now.

    Raises
    ------
    TypeError
        For a dtype other than float16 and bfloat16, or sizes that are not integers.
    ValueError
        For sizes below 1, or a device that is not there.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | Sequence[int],
        *,
        max_adapters: int,
        dtype: Any,
        device: int | str | None = None,
    ) -> None:
        self.in_features = integer("in_features", in_features, 1)
        if isinstance(out_features, (list, tuple)):
            widths = tuple(integer(f"out_features[{i}]", width, 1) for i, width in enumerate(out_features))
            if not widths:
                raise ValueError("out_features: expected at least one slice, got none")
            self.out_features: int | tuple[int, ...] = widths
        else:
            widths = (integer("out_features", out_features, 1),)
            self.out_features = widths[0]
        self.slices = widths
        self.width = sum(widths)
        self.max_adapters = integer("max_adapters", max_adapters, 1)
        self.dtype = dtype_among(dtype, HALVES)
        self.device = _device.resolve(device)
        self.table = _device.filled((self.max_adapters, len(widths), 4), INT64, self.device, 0)
        self.table_view = view("table", self.table)
        self._parts: list[tuple[Part | None, ...]] = [(None,) * len(widths)] * self.max_adapters
        self._buffers: list[Any] = [None] * self.max_adapters
        self._kept: list[tuple[Any, ...]] = [()] * self.max_adapters
        self._setter: _jit.Ready | None = None  # writes a slot's records
        self._streams: dict[int, Any] = {}
        self._retired: list[tuple[Any, list[Any]]] = []
        self.rank_set: frozenset[int] = frozenset()
        self.launches: dict[Hashable, Any] = {}  # of add_lora; they depend on rank_set
        _ahead.new_weights(self)

    # ------------------------------------------------------------------ what is loaded

    @property
    def num_slices(self) -> int:
        """Number of slices of a row of y."""
        return len(self.slices)

    @property
    def ranks(self) -> tuple[int | tuple[int, ...], ...]:
        """Rank of each slot (per slice where there are several); 0: no adapter."""
        per_slot = [tuple(0 if part is None else part.rank for part in parts) for parts in self._parts]
        return tuple(ranks[0] for ranks in per_slot) if self.num_slices == 1 else tuple(per_slot)

    @property
    def nbytes(self) -> int:
        """Bytes of the loaded adapters and of the table; memory of the caller's (``copy=False``) does not count."""
        return int(self.table.nbytes) + sum(int(buffer.nbytes) for buffer in self._buffers if buffer is not None)

    def slot(self, slot: int) -> tuple[Part | None, ...]:
        """The slices of one slot; None where it has no adapter."""
        return self._parts[slot]

    # ------------------------------------------------------------------ load and unload

    def load(
        self,
        slot: int,
        a: Any,
        b: Any,
        *,
        scale: float | Sequence[float] = 1.0,
        copy: bool = True,
    ) -> None:
        """Put an adapter into a slot, replacing what is there; graphs captured before see it.

        The work goes to the caller's stream (of torch where ``a`` or ``b`` are torch
        tensors, else CuPy's): one copy of the weights and one small kernel that updates
        the table. Work that is queued on other streams or in graph replays must be
        ordered before it by the caller, as for any write; the memory of the replaced
        adapter stays until the streams that used it have passed this point.

        Parameters
        ----------
        slot : int
            0 to ``max_adapters - 1``.
        a : array, or sequence of array or None
            ``(rank, in_features)``, one per slice. A single array for several slices is
            shared by all of them (and stored once).
        b : array, or sequence of array or None
            ``(out_features, rank)``, one per slice. A single array for several slices is
            ``(sum(out_features), rank)``.
        scale : float or sequence of float
            alpha / r (alpha / sqrt(r) for rsLoRA), one for all slices or one per slice;
            kept in float32 and applied in the kernel.
        copy : bool
            True: a and b may be on the host or on this object's device, of any float
            dtype and strides; they are converted and copied. False: the kernels read the
            caller's memory, which must have this object's dtype and device, be
            contiguous and 16-byte aligned, and is kept alive.

        Raises
        ------
        TypeError
            For a wrong type or dtype.
        ValueError
            For a slot out of range, shapes that disagree, a rank above 1024, a wrong
            device. Nothing has changed then.
        """
        slot = integer("slot", slot, 0, self.max_adapters - 1)
        pairs = self._pairs(a, b)
        scales = self._scales(scale)
        for i, pair in enumerate(pairs):
            if pair is not None:
                self._check_pair(i, *pair, copy=bool(copy))
        stream = self._stream(
            *(matrices if isinstance(matrices, (list, tuple)) else (matrices,) for matrices in (a, b))
        )
        buffer, stored = self._store(pairs, stream) if copy else (None, self._refer(pairs))
        parts = tuple(
            None if pair is None else Part(pair[0], pair[1], int(pair[0].shape[0]), scales[i])
            for i, pair in enumerate(stored)
        )
        self._update(slot, parts, buffer, stream)

    def unload(self, slot: int) -> None:
        """Make the slot "no adapter" at once (in the order of CuPy's current stream); its memory follows.

        Parameters
        ----------
        slot : int
            0 to ``max_adapters - 1``.

        Raises
        ------
        TypeError, ValueError
            For a slot that is not an integer or out of range.
        """
        slot = integer("slot", slot, 0, self.max_adapters - 1)
        self._update(slot, (None,) * self.num_slices, None, self._stream())

    def used_on(self, handle: int | None, on_torch: bool) -> None:
        """Note that work which reads the adapters was queued on the caller's current stream, of this handle."""
        if handle is not None and handle not in self._streams:
            self._streams[handle] = stream_of(self.device, on_torch)

    # ------------------------------------------------------------------ arguments

    def _pairs(self, a: Any, b: Any) -> list[tuple[Array, Array] | None]:
        count = self.num_slices
        a_parts = self._per_slice("a", a)
        b_parts = self._per_slice("b", b)
        if a_parts is None:
            a_parts = [view("a", a)] * count
        if b_parts is None:
            b_parts = self._split(view("b", b))
        pairs: list[tuple[Array, Array] | None] = []
        for i, (part_a, part_b) in enumerate(zip(a_parts, b_parts, strict=True)):
            if part_a is None and part_b is None:
                pairs.append(None)
            elif part_a is None or part_b is None:
                given, missing = ("b", "a") if part_a is None else ("a", "b")
                raise ValueError(f"{missing}[{i}]: expected an array, as {given}[{i}] is one, got None")
            else:
                pairs.append((part_a, part_b))
        return pairs

    def _per_slice(self, name: str, value: Any) -> list[Array | None] | None:
        if not isinstance(value, (list, tuple)):
            return None
        if len(value) != self.num_slices:
            raise ValueError(f"{name}: expected one array (or None) per slice ({self.num_slices}), got {len(value)}")
        return [None if part is None else view(f"{name}[{i}]", part) for i, part in enumerate(value)]

    def _split(self, b: Array) -> list[Array | None]:
        if self.num_slices == 1:
            return [b]
        check_shape("b", b, (self.width, "rank"))
        parts: list[Array | None] = []
        start = 0
        for width in self.slices:
            source = b.obj[start : start + width]
            parts.append(view("b", source))
            start += width
        return parts

    def _scales(self, scale: Any) -> list[float]:
        if not isinstance(scale, (list, tuple)):
            return [real("scale", scale)] * self.num_slices
        if len(scale) != self.num_slices:
            raise ValueError(f"scale: expected one per slice ({self.num_slices}), got {len(scale)}")
        return [real(f"scale[{i}]", one) for i, one in enumerate(scale)]

    def _check_pair(self, i: int, a: Array, b: Array, *, copy: bool) -> None:
        name_a, name_b = ("a", "b") if self.num_slices == 1 else (f"a[{i}]", f"b[{i}]")
        check_shape(name_a, a, ("rank", self.in_features))
        rank = a.shape[0]
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(f"{name_a}: expected a rank of 1 to {MAX_RANK}, got {rank}")
        check_shape(name_b, b, (self.slices[i], rank))
        for name, matrix in ((name_a, a), (name_b, b)):
            if copy:
                _arrays.check_dtype(name, matrix, _SOURCES)
                if matrix.device not in (CPU, self.device):
                    same_device(weights=self.table_view, **{name: matrix})
                continue
            _arrays.check_dtype(name, matrix, (self.dtype,))
            same_device(weights=self.table_view, **{name: matrix})
            check_contiguous(name, matrix)
            if not matrix.aligned(ALIGNMENT):
                raise ValueError(
                    f"{name}: expected memory aligned to {ALIGNMENT} bytes (copy=False), got address {matrix.ptr:#x}"
                )

    def _stream(self, *objs: Sequence[Any]) -> Any:
        """The caller's stream; ValueError while it captures: a replay would bring back pointers of freed memory."""
        stream = stream_for(self.device, *itertools.chain(*objs))
        if stream is not None and _device.capturing(stream):
            raise ValueError("stream: expected one that captures no graph (load and unload run outside), got a capture")
        return stream

    # ------------------------------------------------------------------ memory

    def _store(self, pairs: list[tuple[Array, Array] | None], stream: Any) -> tuple[Any, list[tuple[Any, Any] | None]]:
        """Copy the matrices into one new buffer; one that several slices share is stored once."""
        offsets: dict[int, int] = {}
        sources: list[tuple[Array, int]] = []
        size = 0
        for pair in pairs:
            for matrix in pair or ():
                if id(matrix) not in offsets:
                    size = -(-size // ALIGNMENT) * ALIGNMENT
                    offsets[id(matrix)] = size
                    sources.append((matrix, size))
                    size += matrix.size * self.dtype.itemsize
        if not sources:
            return None, [None] * len(pairs)
        if self.device == CPU:
            buffer = _arrays.empty((size,), np.dtype(np.uint8), CPU)
            _fill(buffer, sources, self.dtype)
        else:
            buffer = self._store_on_gpu(sources, size, stream)

        def stored(matrix: Array) -> Any:
            return _matrix(buffer, offsets[id(matrix)], matrix.shape, self.dtype)

        return buffer, [None if pair is None else (stored(pair[0]), stored(pair[1])) for pair in pairs]

    def _store_on_gpu(self, sources: list[tuple[Array, int]], size: int, stream: Any) -> Any:
        with _device.on(self.device, stream) as cupy:
            buffer = _arrays.empty((size,), np.dtype(np.uint8), self.device)
            if all(matrix.device == CPU for matrix, _ in sources):
                packed = np.zeros(size, np.uint8)
                _fill(packed, sources, self.dtype)
                buffer.set(packed, stream=stream)
                return buffer
            for matrix, offset in sources:
                target = _matrix(buffer, offset, matrix.shape, self.dtype)
                if matrix.device == CPU:
                    target.set(np.ascontiguousarray(matrix.numpy().astype(self.dtype)), stream=stream)
                else:
                    cupy.copyto(target, on_device(matrix).astype(self.dtype, copy=False))
            return buffer

    def _refer(self, pairs: list[tuple[Array, Array] | None]) -> list[tuple[Any, Any] | None]:
        if self.device == CPU:
            return [None if pair is None else (pair[0].numpy(), pair[1].numpy()) for pair in pairs]
        return [None if pair is None else (on_device(pair[0]), on_device(pair[1])) for pair in pairs]

    def _update(self, slot: int, parts: tuple[Part | None, ...], buffer: Any, stream: Any) -> None:
        records = np.array(
            [
                (0, 0, 0, 0.0, 0)
                if part is None
                else (view("a", part.a).ptr, view("b", part.b).ptr, part.rank, part.scale, 0)
                for part in parts
            ],
            RECORD,
        )
        if self.device == CPU and (_env.DISABLE_SGMV.on or not _jit.has_host_runner()):
            self.table[slot] = records.view(np.int64).reshape(self.num_slices, 4)
        elif self._setter is not None:
            self._setter((), stream.ptr, ((1, np.int32(slot)), (2, records)))
        else:
            from . import _lora_plan

            launch = _lora_plan.set_slot(self.table_view, slot, records, _jit.device_facts(self.device))
            if self.device == CPU:
                _jit.run(launch, self.device, stream)
            else:
                setter = _jit.Ready(launch, self.device)
                setter((), stream.ptr)
                self._setter = setter
        self._reap()
        if self.device != CPU and (self._buffers[slot] is not None or self._kept[slot]):
            self._retire((self._buffers[slot], self._kept[slot]), stream)
        before, after = (frozenset(p.rank for p in some if p is not None) for some in (self._parts[slot], parts))
        self._parts[slot] = parts
        rank_set = self.rank_set
        if before != after:
            rank_set = frozenset(part.rank for loaded in self._parts for part in loaded if part is not None)
        if rank_set != self.rank_set:
            self.rank_set = rank_set
            self.launches.clear()
            _ahead.new_ranks(self)
        self._buffers[slot] = buffer
        # With copy=False the parts view the caller's memory and keep it alive.
        self._kept[slot] = tuple(part for part in parts if part is not None) if buffer is None else ()

    def _retire(self, memory: Any, stream: Any) -> None:
        """Keep replaced memory until every stream that may still read it has passed this point."""
        cupy = _jit._cupy()
        events = []
        with cupy.cuda.Device(self.device):
            for user in {**self._streams, stream.ptr: stream}.values():
                # An event recorded in a capture belongs to the graph and cannot be asked; nor can the stream.
                if _device.capturing(user):
                    continue
                if user.done and user.ptr != stream.ptr:
                    del self._streams[user.ptr]
                    continue
                event = cupy.cuda.Event(disable_timing=True)
                event.record(user)
                events.append(event)
        self._retired.append((memory, events))

    def _reap(self) -> None:
        self._retired = [entry for entry in self._retired if not all(event.done for event in entry[1])]


def _matrix(buffer: Any, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    nbytes = shape[0] * shape[1] * dtype.itemsize
    return buffer[offset : offset + nbytes].view(dtype).reshape(shape)


def _fill(buffer: np.ndarray, sources: list[tuple[Array, int]], dtype: np.dtype[Any]) -> None:
    for matrix, offset in sources:
        _matrix(buffer, offset, matrix.shape, dtype)[...] = matrix.numpy().astype(dtype, copy=False)
