"""A small server: requests join and leave a running batch, whose tables stay on the device from step to step.

As in LoRAX, the KV cache is handed out in slots of one token. A request's row of the block table names the slot of each
of its tokens: those of the system prompt, which the requests of one adapter share, then its own. Prompts are read in
chunks beside the single tokens of the others. The host knows how many tokens each request has, never which: a step
reads its tokens from the rows that the step before wrote.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ._llama import XpArray, forward
from ._served import ServedOps, Step

CHUNK = 32  # tokens of a prompt that a step reads
SYSTEM = "Answer in one line. "  # every prompt begins with it
PROMPTS = (
    "Which way to the station?",
    "Write a haiku about rain.",
    "Once upon a time",
    "2 + 2 =",
    "The capital of France is",
    "def fibonacci(n):",
    "Translate to German: good morning",
    "A",
    "List three prime numbers above one hundred, smallest first.",
)


@dataclass
class Request:
    """A prompt, the adapter it asks for, and what serving it produced."""

    name: str
    adapter: int  # slot, -1 = the bare model
    prompt: list[int]
    shared: int = 0  # of them, at the beginning, those that other requests have too; not all
    tokens: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)  # one row per token, float32
    started: float = 0.0
    seconds: float = 0.0


def make_requests(count: int, adapters: int, vocab_size: int) -> list[Request]:
    """Requests whose adapters go round robin, the bare model included; prompts are UTF-8 bytes as token ids."""
    requests = []
    for i in range(count):
        prompt = [byte % vocab_size for byte in (SYSTEM + PROMPTS[i % len(PROMPTS)]).encode()]
        requests.append(Request(f"r{i:02d}", i % (adapters + 1) - 1, prompt, len(SYSTEM.encode())))
    return requests


def room_for(requests: Sequence[Request], tokens: int) -> int:
    """Slots of the KV cache that the requests take if all run at once."""
    shared = {request.adapter: request.shared for request in requests}
    return sum(len(request.prompt) + tokens for request in requests) + sum(shared.values())


def host(x: XpArray) -> np.ndarray:
    """A NumPy array of what may be on a GPU; waits for it."""
    return x if isinstance(x, np.ndarray) else np.asarray(x.get())


@dataclass
class Row:
    """What the host knows of a running request."""

    request: Request
    sequence: int  # in the KV cache: its own slots
    size: int  # of its row of the block table
    cached: int  # tokens whose keys and values are in the cache

    @property
    def fresh(self) -> int:
        """Tokens of the next step."""
        return min(max(len(self.request.prompt) - self.cached, 1), CHUNK)


@dataclass
class Prefix:
    """The slots of the system prompt for one adapter; whose request fills them."""

    sequence: int
    owner: Request
    filled: bool = False


class Server:
    """The running batch: a row for each request, in arrays on the device.

    Parameters
    ----------
    ops : ServedOps
    width : int
        Most tokens of a request, prompt and answer.
    tokens : int
        Tokens of an answer.
    """

    def __init__(self, ops: ServedOps, width: int, tokens: int) -> None:
        xp = ops.xp
        self.ops, self.width, self.tokens = ops, width, tokens
        self.rows: list[Row] = []
        self.prefixes: dict[int, Prefix] = {}
        self.ids = xp.empty((0, width), np.int64)  # the tokens, prompt and answer
        self.cached, self.fresh, self.prompts, self.adapters = (xp.empty(0, np.int32) for _ in range(4))
        self.slots = xp.empty(0, np.int64)  # of the cache, row after row

    def admit(self, requests: Sequence[Request]) -> None:
        """Rows for new requests; those with a system prompt that is in the cache begin behind it."""
        xp, cache = self.ops.xp, self.ops.cache
        ids = np.zeros((len(requests), self.width), np.int64)
        slots = []
        for i, request in enumerate(requests):
            prefix = self.prefixes.get(request.adapter)
            if prefix is None:
                prefix = self.prefixes[request.adapter] = Prefix(cache.add(request.shared), request)
            mine = prefix.filled or prefix.owner is request
            shared = cache.pages_of(prefix.sequence) if mine else []
            sequence = cache.add(len(request.prompt) + self.tokens - len(shared))
            slots += [*shared, *cache.pages_of(sequence)]
            size = len(request.prompt) + self.tokens
            self.rows.append(Row(request, sequence, size, len(shared) if prefix.filled else 0))
            ids[i, : len(request.prompt)] = request.prompt
            request.started = time.perf_counter()
        new = self.rows[len(self.rows) - len(requests) :]
        self.ids = xp.concatenate([self.ids, xp.asarray(ids)])
        self.cached = self._longer(self.cached, [row.cached for row in new])
        self.fresh = self._longer(self.fresh, [row.fresh for row in new])
        self.prompts = self._longer(self.prompts, [len(row.request.prompt) for row in new])
        self.adapters = self._longer(self.adapters, [row.request.adapter for row in new])
        self.slots = self._longer(self.slots, slots)
        self._make_tables()

    def retire(self, stay: list[int]) -> None:
        """Keep these rows and give back the slots of the others."""
        from . import slots_filtering

        xp = self.ops.xp
        for i in sorted(set(range(len(self.rows))) - set(stay)):
            self.ops.cache.free(self.rows[i].sequence)
        self.rows = [self.rows[i] for i in stay]
        kept = xp.asarray(np.array(stay, np.int64))
        begins = self.cu_slots[kept]
        self.ids, self.cached, self.fresh = self.ids[kept], self.cached[kept], self.fresh[kept]
        self.prompts, self.adapters = self.prompts[kept], self.adapters[kept]
        slots, sizes = self.slots, [row.size for row in self.rows]
        self.slots = xp.empty(sum(sizes), np.int64)
        slots_filtering(max(sizes, default=0), slots, self.slots, self._cumulative(sizes, np.int64), begins)
        self._make_tables()

    def close(self) -> None:
        """Give back the system prompts' slots."""
        for prefix in self.prefixes.values():
            self.ops.cache.free(prefix.sequence)
        self.prefixes.clear()

    def step(self) -> list[Row]:
        """One step of all rows; those that it gave a token, which is the request's last then."""
        from . import copy_next_input_ids_inplace

        xp, rows = self.ops.xp, self.rows
        batch = self._decode_step() if all(row.fresh == 1 for row in rows) else self._prefill_step()
        logits = forward(self.ops, batch, xp.asarray(np.array(batch.bounds[1:]) - 1))
        accepted = logits.argmax(axis=1)  # one for each row; those inside a prompt are not copied
        counts = xp.arange(len(rows) + 1, dtype=np.int64)
        copy_next_input_ids_inplace(1, self.ids, self.cached, self.fresh, self.prompts, accepted, counts)
        self.cached += self.fresh
        self.fresh = xp.minimum(xp.maximum(self.prompts - self.cached, 1), CHUNK).astype(np.int32)
        answered = []
        for row, token, line in zip(rows, host(accepted).tolist(), host(logits), strict=True):
            row.cached += row.fresh
            prefix = self.prefixes[row.request.adapter]
            prefix.filled |= prefix.owner is row.request and row.cached >= row.request.shared
            if row.cached >= len(row.request.prompt):
                row.request.tokens.append(token)
                row.request.logits.append(line)
                answered.append(row)
        return answered

    # ---- inside
    def _decode_step(self) -> Step:
        """One token of every row, all tables in one launch."""
        from . import prepare_decode_step

        xp, n = self.ops.xp, len(self.rows)
        lengths = [row.cached + 1 for row in self.rows]
        positions, indices = xp.empty(n, np.int32), xp.empty(n, np.int64)
        indptr, kv_indptr = xp.empty(n + 1, np.int32), xp.empty(n + 1, np.int32)
        ragged = xp.empty(sum(lengths), np.int32)
        prepare_decode_step(
            block_tables=self.block_tables,
            input_lengths=self.fresh,
            cache_lengths=self.cached,
            cu_slots=self.cu_slots,
            position_ids=positions,
            slot_indices=indices,
            block_tables_ragged=ragged,
            max_current_length=max(lengths),
            cu_seqlen=indptr,
            ragged_indptr=kv_indptr,
            batch=self.ops.schedule,
            adapter_indices=self.adapters,
        )
        return self._step([1] * n, positions, indices, indptr, ragged, kv_indptr)

    def _prefill_step(self) -> Step:
        """A chunk of the prompt, or one token, of every row."""
        from . import block_tables_to_ragged, prepare_position_slot_ids

        xp = self.ops.xp
        counts, cached = [row.fresh for row in self.rows], [row.cached for row in self.rows]
        lengths = np.add(counts, cached).tolist()
        indptr, kv_indptr = self._cumulative(counts, np.int32), self._cumulative(lengths, np.int32)
        positions, indices = xp.empty(sum(counts), np.int32), xp.empty(sum(counts), np.int64)
        prepare_position_slot_ids(max(counts), self.cached, indptr, self.cu_slots, positions, indices)
        ragged = block_tables_to_ragged(
            block_tables=self.block_tables,
            input_lengths=counts,
            cache_lengths=cached,
            input_lengths_tensor=self.fresh,
            cache_lengths_tensor=self.cached,
            max_current_length=max(lengths),
        )
        self.ops.schedule.update_segments(indptr, self.adapters, num_tokens=sum(counts))
        return self._step(counts, positions, indices, indptr, ragged, kv_indptr)

    def _step(
        self,
        counts: list[int],
        positions: XpArray,
        indices: XpArray,
        indptr: XpArray,
        ragged: XpArray,
        kv_indptr: XpArray,
    ) -> Step:
        xp, addresses = self.ops.xp, self.ops.cache.page_ptrs
        row_of_token = xp.asarray(np.repeat(np.arange(len(counts)), counts))
        return Step(
            tokens=self.ids[row_of_token, positions],
            sequences=self.rows,
            bounds=np.cumsum([0, *counts]).tolist(),
            positions=positions,
            indptr=indptr,
            pages=(addresses[ragged], kv_indptr, xp.ones(len(counts), np.int32)),
            slots=addresses[self.slots[indices]],
        )

    def _make_tables(self) -> None:
        from . import block_tables_to_padded

        xp, sizes = self.ops.xp, [row.size for row in self.rows]
        self.cu_slots = self._cumulative(sizes, np.int64)
        self.block_tables = xp.empty((len(self.rows), self.width), np.int32)
        block_tables_to_padded(max(sizes, default=0), self.cu_slots, self.block_tables, self.slots)

    def _longer(self, array: XpArray, values: list[int]) -> XpArray:
        return self.ops.xp.concatenate([array, self.ops.xp.asarray(np.array(values, array.dtype))])

    def _cumulative(self, counts: list[int], dtype: Any) -> XpArray:
        return self.ops.xp.asarray(np.cumsum([0, *counts]).astype(dtype))


def serve(ops: ServedOps, requests: Sequence[Request], tokens: int, admit: int, tick: Any = None) -> float:
    """Answer all requests greedily, ``tokens`` each; up to ``admit`` new ones join per step.

    ``tick(n)`` is called after each step, with the number of tokens it gave.

    Returns
    -------
    float
        Seconds.
    """
    waiting = list(requests)
    server = Server(ops, max(len(request.prompt) for request in requests) + tokens, tokens)
    begun = time.perf_counter()
    while waiting or server.rows:
        if waiting:
            server.admit(waiting[:admit])
            del waiting[:admit]
        answered = server.step()
        now = time.perf_counter()
        for row in answered:
            row.request.seconds = now - row.request.started
        stay = [i for i, row in enumerate(server.rows) if len(row.request.tokens) < tokens]
        if len(stay) < len(server.rows):
            server.retire(stay)
        if tick is not None:
            tick(len(answered))
    server.close()
    return time.perf_counter() - begun
