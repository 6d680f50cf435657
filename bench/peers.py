"""The peers that are timed against this library on the same buffers, each only if its package is installed.

Every peer is checked first (more loosely than this library: most round between their two steps), and only its calls
are timed: what it prepares once per batch or per adapter is made outside.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from .bench_attention import Attention, AttentionSet, check_attention
from .bench_lora import Layer, LayerSet, check_layer_loosely, num_slots, rank_of, scale_of, slots_of
from .bench_norm import EPSILON, Norm, check_norm
from .bench_paged_kv import Append, check_pages
from .harness import BFLOAT16
from .model import Case, Work

Builder = Callable[[Case, Any, Work], "Work | None"]  # None: the peer cannot do this case

PACKAGES = {"torch": "torch", "vllm": "vllm", "sglang": "sglang", "flashinfer": "flashinfer", "liger": "liger_kernel"}


def available() -> dict[str, bool]:
    """Whether each peer's package is installed; nothing is imported."""
    return {name: importlib.util.find_spec(package) is not None for name, package in PACKAGES.items()}


def chosen(stem: str, wanted: str) -> dict[str, Builder]:
    """The peers of a module (``bench_lora``) to time, by engine name.

    ``wanted``: ``auto`` (all that are installed), ``none``, or a comma-separated list of packages; one that was
    named but is not installed is an error.

    Raises
    ------
    ValueError
        If a named peer is unknown or not installed.
    """
    if wanted == "none":
        return {}
    installed = available()
    if wanted == "auto":
        packages = {name for name, there in installed.items() if there}
    else:
        packages = set(filter(None, wanted.split(",")))
        for name in sorted(packages):
            if not installed.get(name, False):
                known = ", ".join(PACKAGES)
                raise ValueError(f"--peers: expected installed packages among {known}, got {name}")
    return {engine: builder for engine, (package, builder) in PEERS.get(stem, {}).items() if package in packages}


# -- LoRA


def _layer_work(layer: Layer, rig: Any, work: Work, calls: list[Any]) -> Work:
    return Work(calls, lambda: check_layer_loosely(layer, rig, work.data[0], calls[0]), capture="torch")


def _columns(layer: Layer) -> list[tuple[int, int]]:
    ends = np.cumsum(layer.out_features)
    return [(int(end) - width, int(end)) for end, width in zip(ends, layer.out_features, strict=True)]


def _torch_loop(case: Case, rig: Any, work: Work) -> Work | None:
    """A loop over the adapters in use: two matrix products each, on views where the rows are contiguous."""
    if case.nbytes == 0:
        return None
    layer: Layer = case.params
    torch = rig.use_torch()
    slots = slots_of(layer)
    groups: list[tuple[int, Any]] = []
    for slot in np.unique(slots[slots >= 0]):
        rows = np.flatnonzero(slots == slot)
        if rows[-1] - rows[0] + 1 == rows.size:
            groups.append((int(slot), slice(int(rows[0]), int(rows[-1]) + 1)))
        else:
            groups.append((int(slot), torch.as_tensor(rows, device="cuda")))

    def call(steps: list[tuple[Any, ...]]) -> None:
        for x, y, rows, a, b, scale in steps:
            if isinstance(rows, slice):
                y[rows].addmm_(x[rows] @ a, b, alpha=scale)
            else:
                y.index_add_(0, rows, (x[rows] @ a) @ b, alpha=scale)

    calls = []
    for data in work.data:
        x, y = rig.as_torch(data.x), rig.as_torch(data.y)
        steps = []
        for slot, rows in groups:
            for s, (start, stop) in enumerate(_columns(layer)):
                a, b = rig.as_torch(data.a[slot][s]).t(), rig.as_torch(data.b[slot][s]).t()
                steps.append((x, y[:, start:stop], rows, a, b, scale_of(slot)))
        calls.append(functools.partial(call, steps))
    return _layer_work(layer, rig, work, calls)


