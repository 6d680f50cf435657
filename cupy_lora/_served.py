"""The demo's model on the library's ops: one batch, base weights in common, every row's own adapter on top."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._llama import GROUPS, Batch, Llama, Ops, XpArray
from .peft import PeftAdapter


@dataclass(kw_only=True)
class Step(Batch):
    """A batch with what the tables say of it: where its keys and values go, and where those are that it attends to."""

    positions: XpArray  # (n,) of each token in its sequence
    indptr: XpArray  # (sequences + 1,) int32: ``bounds`` on the device
    pages: tuple[XpArray, XpArray, XpArray]  # kv_ptrs, kv_indptr, last_page_offset: a page is a token
    slots: XpArray  # (n,) addresses of the slots of the new tokens

    @property
    def single(self) -> bool:
        """One token of every sequence."""
        return self.bounds[-1] == len(self.sequences)


class ServedOps(Ops):
    """The model as a server runs it, on the library's ops: base weights in common, every row's own adapter on top.

    Parameters
    ----------
    model : Llama
    dtype : numpy.dtype
        float16 or bfloat16.
    adapters : sequence of PeftAdapter
        Slot 0 and on.
    max_tokens : int
        Rows of a step, at most.
    num_slots : int
        Tokens that the KV cache holds.
    """

    def __init__(
        self, model: Llama, dtype: np.dtype[Any], adapters: Sequence[PeftAdapter], max_tokens: int, num_slots: int
    ) -> None:
        super().__init__(model, dtype)
        from . import LoraBatch, LoraWeights, PagedKvCache

        slots = max(len(adapters), 1)
        device = "cpu" if self.xp is np else None  # None: the current GPU
        config = self.config
        sizes = config.num_hidden_layers, config.num_key_value_heads, 1, config.head_dim
        self.cache = PagedKvCache(num_slots, *sizes, dtype, device=device)
        self.schedule = LoraBatch(max_tokens, max_adapters=slots, device=device)
        self.lora: list[dict[str, Any]] = []
        loaded: set[str] = set()
        for layer in range(config.num_hidden_layers):
            self.lora.append({})
            for group in GROUPS:
                width, slices = config.widths(group)
                weights = LoraWeights(width, slices, max_adapters=slots, dtype=dtype, device=device)
                names = config.module_names(layer, group)
                for slot, adapter in enumerate(adapters):
                    adapter.load_into(weights, slot, *names)
                loaded.update(names)
                self.lora[layer][group] = weights
        for adapter in adapters:
            homeless = sorted(set(adapter.modules) - loaded)
            if homeless:
                raise ValueError(f"{adapter.path}: expected adapters of modules that the model has, got {homeless[0]}")

    def positions(self, batch: Batch) -> XpArray:
        assert isinstance(batch, Step)
        return batch.positions

    def grow(self, batch: Batch) -> None:
        """Nothing: the tables of a :class:`Step` count its tokens."""

    def attend(self, q: XpArray, layer: int, batch: Batch) -> XpArray:
        from . import batch_decode, batch_prefill

        assert isinstance(batch, Step)
        if batch.single:
            return batch_decode(q, *batch.pages, *self._sizes(layer), rope=None)
        return batch_prefill(q, batch.indptr, *batch.pages, *self._sizes(layer), rope=None)

    def write_kv(self, k: XpArray, v: XpArray, layer: int, batch: Batch) -> None:
        from . import append_kv, init_kv

        assert isinstance(batch, Step)
        if batch.single:
            # The slot of each new token is known: a sequence of one page for append_kv, which need not look for it.
            n = len(batch.sequences)
            append_kv(batch.slots, self.xp.arange(n + 1, dtype=np.int32), batch.pages[2], k, v, *self._sizes(layer))
        else:
            init_kv(*batch.pages, k, v, batch.indptr, *self._sizes(layer))

    def _sizes(self, layer: int) -> tuple[int, int, int, int]:
        return self.config.num_hidden_layers, layer, self.config.num_key_value_heads, self.cache.page_size

    def rms_norm(self, x: XpArray, weight: XpArray) -> XpArray:
        from . import rms_norm

        return rms_norm(x, weight, self.config.rms_norm_eps)

    def add_rms_norm(self, x: XpArray, residual: XpArray, weight: XpArray) -> tuple[XpArray, XpArray]:
        from . import fused_add_rms_norm

        normed, total = fused_add_rms_norm(x, residual, weight, self.config.rms_norm_eps)
        return total, normed

    def linear(self, x: XpArray, layer: int, group: str) -> XpArray:
        from . import add_lora

        return add_lora(super().linear(x, layer, group), x, self.lora[layer][group], self.schedule)
