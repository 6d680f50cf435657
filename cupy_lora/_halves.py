"""One half of a LoRA layer over stacked weights, shrink or expand: what bgmv (by row) and sgmv (by segment) share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from . import _env, _jit, _loop
from ._arrays import CPU, Array, check_no_overlap, check_shape, same_device, stream_of, views
from ._lora_checks import (
    check_mix,
    check_rank,
    check_segments,
    debug_slots,
    host_copy,
    indices,
    integer,
    real,
    rows,
    stacked,
)
from ._plans import Kept, Plans

# inputs, weights, output, and then who owns which rows
Names = tuple[str, ...]
BY_ROW: Final[Names] = ("lora_indices_tensor",)
BY_SEGMENT: Final[Names] = ("b_seq_start_loc", "seq_len_tensor", "lora_indices_tensor")
_KINDS: Final = (BY_ROW, BY_SEGMENT)
_SHRINK: Final[dict[Names, Names]] = {of: ("inputs", "lora_a_weights", "output_tensor", *of) for of in _KINDS}
_EXPAND: Final[dict[Names, Names]] = {of: ("inputs", "lora_b_weights", "output_tensor", *of) for of in _KINDS}
_OUTPUT: Final = 2
_APART: Final[dict[Names, tuple[tuple[int, int], ...]]] = {
    of: tuple((_OUTPUT, i) for i in range(3 + len(of)) if i != _OUTPUT) for of in _KINDS
}

_plans = Plans(_env.DISABLE_SGMV)


@dataclass(frozen=True)
class Owners:
    """Which adapter each row has: an index per row, or segments of rows with an index each.

    Attributes
    ----------
    slots : Array
        Adapter of each row, or of each segment.
    starts, lengths : Array or None
        First row and number of rows of each segment.
    longest : int
        The caller's hint.
    """

    slots: Array
    starts: Array | None = None
    lengths: Array | None = None
    longest: int = 0

    @classmethod
    def of_rows(cls, count: int, slots: Array) -> Owners:
        return cls(indices("lora_indices_tensor", slots, count))

    @classmethod
    def of_segments(cls, batches: Any, max_seq_length: Any, starts: Array, lengths: Array, slots: Array) -> Owners:
        """The segment arrays, each of length ``batches``, and the checked hint."""
        count = integer("batches", batches, 0)
        hint = integer("max_seq_length", max_seq_length, 0)
        indices("lora_indices_tensor", slots)
        if slots.shape[0] != count:
            raise ValueError(f"batches: expected the length of lora_indices_tensor ({slots.shape[0]}), got {count}")
        return cls(slots, indices("b_seq_start_loc", starts, count), indices("seq_len_tensor", lengths, count), hint)

    def check_values(self, num_rows: int, count: int) -> None:
        """What the arrays hold: segments always in host memory, all of it under the debug switch on a device."""
        if self.starts is not None and self.lengths is not None and (self.slots.device == CPU or _env.DEBUG.on):
            check_segments(
                "b_seq_start_loc", host_copy(self.starts), "seq_len_tensor", host_copy(self.lengths), num_rows
            )
        debug_slots("lora_indices_tensor", self.slots, count)

    def by_row(self, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """In host memory: the slot of each row, and whether a segment covers it."""
        from .reference.lora import segment_slots

        slots = host_copy(self.slots)
        if self.starts is None or self.lengths is None:
            return slots, np.ones(slots.shape, np.bool_)
        return segment_slots(host_copy(self.starts), host_copy(self.lengths), slots, num_rows)


def shrink(owners: Names, objs: Sequence[Any], hints: tuple[Any, ...], scaling: float) -> None:
    """``output = scaling * inputs A^T``.

    Parameters
    ----------
    owners : tuple of str
        ``BY_ROW`` or ``BY_SEGMENT``.
    objs : sequence of array
        Inputs, weights, output and the arrays of the owners.
    hints : tuple
        By segment: number of segments and the longest one.
    scaling : float
    """
    names = _SHRINK[owners]
    kept, key, pointers, objs, on_torch = _plans.find(names, objs, "shrink", scaling, *hints)
    if kept is not None:
        _run_again(kept, owners, pointers, objs, on_torch, hints)
        return
    arrays = views(names, objs)
    x, a, y = arrays[:3]
    rows("inputs", x)
    stacked("lora_a_weights", a)
    rows("output_tensor", y)
    check_mix("inputs", x, "lora_a_weights", a.dtype, also_float32=False)
    check_mix("output_tensor", y, "lora_a_weights", a.dtype, also_float32=True)
    rank, width = a.shape[-2:]
    check_rank("lora_a_weights", rank)
    check_shape("inputs", x, ("num_tokens", width))
    check_shape("output_tensor", y, (x.shape[0], rank))
    scaling = real("scaling", scaling)
    owned = _checked_owners(owners, names, arrays, hints)
    if y.device == CPU and (_env.DISABLE_SGMV.on or not _jit.has_host_runner()):
        from .reference import lora

        lora.shrink_rows(np, np.float64, x.numpy(), a.numpy(), y.numpy(), *owned.by_row(x.shape[0]), scaling)
    elif _env.DISABLE_SGMV.on:
        _loop.shrink(x, a, y, *owned.by_row(x.shape[0]), scaling, stream_of(y.device, on_torch))
    elif x.shape[0] and owned.slots.shape[0]:
        from . import _lora_plan

        facts = _jit.device_facts(y.device)
        if owned.starts is None or owned.lengths is None:
            launch = _lora_plan.bgmv_shrink(x, a, y, owned.slots, scaling, facts)
        else:
            segments = owned.starts, owned.lengths, owned.slots, owned.longest
            launch = _lora_plan.sgmv_shrink(x, a, y, *segments, scaling, facts)
        _plans.run(key, launch, arrays, on_torch, _APART[owners])


def _run_again(
    kept: Kept, owners: Names, pointers: Sequence[int], objs: Sequence[Any], on_torch: bool, hints: tuple[Any, ...]
) -> None:
    """A kept launch; on the host the segments are looked at anew, as their values are not in its key."""
    if hints and kept.device == CPU:
        _owners(owners, objs, hints).check_values(objs[0].shape[0], objs[1].shape[0])
    kept.run(pointers, objs, on_torch)


def expand(
    owners: Names,
    objs: Sequence[Any],
    hints: tuple[Any, ...],
    columns: tuple[int, int] | None,
    add_inputs: bool,
) -> None:
    """``output (+)= inputs B^T``.

    Parameters
    ----------
    owners, objs, hints
        As for :func:`shrink`.
    columns : (int, int) or None
        Offset and size of the slice of the output's columns; None: the output has no others.
    add_inputs : bool
    """
    names = _EXPAND[owners]
    kept, key, pointers, objs, on_torch = _plans.find(names, objs, "expand", add_inputs, *hints, *(columns or ()))
    if kept is not None:
        _run_again(kept, owners, pointers, objs, on_torch, hints)
        return
    arrays = views(names, objs)
    x, b, y = arrays[:3]
    rows("inputs", x)
    stacked("lora_b_weights", b)
    rows("output_tensor", y)
    out, rank = b.shape[-2:]
    if columns is None:
        check_shape("output_tensor", y, ("num_tokens", out))
        offset, size = 0, out
    else:
        offset, size = integer("slice_offset", columns[0], 0), integer("slice_size", columns[1], 0)
    check_mix("inputs", x, "lora_b_weights", b.dtype, also_float32=True)
    check_mix("output_tensor", y, "lora_b_weights", b.dtype, also_float32=True)
    check_rank("lora_b_weights", rank)
    check_shape("inputs", x, ("num_tokens", rank))
    check_shape("output_tensor", y, (x.shape[0], "width"))
    if size != out:
        raise ValueError(f"slice_size: expected {out} (the rows of lora_b_weights), got {size}")
    if offset + size > y.shape[1]:
        raise ValueError(
            f"slice_offset: expected a slice within the {y.shape[1]} columns of output_tensor, "
            f"got columns {offset} to {offset + size}"
        )
    if not isinstance(add_inputs, (bool, np.bool_)):
        raise TypeError(f"add_inputs: expected a bool, got {type(add_inputs).__name__}")
    add_inputs = bool(add_inputs)
    owned = _checked_owners(owners, names, arrays, hints)
    into = slice(offset, offset + size)
    if y.device == CPU and (_env.DISABLE_SGMV.on or not _jit.has_host_runner()):
        from .reference import lora

        slots, _ = owned.by_row(x.shape[0])
        lora.expand_rows(np, np.float64, x.numpy(), b.numpy(), y.numpy(), slots, add_inputs, into)
    elif _env.DISABLE_SGMV.on:
        slots, _ = owned.by_row(x.shape[0])
        _loop.expand(x, b, y, slots, add_inputs, into, stream_of(y.device, on_torch))
    elif x.shape[0] and owned.slots.shape[0]:
        from . import _lora_plan

        facts = _jit.device_facts(y.device)
        if owned.starts is None or owned.lengths is None:
            launch = _lora_plan.bgmv_expand(x, b, y, owned.slots, offset, size, add_inputs, facts)
        else:
            segments = owned.starts, owned.lengths, owned.slots, owned.longest
            launch = _lora_plan.sgmv_expand(x, b, y, *segments, offset, size, add_inputs, facts)
        _plans.run(key, launch, arrays, on_torch, _APART[owners])


def _owners(owners: Names, arrays: Sequence[Array], hints: tuple[Any, ...]) -> Owners:
    if owners is BY_ROW:
        return Owners.of_rows(arrays[0].shape[0], *arrays[3:])
    return Owners.of_segments(*hints, *arrays[3:])


def _checked_owners(owners: Names, names: Names, arrays: Sequence[Array], hints: tuple[Any, ...]) -> Owners:
    """The owners, after the checks that look at all arrays."""
    owned = _owners(owners, arrays, hints)
    by_name = dict(zip(names, arrays, strict=True))
    output = by_name.pop("output_tensor")
    check_no_overlap("output_tensor", output, **by_name)
    same_device(**by_name, output_tensor=output)
    owned.check_values(arrays[0].shape[0], arrays[1].shape[0])
    return owned
