"""The peers of the LoRA layer: adapters from one case's buffers to each one's own calls."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from typing import Any

import numpy as np

from .bench_lora import Layer, LayerSet, check_layer_loosely, num_slots, rank_of, scale_of, slots_of
from .model import ROOT, Case, Work

SGLANG_DENSE = "sglang.kernels.ops.lora.dense"
SGLANG_CHUNK = 16  # its server's default for --max-lora-chunk-size


def _layer_work(layer: Layer, rig: Any, work: Work, calls: list[Any]) -> Work:
    def check() -> float:
        # Each timed call has added to y: the update would drown in what is there by now.
        y = work.data[0].y
        y.view(np.uint16)[...] = rig.random(y.shape, y.dtype).view(np.uint16)
        return check_layer_loosely(layer, rig, work.data[0], calls[0])

    return Work(calls, check, capture="torch")


def _layer_of(case: Case, rig: Any, work: Work) -> tuple[Layer, Any, Any] | None:
    """Layer, torch and device; None where no token has an adapter: a peer then launches nothing."""
    if case.nbytes == 0:
        return None
    return case.params, rig.use_torch(), rig.as_torch(work.data[0].x).device


def _columns(layer: Layer) -> list[tuple[int, int]]:
    ends = np.cumsum(layer.out_features)
    return [(int(end) - width, int(end)) for end, width in zip(ends, layer.out_features, strict=True)]


def torch_loop(case: Case, rig: Any, work: Work) -> Work | None:
    """A loop over the adapters in use: two matrix products each, on views where the rows are contiguous."""
    found = _layer_of(case, rig, work)
    if found is None:
        return None
    layer, torch, device = found
    slots = slots_of(layer)
    groups: list[tuple[int, Any]] = []
    for slot in np.unique(slots[slots >= 0]):
        rows = np.flatnonzero(slots == slot)
        if rows[-1] - rows[0] + 1 == rows.size:
            groups.append((int(slot), slice(int(rows[0]), int(rows[-1]) + 1)))
        else:
            groups.append((int(slot), torch.as_tensor(rows, device=device)))

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


def _stacks(layer: Layer, data: LayerSet, rig: Any) -> tuple[list[Any], list[Any]]:
    """A ``(n, rank, in)`` and B ``(n, out, rank)`` of each slice, smaller ranks padded; B times the adapter's scale."""
    torch = rig.use_torch()
    rank = max(rank_of(layer, slot) for slot in range(num_slots(layer)))
    pad = torch.nn.functional.pad
    a_stacks, b_stacks = [], []
    for s in range(len(layer.out_features)):
        a = [rig.as_torch(parts[s]) for parts in data.a]
        b = [rig.as_torch(parts[s]) * scale_of(slot) for slot, parts in enumerate(data.b)]
        a_stacks.append(torch.stack([pad(m, (0, 0, 0, rank - m.shape[0])) for m in a]))
        b_stacks.append(torch.stack([pad(m, (0, rank - m.shape[1])) for m in b]))
    return a_stacks, b_stacks


def vllm(case: Case, rig: Any, work: Work) -> Work | None:
    """vLLM's Triton shrink and expand, its schedule prepared once (it is timed here for no engine)."""
    found = _layer_of(case, rig, work)
    if found is None:
        return None
    layer, torch, device = found
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    meta = LoRAKernelMeta.make(num_slots(layer), layer.tokens, device=device)
    meta.prepare_tensors(torch.as_tensor(np.array(slots_of(layer)), device=device))
    schedule = meta.meta_args(layer.tokens, specialize_active_lora=True)

    def call(x: Any, y: Any, a: list[Any], b: list[Any], v: Any) -> None:
        lora_shrink(x, a, v, *schedule, 1.0)
        lora_expand(v, b, y, *schedule, offset_start=0, add_inputs=True)

    calls = []
    for data in work.data:
        a, b = ([stack.unsqueeze(1) for stack in stacks] for stacks in _stacks(layer, data, rig))
        v = torch.empty((len(a), layer.tokens, a[0].shape[2]), dtype=torch.float32, device=device)
        calls.append(functools.partial(call, rig.as_torch(data.x), rig.as_torch(data.y), a, b, v))
    return _layer_work(layer, rig, work, calls)


