"""batch_decode and batch_prefill in captured graphs, and beside torch and FlashInfer."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from attention_cases import (
    LAYER,
    LAYERS,
    UNMAPPED,
    Case,
    assert_right,
    build,
    call,
    exact,
)
from engines import Engine

import cupy_lora


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [None, (3, 1, 20)], ids=["decode", "prefill"])
def test_a_captured_call_follows_the_tables(gpu: Engine, queries: tuple[int, ...] | None):
    """Replays with other pages and lengths in the same arrays, on a stream that was first met under capture."""
    import cupy

    cases = [Case(lengths, queries, 2, 4, 128, 16) for lengths in ((900, 30, 600), (20, 700, 40), (400, 200, 20))]
    batches = [build(gpu, case, seed) for seed, case in enumerate(cases)]
    most = max(data.tables[0].size for data in batches)
    pointers = cupy.full(most, UNMAPPED, np.int64)
    held = dataclasses.replace(batches[0])
    held.tables = pointers, batches[0].tables[1].copy(), batches[0].tables[2].copy()
    held.q_array = batches[0].q_array.copy()
    out = cupy.zeros_like(held.q_array)
    call(batches[0])
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.get_current_stream().synchronize()
    with stream:
        stream.begin_capture()
        _, lse = call(held, out=out, return_lse=True)
        graph = stream.end_capture()
        for data in (*batches, batches[0]):
            held.tables[0][: data.tables[0].size] = data.tables[0]
            held.tables[1][:], held.tables[2][:] = data.tables[1], data.tables[2]
            held.q_array[:] = data.q_array
            graph.launch(stream)
            stream.synchronize()
            assert_right(out.get(), lse.get(), exact(data))


@pytest.mark.gpu
def test_torch_agrees(gpu: Engine):
    torch = pytest.importorskip("torch")
    case = Case((130, 77), (130, 77), 2, 4, 128, 16)
    data = build(gpu, case)
    q = torch.from_numpy(data.q.view(np.int16)).view(torch.bfloat16).cuda()
    tables = [torch.as_tensor(table, device="cuda") for table in (data.indptr, *data.tables)]
    out = cupy_lora.batch_prefill(q, *tables, LAYERS, LAYER, case.heads, case.page, out=torch.empty_like(q), rope=None)
    assert isinstance(out, torch.Tensor)
    start = 0
    for keys, values, count in zip(data.keys, data.values, case.counts, strict=True):
        k, v = (torch.from_numpy(x.astype(np.float32)).cuda().transpose(0, 1)[None] for x in (keys, values))
        rows = q[start : start + count].float().transpose(0, 1)[None]
        want = torch.nn.functional.scaled_dot_product_attention(rows, k, v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(out[start : start + count].float(), want[0].transpose(0, 1), atol=0.02, rtol=0.02)
        start += count


@pytest.mark.gpu
@pytest.mark.parametrize("rope", [None, "llama"])
@pytest.mark.parametrize("queries", [None, (130, 20)], ids=["decode", "prefill"])
def test_flashinfer_agrees(gpu: Engine, queries: tuple[int, ...] | None, rope: str | None):
    """Its HND layout is one layer's slice of the pages."""
    torch = pytest.importorskip("torch")
    flashinfer = pytest.importorskip("flashinfer")
    case = Case((130, 600), queries, 2, 4, 128, 16, rope=rope)
    data = build(gpu, case)
    out, lse = call(data, return_lse=True)
    cache = torch.as_tensor(data.pages.view(np.int16), device="cuda").view(torch.bfloat16)[:, LAYER]
    base, size = data.pages.data.ptr, data.pages[0].nbytes
    order = torch.as_tensor((data.tables[0][1:-1] - base) // size, device="cuda").int()
    indptr, last = torch.as_tensor(data.tables[1] - 1, device="cuda"), torch.as_tensor(data.tables[2], device="cuda")
    q = torch.from_numpy(data.q.view(np.int16)).view(torch.bfloat16).cuda()
    space = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    heads = (case.heads * case.group, case.heads, case.dim, case.page)
    more = {"pos_encoding_mode": "ROPE_LLAMA" if rope else "NONE", "q_data_type": torch.bfloat16}
    if queries is None:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "HND")
        wrapper.plan(indptr, order, last, *heads, **more)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(space, "HND", backend="fa2")
        starts = torch.as_tensor(data.indptr, device="cuda")
        wrapper.plan(starts, indptr, order, last, *heads, causal=True, **more)
    want, want_lse = wrapper.run(q, cache, return_lse=True)
    got = torch.as_tensor(out.view(np.int16), device="cuda").view(torch.bfloat16)
    torch.testing.assert_close(got.float(), want.float(), atol=0.03, rtol=0.03)
    got_lse = torch.as_tensor(lse, device="cuda")
    torch.testing.assert_close(got_lse, want_lse * math.log(2), atol=0.02, rtol=0.01)  # it takes logarithms to base 2