def _stacks(layer: Layer, data: LayerSet, rig: Any, *, scaled: bool) -> tuple[list[Any], list[Any]]:
    """A ``(n, rank, in)`` and B ``(n, out, rank)`` of each slice, smaller ranks padded; B times the adapter's scale."""
    torch = rig.use_torch()
    rank = max(rank_of(layer, slot) for slot in range(num_slots(layer)))
    pad = torch.nn.functional.pad
    a_stacks, b_stacks = [], []
    for s in range(len(layer.out_features)):
        a = [rig.as_torch(parts[s]) for parts in data.a]
        b = [rig.as_torch(parts[s]) * (scale_of(slot) if scaled else 1.0) for slot, parts in enumerate(data.b)]
        a_stacks.append(torch.stack([pad(m, (0, 0, 0, rank - m.shape[0])) for m in a]))
        b_stacks.append(torch.stack([pad(m, (0, rank - m.shape[1])) for m in b]))
    return a_stacks, b_stacks


def _vllm(case: Case, rig: Any, work: Work) -> Work | None:
    """vLLM's Triton shrink and expand, its schedule prepared once (it is timed here for no engine)."""
    layer: Layer = case.params
    torch = rig.use_torch()
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    mapping = torch.as_tensor(np.array(slots_of(layer)), device="cuda")
    meta = LoRAKernelMeta.make(num_slots(layer), layer.tokens, device="cuda")
    meta.prepare_tensors(mapping)
    more = [True] if len(inspect.signature(meta.meta_args).parameters) > 1 else []
    schedule = meta.meta_args(layer.tokens, *more)

    def call(x: Any, y: Any, a: list[Any], b: list[Any], v: Any) -> None:
        lora_shrink(x, a, v, *schedule, 1.0)
        lora_expand(v, b, y, *schedule, offset_start=0, add_inputs=True)

    calls = []
    for data in work.data:
        a, b = ([stack.unsqueeze(1) for stack in stacks] for stacks in _stacks(layer, data, rig, scaled=True))
        v = torch.empty((len(a), layer.tokens, a[0].shape[2]), dtype=torch.float32, device="cuda")
        calls.append(functools.partial(call, rig.as_torch(data.x), rig.as_torch(data.y), a, b, v))
    return _layer_work(layer, rig, work, calls)


def _sglang(case: Case, rig: Any, work: Work) -> Work | None:
    """SGLang's chunked segment kernels, rows sorted by adapter, its batch description prepared once."""
    if (slots_of(case.params) < 0).any():
        return None
    layer: Layer = case.params
    torch = rig.use_torch()
    from sglang.srt.lora.triton_ops import chunked_sgmv_lora_expand_forward, chunked_sgmv_lora_shrink_forward
    from sglang.srt.lora.utils import LoRABatchInfo

    chunk = 16 if layer.tokens <= 256 else 64
    slots = slots_of(layer)
    order = np.argsort(slots, kind="stable")
    bounds, owners = [0], []
    for slot, count in zip(*np.unique(slots, return_counts=True), strict=True):
        end = bounds[-1] + int(count)
        while bounds[-1] < end:
            bounds.append(min(bounds[-1] + chunk, end))
            owners.append(int(slot))

    def ints(values: Any) -> Any:
        return torch.as_tensor(np.asarray(values), dtype=torch.int32, device="cuda")

    known = {field.name for field in dataclasses.fields(LoRABatchInfo)}
    facts = {
        "use_cuda_graph": False,
        "bs": layer.tokens,
        "num_segments": len(owners),
        "seg_indptr": ints(bounds),
        "weight_indices": ints(owners),
        "lora_ranks": ints([rank_of(layer, slot) for slot in range(num_slots(layer))]),
        "scalings": torch.tensor([scale_of(slot) for slot in range(num_slots(layer))], device="cuda"),
        "max_len": chunk,
        "seg_lens": None,
        "permutation": ints(order),
    }
    info = LoRABatchInfo(**{key: value for key, value in facts.items() if key in known})
    slices = len(layer.out_features)
    offsets = ints([0, *np.cumsum(layer.out_features)])

    def call(x: Any, y: Any, a: Any, b: Any) -> None:
        v = chunked_sgmv_lora_shrink_forward(x, a, info, slices)
        chunked_sgmv_lora_expand_forward(v, b, info, offsets, max(layer.out_features), base_output=y)

    calls = []
    for data in work.data:
        a, b = _stacks(layer, data, rig, scaled=False)
        stacked_a, stacked_b = torch.cat(a, dim=1).contiguous(), torch.cat(b, dim=1).contiguous()
        calls.append(functools.partial(call, rig.as_torch(data.x), rig.as_torch(data.y), stacked_a, stacked_b))
    return _layer_work(layer, rig, work, calls)