@dataclasses.dataclass
class _Pool:
    """SGLang's tables of adapters, the last of them without weights: that of the tokens without an adapter."""

    ranks: Any
    scalings: Any
    offsets: tuple[int, ...]


def _sglang_pool(layer: Layer, torch: Any, device: Any) -> _Pool:
    slots = range(num_slots(layer))
    ranks = torch.tensor([*(rank_of(layer, slot) for slot in slots), 0], dtype=torch.int32, device=device)
    scalings = torch.tensor([*(scale_of(slot) for slot in slots), 0.0], dtype=torch.float32, device=device)
    return _Pool(ranks, scalings, tuple(int(end) for end in np.cumsum((0, *layer.out_features))))


def _sglang_weights(layer: Layer, data: LayerSet, rig: Any) -> tuple[Any, Any]:
    """A ``(n, slices * rank, in)``, an adapter's slices packed at its own rank, and B ``(n, out, rank)``."""
    torch = rig.torch
    slots, slices = num_slots(layer), len(layer.out_features)
    rank = max(rank_of(layer, slot) for slot in range(slots))
    like = rig.as_torch(data.a[0][0])
    a = like.new_zeros((slots + 1, slices * rank, layer.in_features))
    b = like.new_zeros((slots + 1, layer.out_total, rank))
    for slot in range(slots):
        packed = torch.cat([rig.as_torch(part) for part in data.a[slot]])
        a[slot, : packed.shape[0]] = packed
        b[slot, :, : rank_of(layer, slot)] = torch.cat([rig.as_torch(part) for part in data.b[slot]])
    return a, b


def sglang_chunked(case: Case, rig: Any, work: Work) -> Work | None:
    """SGLang's chunked segment kernels, rows sorted by adapter, its batch description prepared once."""
    found = _layer_of(case, rig, work)
    if found is None:
        return None
    layer, torch, device = found
    expand = importlib.import_module(f"{SGLANG_DENSE}.chunked_sgmv_expand").chunked_sgmv_lora_expand_forward
    shrink = importlib.import_module(f"{SGLANG_DENSE}.chunked_sgmv_shrink").chunked_sgmv_lora_shrink_forward
    from sglang.srt.lora.utils import LoRABatchInfo

    pool = _sglang_pool(layer, torch, device)
    slots = np.where(slots_of(layer) < 0, num_slots(layer), slots_of(layer))
    bounds, owners = [0], []
    for slot, count in zip(*np.unique(slots, return_counts=True), strict=True):
        end = bounds[-1] + int(count)
        while bounds[-1] < end:
            bounds.append(min(bounds[-1] + SGLANG_CHUNK, end))
            owners.append(int(slot))

    def ints(values: Any) -> Any:
        return torch.as_tensor(np.asarray(values), dtype=torch.int32, device=device)

    info = LoRABatchInfo(
        use_cuda_graph=False,
        bs=layer.tokens,
        num_segments=len(owners),
        seg_indptr=ints(bounds),
        weight_indices=ints(owners),
        lora_ranks=pool.ranks,
        scalings=pool.scalings,
        max_len=SGLANG_CHUNK,
        seg_lens=None,
        permutation=ints(np.argsort(slots, kind="stable")),
    )
    slices, widest = len(layer.out_features), max(layer.out_features)
    offsets, on_host = ints(pool.offsets), torch.tensor(pool.offsets, dtype=torch.int32)

    def call(x: Any, y: Any, a: Any, b: Any) -> None:
        expand(shrink(x, a, info, slices), b, info, offsets, widest, y, on_host)

    calls = [
        functools.partial(call, rig.as_torch(data.x), rig.as_torch(data.y), *_sglang_weights(layer, data, rig))
        for data in work.data
    ]
    return _layer_work(layer, rig, work, calls)


