"""The schedule of a batch: which adapter each row uses, arranged into tiles of rows on the device."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from . import _ahead, _arrays, _device, _env, _jit
from ._arrays import CPU, INT32, INT64, Array, is_torch, same_device, stream_of, view
from ._lora_checks import debug_slots, host_copy, indices, integer
from ._plans import Plans
from .reference.lora import segment_slots

_FEW_TOKENS: Final = 256
_MOST_SHARED: Final = 99 * 1024  # bytes of a block on the smallest of the GPUs that are served
TILE_HEADER: Final = 8  # int32 words before the row numbers: slot, rows in the tile, spare
NUM_COUNTERS: Final = 8
_BY_ROW: Final = ("indices",)
_BY_SEGMENT: Final = ("slots", "indptr")


def tile_heights(max_tokens: int) -> tuple[int, ...]:
    """The tile heights that a batch of this size keeps lists for."""
    return (8, 16) if max_tokens <= _FEW_TOKENS else (8, 16, 32, 64)


def tile_capacity(max_tokens: int, max_adapters: int, height: int) -> int:
    """Most tiles of this height that ``max_tokens`` rows over ``max_adapters`` slots can need."""
    return min(max_tokens, max_tokens // height + min(max_tokens, max_adapters))


class LoraBatch:
    """Which adapter each row of the batch uses; one object serves every layer of a step.

    Construction allocates all that updates need and waits for the device once; updates
    allocate nothing, never wait, and write the same memory each time, so that a graph
    captured with this batch sees them.

    Parameters
    ----------
    max_tokens : int
        Most rows of a batch.
    max_adapters : int
        Number of slots; that of the :class:`~cupy_lora.LoraWeights`, or fewer. On a GPU at most about 4200.
    device : None, "cpu" or int
        None: the current GPU where there is one, else the host.

    Attributes
    ----------
    num_tokens : int
        Rows of the current batch.
    indices : (max_tokens,) array, int32
        Slot of each row, -1: none. Kept for the CPU path and the loop path
        (``DISABLE_SGMV=1``); where kernels run they use the tiles alone.
    tiles : dict of int to (capacity, 8 + height) array, int32
        By tile height: slot, rows in the tile, six spare words, then the row numbers;
        what is past those is not written. Built on the device.
    counters : (8,) array, int32
        Number of tiles of each height, in the order of the heights.

    Raises
    ------
    TypeError, ValueError
        For sizes that are not integers of at least 1, or a device that is not there.
    """

    def __init__(self, max_tokens: int, *, max_adapters: int, device: int | str | None = None) -> None:
        self.max_tokens = integer("max_tokens", max_tokens, 1, 2**31 - 1)
        self.max_adapters = integer("max_adapters", max_adapters, 1, 2**31 - 1)
        self.device = _device.resolve(device)
        self.num_tokens = 0
        self.tile_counts: tuple[int, ...] | None = None  # by height, where the last update came from the host
        self.has_indices = True  # False after an update that only the kernels' lists show
        self.heights = tile_heights(self.max_tokens)
        self.indices = _device.filled((self.max_tokens,), INT32, self.device, -1)
        self.counters: Any = None
        self.tiles: dict[int, Any] = {}
        self.counter_view: Array | None = None
        self._schedules: dict[int, tuple[Array, int]] = {}
        self._plans = Plans(_env.DISABLE_SGMV)
        self._staging: Any = None
        self.step_plans = Plans(_env.DISABLE_SGMV)  # of prepare_decode_step
        if self.device != CPU:
            self.prepare()
            _ahead.new_batch(self)

    def prepare(self) -> None:
        """Allocate the lists that the kernels read; of the host's memory only where kernels run (or are planned)."""
        from . import _lora_plan

        # The schedule counts every slot in shared memory: a launch that no GPU can make is refused here.
        if _lora_plan.schedule_shared_bytes(self.heights, self.max_adapters) > _MOST_SHARED:
            per_slot = 4 * (2 + len(self.heights))
            raise ValueError(
                f"max_adapters: expected at most about {_MOST_SHARED // per_slot} on a GPU, got {self.max_adapters}"
            )
        self.counters = _device.filled((NUM_COUNTERS,), INT32, self.device, 0)
        for height in self.heights:
            capacity = tile_capacity(self.max_tokens, self.max_adapters, height)
            self.tiles[height] = _arrays.empty((capacity, TILE_HEADER + height), INT32, self.device)
            self._schedules[height] = (view("tiles", self.tiles[height]), capacity)
        self.counter_view = view("counters", self.counters)
        # Host indices land here: one slot per row, or indptr and slots of the segments.
        self._staging = _arrays.empty((2 * self.max_tokens + 1,), INT64, self.device)

    def update(self, indices: Any) -> None:
        """Set the slot of each row.

        Parameters
        ----------
        indices : (num_tokens,) array, int32 or int64
            Any order; negative: no adapter. A slot of ``max_adapters`` or more counts as
            none (and is an error under ``CUPY_LORA_DEBUG=1``). In host memory or on the
            batch's device; host memory may be changed as soon as the call returns.

        Raises
        ------
        TypeError
            For a wrong type or dtype.
        ValueError
            For more rows than ``max_tokens``, or another device. The batch is unchanged then.
        """
        given, key = indices, None
        if self.device != CPU:
            kept, key, pointers, objs, on_torch = self._plans.find(_BY_ROW, (indices,))
            if kept is not None:
                self.tile_counts, self.has_indices, self.num_tokens = None, False, objs[0].shape[0]
                kept.run(pointers, objs, on_torch)
                return
            (indices,) = objs
        slots = _vector("indices", indices, self)
        count = slots.shape[0]
        if count > self.max_tokens:
            raise ValueError(f"indices: expected at most {self.max_tokens} rows (max_tokens of the batch), got {count}")
        debug_slots("indices", slots, self.max_adapters)
        if self.device == CPU:
            self._set_host(slots.numpy())
        if self._has_kernels():
            if slots.device != CPU:
                self.expect(None)
                _ahead.new_size(self, count)
                self._plans.run(key, self._plan(slots, None), (slots,), on_torch)
            else:
                on_torch = is_torch(given)
                self.expect(slots.numpy())
                self._run(on_torch, *self._staged(on_torch, slots))
        elif self.device != CPU:
            self._set_by_loop(host_copy(slots))
        self.num_tokens = count

    def begin_update(self, slots: Array) -> _jit.Launch | None:
        """What :meth:`update` does, but for its launch, which is the caller's to run or to take over.

        Parameters
        ----------
        slots : Array
            A vector of int32 or int64 on the batch's own device.

        Returns
        -------
        Launch or None
            None where no kernel is needed.
        """
        count = slots.shape[0]
        if count > self.max_tokens:
            raise ValueError(f"indices: expected at most {self.max_tokens} rows (max_tokens of the batch), got {count}")
        same_device(batch=view("batch", self.indices), indices=slots)
        debug_slots("indices", slots, self.max_adapters)
        if self.device == CPU:
            self._set_host(slots.numpy())
        launch = None
        if self._has_kernels():
            self.expect(slots.numpy() if self.device == CPU else None)
            launch = self._plan(slots, None)
        elif self.device != CPU:
            self._set_by_loop(host_copy(slots))
        self.num_tokens = count
        return launch

    def note_update(self, slots: Any) -> None:
        """:meth:`begin_update` of a vector like an earlier one, whose launch the caller has kept."""
        if self.device == CPU:
            self.begin_update(slots)
        else:
            self.tile_counts, self.has_indices, self.num_tokens = None, False, slots.shape[0]

    def update_segments(self, indptr: Any, slots: Any, *, num_tokens: int | None = None) -> None:
        """Set the slots by segments of consecutive rows.

        Parameters
        ----------
        indptr : (num_segments + 1,) array, int32 or int64
            Segment i is the rows ``indptr[i] : indptr[i + 1]``; rows before
            ``indptr[0]`` have no adapter. In host memory it is checked.
        slots : (num_segments,) array, int32 or int64
            As ``indices`` of :meth:`update`; on the same side (host or device) as ``indptr``.
        num_tokens : int, optional
            Rows of the batch, at least ``indptr[-1]``, which is the default. Needed where
            ``indptr`` is on a device, as the host does not read it there; what lies
            beyond it is cut off.

        Raises
        ------
        TypeError
            For a wrong type or dtype.
        ValueError
            For lengths that disagree, more rows or segments than ``max_tokens``, a host
            ``indptr`` that decreases or starts below 0, or another device. The batch is unchanged then.
        """
        starts = _vector("indptr", indptr, self)
        owners = _vector("slots", slots, self)
        same_device(indptr=starts, slots=owners)
        count = owners.shape[0]
        if starts.shape[0] != count + 1:
            raise ValueError(f"indptr: expected one entry more than slots ({count + 1}), got {starts.shape[0]}")
        if count > self.max_tokens:
            raise ValueError(f"slots: expected at most {self.max_tokens} segments (max_tokens), got {count}")
        if num_tokens is not None:
            num_tokens = integer("num_tokens", num_tokens, 0, self.max_tokens)
        elif starts.device != CPU:
            raise ValueError("num_tokens: expected the number of rows, as indptr is on a device, got None")
        if starts.device == CPU or _env.DEBUG.on:
            num_tokens = _check_indptr(host_copy(starts), num_tokens, self.max_tokens)
        debug_slots("slots", owners, self.max_adapters)
        assert num_tokens is not None
        if self.device == CPU:
            self._set_host(_spread(starts.numpy(), owners.numpy(), num_tokens))
        if self._has_kernels():
            on_torch = is_torch(indptr) or is_torch(slots)
            on_host = starts.device == CPU
            self.tile_counts = self._count(owners.numpy(), np.diff(starts.numpy())) if on_host else None
            starts, owners = self._staged(on_torch, starts, owners)
            self.num_tokens = num_tokens  # the plan reads it
            self._run(on_torch, owners, starts)
        elif self.device != CPU:
            self._set_by_loop(_spread(host_copy(starts), host_copy(owners), num_tokens))
        self.num_tokens = num_tokens

    def schedule(self, height: int) -> tuple[Array, Array, int]:
        """The list of tiles of this height, its counter, and its capacity in tiles."""
        if height not in self._schedules:
            raise ValueError(f"config: expected tiles of {' or '.join(map(str, self.heights))} rows, got {height}")
        tiles, capacity = self._schedules[height]
        counter = self.counter_view
        assert counter is not None
        at = self.heights.index(height)
        return tiles, Array(counter.ptr + 4 * at, (1,), (1,), INT32, counter.device, counter.obj), capacity

    def tile_bound(self, height: int, tokens: int) -> int:
        """Most tiles of this height that the current batch can have, as far as the host knows.

        Exact up to rounding (which keeps the plans few) where the last update came from the host. A
        launch with fewer clusters than tiles is right all the same: graphs may be replayed with others.
        """
        bound = tile_capacity(tokens, self.max_adapters, height)
        if self.tile_counts is None:
            return bound
        return min(bound, self.tile_counts[self.heights.index(height)])

    def expect(self, slots: np.ndarray | None) -> None:
        """Note how many tiles these slots make, in host memory; None: the host does not know."""
        self.tile_counts = None if slots is None else self._count(slots, None)

    def _count(self, slots: np.ndarray, lengths: np.ndarray | None) -> tuple[int, ...]:
        """Tiles of each height (rounded up), from slots in host memory."""
        known = (slots >= 0) & (slots < self.max_adapters)
        rows = np.bincount(slots[known], None if lengths is None else lengths[known]).astype(np.int64)
        return tuple(_rounded(int((-(-rows // height)).sum())) for height in self.heights)

    def _plan(self, slots: Array, indptr: Array | None) -> _jit.Launch:
        """The launch that builds the tiles."""
        from . import _lora_plan

        if indptr is None:
            return _lora_plan.build_tiles(slots, self)
        return _lora_plan.build_segment_tiles(indptr, slots, self)

    def _run(self, on_torch: bool, slots: Array, indptr: Array | None = None) -> None:
        """Build the tiles; planned once for each layout and size."""
        arrays = (slots,) if indptr is None else (slots, indptr)
        segments = () if indptr is None else (self.num_tokens,)
        kept, key, pointers, objs, _ = self._plans.find(_BY_ROW if indptr is None else _BY_SEGMENT, arrays, *segments)
        if kept is not None:
            kept.run(pointers, objs, on_torch)
        else:
            _ahead.new_size(self, slots.shape[0] if indptr is None else self.num_tokens)
            self._plans.run(key, self._plan(slots, indptr), arrays, on_torch)

    def _has_kernels(self) -> bool:
        if _env.DISABLE_SGMV.on or (self.device == CPU and not _jit.has_host_runner()):
            return False
        if self.counters is None:
            self.prepare()
        self.has_indices = self.device == CPU
        return True

    def _set_host(self, slots: np.ndarray) -> None:
        none = (slots < 0) | (slots >= self.max_adapters)
        self.indices[: slots.shape[0]] = np.where(none, -1, slots)

    def _set_by_loop(self, slots: np.ndarray) -> None:
        none = (slots < 0) | (slots >= self.max_adapters)
        with _jit._cupy().cuda.Device(self.device):
            self.indices[: slots.shape[0]].set(np.where(none, -1, slots).astype(np.int32))
        self.has_indices = True

    def _staged(self, on_torch: bool, *arrays: Array) -> list[Array]:
        """Arrays that the kernels can read: the caller's, or copies in the staging buffer."""
        if self.device == CPU or arrays[0].device != CPU:
            return list(arrays)
        stream = stream_of(self.device, on_torch)
        if _device.capturing(stream):
            raise ValueError(
                "indices: expected an array on the device while a graph is captured, got one in host memory"
            )
        # A fresh pageable array: the driver stages it before the copy call returns, whatever memory the caller's is.
        packed = np.concatenate([array.numpy() for array in arrays]).astype(np.int64)
        if packed.size:
            target = self._staging[: packed.size]
            target.data.copy_from_host_async(packed.ctypes.data, packed.nbytes, stream)
        staged = []
        start = 0
        for array in arrays:
            stop = start + array.shape[0]
            staged.append(view("indices", self._staging[start:stop]))
            start = stop
        return staged


def _rounded(count: int) -> int:
    """Up to the next multiple of an eighth of the power of two below it."""
    step = max(1, (1 << max(count - 1, 1).bit_length()) // 16)
    return -(-count // step) * step


def _vector(name: str, obj: Any, batch: LoraBatch) -> Array:
    array = indices(name, obj)
    if array.device not in (CPU, batch.device):
        same_device(batch=view("batch", batch.indices), **{name: array})
    return array


def _check_indptr(indptr: np.ndarray, num_tokens: int | None, max_tokens: int) -> int:
    """The number of rows; ValueError for an indptr that no batch of at most ``max_tokens`` rows has."""
    if int(indptr[0]) < 0:
        raise ValueError(f"indptr: expected a first entry of at least 0, got {int(indptr[0])}")
    bad = np.flatnonzero(indptr[1:] < indptr[:-1])
    if bad.size:
        at = int(bad[0])
        raise ValueError(
            f"indptr: expected entries that do not decrease, got {int(indptr[at])} then {int(indptr[at + 1])} at {at}"
        )
    rows = int(indptr[-1])
    if rows > max_tokens:
        raise ValueError(f"indptr: expected at most {max_tokens} rows (max_tokens of the batch), got {rows}")
    if num_tokens is None:
        return rows
    if rows > num_tokens:
        raise ValueError(f"indptr: expected at most num_tokens ({num_tokens}) rows, got {rows}")
    return num_tokens


def _spread(indptr: np.ndarray, slots: np.ndarray, num_rows: int) -> np.ndarray:
    return segment_slots(indptr[:-1], np.diff(indptr), slots, num_rows)[0]
