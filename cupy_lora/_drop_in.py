"""The demo's model on :mod:`cupy_lora.punica_kernels`, called argument by argument as LoRAX calls that extension.

As there, a call is one rank of one projection: prompts by segments (shrinks below rank 16 by ``sgmv_cutlass``, the
others by ``sgmv_shrink``), decoded tokens by ``dispatch_bgmv``. A module has one rank in all layers, its scale is
folded into B, keys are stored as they are and rotated by the attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from . import _arrays
from . import punica_kernels as kernels
from ._llama import GROUPS, Batch, Llama, LlamaConfig, Ops, XpArray, forward, from_float32, to_float32
from ._server import Request, host
from .dispatch import use_cutlass_shrink
from .peft import PeftAdapter

_PAGE = 16  # tokens of a page
_TMP = 8 << 20  # bytes of the scratch that the original wants
_THETA = 10000.0  # of its rotation


class _Stack(NamedTuple):
    """One adapter's weights of a module in all layers, by the shapes that the kernels want them in."""

    a: XpArray  # (layers, rank, in)
    a_transposed: XpArray
    b: XpArray  # (layers, out, rank)
    b_transposed: XpArray


@dataclass
class _Sequence:
    """A sequence of the batch: its number in the cache and its adapter's slot."""

    number: int
    slot: int


def why_not(config: LlamaConfig) -> str:
    """What keeps a model from the drop-in module; empty where nothing does."""
    if config.rope_llama3 is not None:
        return f"its attention rotates by theta {_THETA:.0f}, this model by llama3's rule"
    if config.rope_theta != _THETA:
        return f"its attention rotates by theta {_THETA:.0f}, this model by {config.rope_theta:.0f}"
    return ""