def sglang_v2(case: Case, rig: Any, work: Work) -> Work | None:
    """SGLang's planned kernels; the first call sorts the tokens, the others find them sorted, as a model's layers do.

    Its plans may run the shrink beside the base projection; there is none here, so the two steps follow each other.
    """
    found = _layer_of(case, rig, work)
    if found is None:
        return None
    layer, torch, device = found
    from sglang.srt.lora.dense.plan import DenseLoraKind
    from sglang.srt.lora.dense.runner import DenseLoraRunner
    from sglang.srt.lora.utils import Phase
    from sglang.srt.lora.workspace import LoraWorkspace

    pool = _sglang_pool(layer, torch, device)
    runner = DenseLoraRunner(LoraWorkspace(), max_loras=num_slots(layer) + 1, device=device)
    runner.begin_batch(
        token_slots=torch.as_tensor(np.array(slots_of(layer)), dtype=torch.int32, device=device),
        lora_ranks=pool.ranks,
        scalings=pool.scalings,
        num_tokens=layer.tokens,
        phase=Phase.PREFILL if "seq" in layer.pattern else Phase.DECODE,
        graph_mode=True,
    )
    rank = max(rank_of(layer, slot) for slot in range(num_slots(layer)))
    plan = runner.plan_for(DenseLoraKind.LINEAR, rank, layer.in_features, layer.out_total, num_tokens=layer.tokens)
    slices = len(layer.out_features)

    def call(x: Any, y: Any, a: Any, b: Any) -> None:
        bridge = runner.run_a(x, a, stack=slices, plan=plan)
        runner.run_b(bridge, b, y, offsets=pool.offsets, plan=plan)

    calls = [
        functools.partial(call, rig.as_torch(data.x), rig.as_torch(data.y), *_sglang_weights(layer, data, rig))
        for data in work.data
    ]
    return _layer_work(layer, rig, work, calls)


@functools.cache  # it holds the folder of the modules that it changed
def _lorax_loader() -> Any:
    path = ROOT / "tests" / "lorax_checkout.py"
    spec = importlib.util.spec_from_file_location("lorax_checkout", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"no {path}")
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    return loader


def lorax_module(name: str) -> Any:
    """A module of the LoRAX checkout, by the loader that the tests use."""
    return _lorax_loader().load(name)


def lorax(case: Case, rig: Any, work: Work) -> Work | None:
    """LoRAX's Triton shrink and expand, a pair for each slice: by token, or by segment for sequences."""
    found = _layer_of(case, rig, work)
    if found is None:
        return None
    layer, torch, device = found
    kind = "sgmv" if "seq" in layer.pattern else "bgmv"
    names = (f"{kind}_shrink", f"{kind}_expand", f"{kind}_expand_slice")
    shrink, expand, expand_slice = (getattr(lorax_module(f"utils.ops.{name}"), name) for name in names)
    slots = slots_of(layer)
    if kind == "bgmv":
        rows: tuple[Any, ...] = (torch.as_tensor(slots.astype(np.int64), device=device),)
    else:
        length = int(layer.pattern.rpartition(" ")[2])
        starts = np.arange(0, layer.tokens, length)
        lengths = np.minimum(length, layer.tokens - starts)
        arrays = (starts, lengths, slots[starts].astype(np.int64))
        rows = (*(torch.as_tensor(array, device=device) for array in arrays), starts.size, int(lengths.max()))

    def call(x: Any, y: Any, a: list[Any], b: list[Any], v: Any) -> None:
        for s, (start, stop) in enumerate(_columns(layer)):
            v.zero_()  # its split sums are added with atomics
            shrink(x, a[s], v, *rows, 1.0)
            if len(a) == 1:
                expand(v, b[s], y, *rows, True)
            else:
                expand_slice(v, b[s], y, *rows, start, stop - start, True)

    calls = []
    for data in work.data:
        a, b = _stacks(layer, data, rig)
        v = torch.empty((layer.tokens, a[0].shape[1]), dtype=torch.float32, device=device)
        calls.append(functools.partial(call, rig.as_torch(data.x), rig.as_torch(data.y), a, b, v))
    return _layer_work(layer, rig, work, calls)
