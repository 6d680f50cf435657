"""The small index kernels of a serving step, at batch 64 and 256, lengths to 4096."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import targets
from .bench_lora import device_of
from .harness import Rig
from .model import Case, Work

FAMILY = "metadata"
NEEDS = (
    "block_tables_to_ragged",
    "block_tables_to_padded",
    "copy_next_input_ids_inplace",
    "prepare_position_slot_ids",
    "slots_filtering",
    "prepare_decode_step",
    "LoraBatch",
)
STEPS = tuple(("prepare_decode_step", batch) for batch in (64, 256))  # no other library has such a call


@dataclass(frozen=True)
class Step:
    """One function over ``batch`` sequences of up to ``longest`` tokens."""

    function: str
    batch: int
    longest: int = 4096


def lengths(step: Step) -> np.ndarray:
    """Total tokens of each sequence, int32; the same in every run."""
    draw = np.random.default_rng(step.batch)
    return draw.integers(2, step.longest + 1, step.batch).astype(np.int32)


def step_bytes(step: Step) -> int:
    """The fewest bytes: what is copied, read and written once, plus the lengths."""
    total = int(lengths(step).sum())
    tables = 4 * step.batch
    if step.function in ("block_tables_to_ragged", "block_tables_to_padded"):
        return 8 * total + tables
    if step.function == "slots_filtering":
        return 16 * total + 2 * tables
    if step.function == "prepare_position_slot_ids prefill":
        return 12 * total + 3 * tables
    if step.function == "prepare_decode_step":
        return 8 * total + 12 * step.batch + 7 * tables
    return 12 * step.batch + 4 * tables


def _case(function: str, batch: int) -> Case:
    step = Step(function, batch)
    figure = targets.METADATA.get((function, batch))
    name = f"{function} {batch}"
    target, record = (figure.target, figure.peers) if figure else (None, ())
    return Case(FAMILY, name, step_bytes(step), step, True, target, None, record)


def cases() -> list[Case]:
    return [_case(*key) for key in (*targets.METADATA, *STEPS)]


def shrunk(case: Case) -> Case:
    small = dataclasses.replace(case.params, batch=5, longest=40)
    return dataclasses.replace(case, params=small, nbytes=step_bytes(small))


def sets_for(case: Case, rig: Rig) -> int:
    """A step's tables are 2 to 20 MB of host data to make, so the rotation stays at a few times L2."""
    return min(rig.sets_for(case.nbytes), 200)


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int32)


@dataclass
class Call:
    """One call, where its results are (None: what it returns), and what they must be."""

    run: Callable[[], Any]
    results: tuple[Any, ...] | None
    want: tuple[np.ndarray, ...]


def _ragged(step: Step, rig: Rig) -> Call:
    from cupy_lora import block_tables_to_ragged

    total = lengths(step)
    inputs = np.minimum(total, 1 + np.arange(step.batch) % 3).astype(np.int32)
    caches = (total - inputs).astype(np.int32)
    tables = np.arange(step.batch * step.longest, dtype=np.int32).reshape(step.batch, step.longest)
    arguments = {
        "block_tables": rig.array(tables),
        "input_lengths": inputs.tolist(),
        "cache_lengths": caches.tolist(),
        "input_lengths_tensor": rig.array(inputs),
        "cache_lengths_tensor": rig.array(caches),
        "max_current_length": int(total.max()),
    }
    want = np.concatenate([tables[i, :n] for i, n in enumerate(total)])
    return Call(functools.partial(block_tables_to_ragged, **arguments), None, (want,))


def _padded(step: Step, rig: Rig) -> Call:
    from cupy_lora import block_tables_to_padded

    total = lengths(step)
    starts = _offsets(total)
    ragged = np.arange(int(total.sum()), dtype=np.int32)
    tables = rig.array(np.full((step.batch, step.longest), -7, np.int32))
    want = np.full((step.batch, step.longest), -7, np.int32)
    for i, n in enumerate(total):
        want[i, :n] = ragged[starts[i] : starts[i] + n]
    arguments = (int(total.max()), rig.array(starts), tables, rig.array(ragged))
    return Call(functools.partial(block_tables_to_padded, *arguments), (tables,), (want,))


def _next_ids(step: Step, rig: Rig) -> Call:
    from cupy_lora import copy_next_input_ids_inplace

    total = lengths(step)
    inputs = np.ones(step.batch, np.int32)
    caches = np.maximum(total - 2, 0).astype(np.int32)
    prompts = np.minimum(total, caches + 1).astype(np.int32)
    accepted = np.ones(step.batch, np.int32)
    ids = np.arange(1, step.batch + 1, dtype=np.int64)
    all_ids = np.zeros((step.batch, step.longest + 2), np.int64)
    array = rig.array(all_ids)
    want = all_ids.copy()
    for i in range(step.batch):
        column = int(caches[i] + inputs[i])
        if column >= prompts[i]:
            want[i, column] = ids[i]
    rest = (rig.array(values) for values in (caches, inputs, prompts, ids, _offsets(accepted)))
    return Call(functools.partial(copy_next_input_ids_inplace, 1, array, *rest), (array,), (want,))