# -- RMS norm


def _norm_tensors(case: Case, rig: Any, work: Work) -> list[tuple[Any, Any]] | None:
    if case.params.add:
        return None
    rig.use_torch()
    return [(rig.as_torch(data.input), rig.as_torch(data.weight)) for data in work.data]


def _norm_work(norm: Norm, rig: Any, work: Work, function: Callable[[Any, Any], Any], tensors: list[Any]) -> Work:
    """Calls of a function that returns a new tensor; the last one is kept for the check."""
    kept: list[Any] = [None]

    def call(x: Any, weight: Any) -> None:
        kept[0] = function(x, weight)

    def out() -> Any:
        return rig.xp.from_dlpack(kept[0].detach().view(rig.torch.int16)).view(BFLOAT16)

    calls = [functools.partial(call, *pair) for pair in tensors]
    return Work(calls, lambda: check_norm(norm, rig, work.data[0], calls[0], out, slack=4.0), capture="torch")


def _torch_norm(case: Case, rig: Any, work: Work) -> Work | None:
    tensors = _norm_tensors(case, rig, work)
    if tensors is None:
        return None
    torch, columns = rig.torch, case.params.columns
    function = functools.partial(torch.nn.functional.rms_norm, normalized_shape=(columns,), eps=EPSILON)
    return _norm_work(case.params, rig, work, lambda x, weight: function(x, weight=weight), tensors)


def _liger_norm(case: Case, rig: Any, work: Work) -> Work | None:
    tensors = _norm_tensors(case, rig, work)
    if tensors is None:
        return None
    from liger_kernel.transformers.functional import liger_rms_norm

    return _norm_work(case.params, rig, work, lambda x, weight: liger_rms_norm(x, weight, EPSILON), tensors)


def _flashinfer_norm(case: Case, rig: Any, work: Work) -> Work | None:
    tensors = _norm_tensors(case, rig, work)
    if tensors is None:
        return None
    import flashinfer

    outs = [rig.as_torch(data.out) for data in work.data]
    calls = [
        functools.partial(flashinfer.norm.rmsnorm, x, weight, EPSILON, out=out)
        for (x, weight), out in zip(tensors, outs, strict=True)
    ]
    data = work.data[0]
    check = functools.partial(check_norm, case.params, rig, data, calls[0], lambda: data.out, slack=4.0)
    return Work(calls, check, capture="torch")


# -- paged KV


def _flashinfer_append(case: Case, rig: Any, work: Work) -> Work | None:
    append: Append = case.params
    torch = rig.use_torch()
    import flashinfer

    ids = torch.arange(append.tokens, device="cuda", dtype=torch.int32)
    batch_of, within = ids // append.chunk, ids % append.chunk
    positions = append.context - append.chunk + within
    calls = []
    for data in work.data:
        data.pool.view(np.uint16).fill(0)
        cache = rig.as_torch(data.pool)[:, 0]
        order = torch.as_tensor(data.order.astype(np.int32), device="cuda")
        _, indptr, last = (rig.as_torch(array) for array in data.arrays)
        tokens = (rig.as_torch(data.k), rig.as_torch(data.v), batch_of, positions)
        pages = (cache, order, indptr, last)
        calls.append(functools.partial(flashinfer.append_paged_kv_cache, *tokens, *pages, kv_layout="HND"))
    return Work(calls, lambda: check_pages(append, rig, work.data[0], calls[0]), capture="torch")


# -- attention