class DropInOps(Ops):
    """The model over the nine functions of the drop-in module.

    Parameters
    ----------
    model : Llama
    dtype : numpy.dtype
        float16 or bfloat16.
    adapters : mapping of int to PeftAdapter
        By slot.
    num_tokens : sequence of int
        Of each sequence, at most: room in the KV cache.
    """

    def __init__(
        self, model: Llama, dtype: np.dtype[Any], adapters: Mapping[int, PeftAdapter], num_tokens: Sequence[int]
    ) -> None:
        from . import PagedKvCache

        super().__init__(model, dtype)
        config, device = self.config, "cpu" if self.xp is np else None
        pages = sum(-(-count // _PAGE) for count in num_tokens)
        sizes = config.num_hidden_layers, config.num_key_value_heads, _PAGE, config.head_dim
        self.cache = PagedKvCache(pages, *sizes, dtype, device=device)
        self.tmp = self.xp.empty(_TMP, np.uint8)
        self.stacks: dict[str, dict[int, dict[int, _Stack]]] = {}  # by module, rank and slot
        for group, (_, modules) in GROUPS.items():
            width, outs = config.widths(group)
            for at, (module, out) in enumerate(zip(modules, outs, strict=True)):
                self.stacks[module] = {}
                names = [config.module_names(layer, group)[at] for layer in range(config.num_hidden_layers)]
                for slot, adapter in adapters.items():
                    self._add_stack(self.stacks[module], slot, adapter, names, width, out)

    def _add_stack(
        self,
        stacks: dict[int, dict[int, _Stack]],
        slot: int,
        adapter: PeftAdapter,
        names: Sequence[str],
        width: int,
        out: int,
    ) -> None:
        present = {layer: adapter.modules[name] for layer, name in enumerate(names) if name in adapter.modules}
        if not present:
            return
        rank = max(module.rank for module in present.values())
        a, b = np.zeros((len(names), rank, width), np.float32), np.zeros((len(names), out, rank), np.float32)
        for layer, module in present.items():
            a[layer, : module.rank] = to_float32(np, module.a)
            b[layer, :, : module.rank] = np.float32(module.scale) * to_float32(np, module.b)
        forms = (a, a.transpose(0, 2, 1), b, b.transpose(0, 2, 1))
        rounded = (from_float32(self.xp, self.xp.asarray(np.ascontiguousarray(form)), self.dtype) for form in forms)
        stacks.setdefault(rank, {})[slot] = _Stack(*rounded)

    def join(self, slot: int) -> _Sequence:
        """A new sequence without tokens."""
        return _Sequence(self.cache.add(), slot)

    def begin(self, batch: Batch) -> None:
        """The tables of a step."""
        numbers, counts = [sequence.number for sequence in batch.sequences], np.diff(batch.bounds).tolist()
        self.cache.extend(numbers, counts)
        self.pages: tuple[XpArray, XpArray, XpArray] = self.cache.batch(numbers)
        self.indptr = self.xp.asarray(np.array(batch.bounds, np.int32))
        self.decoding = max(counts) == 1
        self.batch = batch

    def rms_norm(self, x: XpArray, weight: XpArray) -> XpArray:
        out = self._empty(x.shape)
        kernels.rms_norm(out, x, weight, self.config.rms_norm_eps)
        return out

    def linear(self, x: XpArray, layer: int, group: str) -> XpArray:
        y, stop = super().linear(x, layer, group), 0
        for module, out in zip(GROUPS[group][1], self.config.widths(group)[1], strict=True):
            start, stop = stop, stop + out
            for rank, stacks in self.stacks[module].items():
                if self.decoding:
                    self._add_by_row(y[:, start:stop], x, rank, stacks, layer)
                else:
                    self._add_by_segment(y[:, start:stop], x, rank, stacks, layer)
        return y

    def _add_by_row(self, y: XpArray, x: XpArray, rank: int, stacks: Mapping[int, _Stack], layer: int) -> None:
        slots = list(stacks)
        rows = [slots.index(one.slot) if one.slot in stacks else -1 for one in self.batch.sequences]
        indices = self.xp.asarray(np.array(rows, np.int64))
        v = self.store(self.xp.zeros((x.shape[0], rank), np.float32))
        kernels.dispatch_bgmv(v, x, self._pointers([each.a for each in stacks.values()]), indices, layer, 1.0)
        kernels.dispatch_bgmv(y, v, self._pointers([each.b for each in stacks.values()]), indices, layer, 1.0)

    def _add_by_segment(self, y: XpArray, x: XpArray, rank: int, stacks: Mapping[int, _Stack], layer: int) -> None:
        bounds = self.batch.bounds
        segments = [(i, stacks[one.slot]) for i, one in enumerate(self.batch.sequences) if one.slot in stacks]
        if not segments:
            return
        starts = self.xp.asarray(np.array([bounds[i] for i, _ in segments], np.int32))
        ends = self.xp.asarray(np.array([bounds[i + 1] for i, _ in segments], np.int32))
        v = self.store(self.xp.zeros((x.shape[0], rank), np.float32))
        tmp = self.xp.empty(kernels.sgmv_cutlass_tmp_size(len(segments)), np.uint8)
        if use_cutlass_shrink(rank):
            pointers = self._pointers([stack.a_transposed for _, stack in segments])
            kernels.sgmv_cutlass(v, x, pointers, starts, ends, tmp, layer)
        else:
            kernels.sgmv_shrink(v, x, self._pointers([stack.a for _, stack in segments]), starts, ends, self.tmp, layer)
        pointers = self._pointers([stack.b_transposed for _, stack in segments])
        kernels.sgmv_cutlass(y, v, pointers, starts, ends, tmp, layer)

    def rotate(self, x: XpArray) -> XpArray:
        """Nothing: attention rotates."""
        return x

    def write_kv(self, k: XpArray, v: XpArray, layer: int, batch: Batch) -> None:
        if self.decoding:
            kernels.append_kv(*self.pages, k, v, *self._sizes(layer))
        else:
            kernels.init_kv(*self.pages, k, v, self.indptr, *self._sizes(layer))

    def attend(self, q: XpArray, layer: int, batch: Batch) -> XpArray:
        out = self._empty(q.shape)
        if self.decoding:
            kernels.batch_decode(out, q, *self.pages, self.tmp, *self._sizes(layer))
        else:
            kernels.batch_prefill(out, q, self.indptr, *self.pages, self.tmp, *self._sizes(layer))
        return out

    def _sizes(self, layer: int) -> tuple[int, int, int, int]:
        return self.config.num_hidden_layers, layer, self.config.num_key_value_heads, _PAGE

    def _empty(self, shape: tuple[int, ...]) -> XpArray:
        return _arrays.empty(shape, self.dtype, self.cache.device)

    def _pointers(self, weights: Sequence[XpArray]) -> XpArray:
        return self.xp.asarray(np.array([_arrays.view("weights", each).ptr for each in weights], np.int64))


def again(
    model: Llama, dtype: np.dtype[Any], adapters: Sequence[PeftAdapter], requests: Sequence[Request]
) -> list[Request]:
    """The tokens of served requests once more: all prompts in one step, then a token of each in every step.

    Returns
    -------
    list of Request
        Copies with the logits that these steps gave.
    """
    used = {request.adapter: adapters[request.adapter] for request in requests if request.adapter >= 0}
    ops = DropInOps(model, dtype, used, [len(request.prompt) + len(request.tokens) for request in requests])
    sequences = [ops.join(request.adapter) for request in requests]
    found = [replace(request, name=f"{request.name} by punica_kernels", logits=[]) for request in requests]
    for step in range(max((len(request.tokens) for request in requests), default=0)):
        fresh = [request.tokens[step - 1 : step] if step else request.prompt for request in requests]
        bounds = np.cumsum([0, *map(len, fresh)])
        batch = Batch(ops.xp.asarray(np.concatenate(fresh)), sequences, bounds.tolist())
        logits = host(forward(ops, batch, ops.xp.asarray(bounds[1:] - 1)))
        for request, line in zip(found, logits, strict=True):
            request.logits.append(line)
    return found