def _positions(step: Step, rig: Rig, *, decode: bool) -> Call:
    from cupy_lora import prepare_position_slot_ids

    total = lengths(step)
    inputs = np.ones(step.batch, np.int32) if decode else total
    caches = (total - inputs).astype(np.int32)
    starts, slot_starts = _offsets(inputs), _offsets(total)
    count = int(inputs.sum())
    positions, slots = rig.zeros((count,), np.int32), rig.zeros((count,), np.int64)
    within = np.arange(count) - np.repeat(starts[:-1], inputs)
    want_positions = (within + np.repeat(caches, inputs)).astype(np.int32)
    want_slots = want_positions.astype(np.int64) + np.repeat(slot_starts[:-1], inputs)
    arguments = (rig.array(caches), rig.array(starts), rig.array(slot_starts), positions, slots)
    run = functools.partial(prepare_position_slot_ids, int(inputs.max()), *arguments)
    return Call(run, (positions, slots), (want_positions, want_slots))


def _filtering(step: Step, rig: Rig) -> Call:
    from cupy_lora import slots_filtering

    total = lengths(step)
    gaps = 3  # entries between two sequences that are left out
    source = np.arange(int(total.sum()) + gaps * step.batch, dtype=np.int64)
    begins = (_offsets(total)[:-1] + gaps * np.arange(step.batch)).astype(np.int64)
    out = rig.zeros((int(total.sum()),), np.int64)
    want = np.concatenate([source[b : b + n] for b, n in zip(begins, total, strict=True)])
    arguments = (int(total.max()), rig.array(source), out, rig.array(_offsets(total)), rig.array(begins))
    return Call(functools.partial(slots_filtering, *arguments), (out,), (want,))


def _decode_step(step: Step, rig: Rig) -> Call:
    """One new token of every sequence, 16 adapters in turn."""
    from cupy_lora import LoraBatch, prepare_decode_step

    total = lengths(step)
    slot_starts, bounds = _offsets(total), _offsets(np.ones(step.batch, np.int32))
    tables = np.arange(step.batch * step.longest, dtype=np.int32).reshape(step.batch, step.longest)
    results = {
        "position_ids": rig.zeros((step.batch,), np.int32),
        "slot_indices": rig.zeros((step.batch,), np.int64),
        "block_tables_ragged": rig.zeros((int(total.sum()),), np.int32),
        "cu_seqlen": rig.zeros((step.batch + 1,), np.int32),
        "ragged_indptr": rig.zeros((step.batch + 1,), np.int32),
    }
    run = functools.partial(
        prepare_decode_step,
        block_tables=rig.array(tables),
        input_lengths=rig.array(np.ones(step.batch, np.int32)),
        cache_lengths=rig.array((total - 1).astype(np.int32)),
        cu_slots=rig.array(slot_starts),
        max_current_length=int(total.max()),
        batch=LoraBatch(step.batch, max_adapters=16, **device_of(rig)),
        adapter_indices=rig.array((np.arange(step.batch) % 16).astype(np.int32)),
        **results,
    )
    ragged = np.concatenate([tables[i, :n] for i, n in enumerate(total)])
    want = (total - 1, (slot_starts[:-1] + total - 1).astype(np.int64), ragged, bounds, slot_starts)
    return Call(run, tuple(results.values()), want)


BUILDERS: dict[str, Callable[[Step, Rig], Call]] = {
    "block_tables_to_ragged": _ragged,
    "block_tables_to_padded": _padded,
    "copy_next_input_ids_inplace": _next_ids,
    "prepare_position_slot_ids decode": functools.partial(_positions, decode=True),
    "prepare_position_slot_ids prefill": functools.partial(_positions, decode=False),
    "slots_filtering": _filtering,
    "prepare_decode_step": _decode_step,
}


def build(case: Case, rig: Rig, sets: int) -> Work:
    step: Step = case.params
    made = [BUILDERS[step.function](step, rig) for _ in range(sets)]

    def check() -> float:
        first = made[0]
        returned = first.run()
        rig.sync()
        results = (returned,) if first.results is None else first.results
        same = [np.array_equal(rig.host(got), want) for got, want in zip(results, first.want, strict=True)]
        return 0.0 if all(same) else float("inf")

    return Work([one.run for one in made], check, data=made)