def _flashinfer_plans(case: Case, rig: Any, work: Work, make: Callable[[Any], Any]) -> Work:
    """One planned wrapper a set (``make`` of the workspace); its plan, which waits for the device, is made outside."""
    attention: Attention = case.params
    torch = rig.use_torch()
    space = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    mode = "ROPE_LLAMA" if attention.rope else "NONE"
    heads = (attention.heads * attention.group, attention.heads, attention.head_dim, attention.page)
    types = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16, "pos_encoding_mode": mode}
    calls = []
    for data in work.data:
        order = torch.as_tensor(data.order.astype(np.int32), device="cuda")
        _, indptr, last = (rig.as_torch(array) for array in data.tables)
        wrapper = make(space)
        if attention.new:
            wrapper.plan(rig.as_torch(data.indptr), indptr, order, last, *heads, causal=True, **types)
        else:
            wrapper.plan(indptr, order, last, *heads, **types)
        cache = rig.as_torch(data.pool)[:, 0]
        calls.append(functools.partial(wrapper.run, rig.as_torch(data.q), cache, out=rig.as_torch(data.out)))
    return Work(
        calls, lambda: check_attention(attention, rig, work.data[0], calls[0], slack=4.0), capture="torch", data=space
    )


def _flashinfer_decode(case: Case, rig: Any, work: Work) -> Work | None:
    if case.params.new:
        return None
    import flashinfer

    make = functools.partial(
        flashinfer.BatchDecodeWithPagedKVCacheWrapper, kv_layout="HND", use_tensor_cores=case.params.group >= 4
    )
    return _flashinfer_plans(case, rig, work, make)


def _flashinfer_prefill(backend: str, case: Case, rig: Any, work: Work) -> Work | None:
    if not case.params.new or (backend == "fa3" and case.params.rope):
        return None
    import flashinfer

    make = functools.partial(flashinfer.BatchPrefillWithPagedKVCacheWrapper, kv_layout="HND", backend=backend)
    return _flashinfer_plans(case, rig, work, make)


def _torch_sdpa(case: Case, rig: Any, work: Work) -> Work | None:
    """torch's attention of whole prompts on contiguous keys and values, gathered outside."""
    attention: Attention = case.params
    if attention.rope or attention.new != max(attention.lengths) or attention.new % attention.page:
        return None
    torch = rig.use_torch()
    batch = len(attention.lengths)

    def call(q: Any, k: Any, v: Any, out: Any) -> None:
        out.copy_(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))

    def of_heads(rows: Any) -> Any:
        return rows.view(batch, attention.new, -1, attention.head_dim).transpose(1, 2)

    calls = []
    for data in work.data:
        calls.append(
            functools.partial(call, *_contiguous(attention, rig, data, of_heads), of_heads(rig.as_torch(data.out)))
        )
    return Work(calls, lambda: check_attention(attention, rig, work.data[0], calls[0], slack=4.0), capture="torch")


def _contiguous(
    attention: Attention, rig: Any, data: AttentionSet, of_heads: Callable[[Any], Any]
) -> tuple[Any, Any, Any]:
    order = rig.torch.as_tensor(data.order, device="cuda")
    pages = rig.as_torch(data.pool)[order, 0]  # (pages, 2, heads, page, dim)
    batch = len(attention.lengths)
    pages = pages.view(batch, -1, 2, attention.heads, attention.page, attention.head_dim).permute(2, 0, 3, 1, 4, 5)
    k, v = pages.reshape(2, batch, attention.heads, attention.new, attention.head_dim)
    return of_heads(rig.as_torch(data.q)).contiguous(), k.contiguous(), v.contiguous()


PEERS: dict[str, dict[str, tuple[str, Builder]]] = {
    "bench_lora": {
        "torch loop": ("torch", _torch_loop),
        "vLLM": ("vllm", _vllm),
        "SGLang csgmv": ("sglang", _sglang),
    },
    "bench_norm": {
        "torch rms_norm": ("torch", _torch_norm),
        "FlashInfer": ("flashinfer", _flashinfer_norm),
        "Liger": ("liger", _liger_norm),
    },
    "bench_paged_kv": {"FlashInfer": ("flashinfer", _flashinfer_append)},
    "bench_attention": {
        "FlashInfer decode": ("flashinfer", _flashinfer_decode),
        "FlashInfer FA2": ("flashinfer", functools.partial(_flashinfer_prefill, "fa2")),
        "FlashInfer FA3": ("flashinfer", functools.partial(_flashinfer_prefill, "fa3")),
        "torch SDPA": ("torch", _torch_sdpa),
    },
}
