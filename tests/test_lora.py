"""add_lora on every engine: values, bits, streams, graphs, other libraries' arrays."""

from __future__ import annotations

import cases
import engines
import numpy as np
import pytest
import tolerance
from hypothesis import given, settings
from hypothesis import strategies as st

from cupy_lora import LoraBatch, LoraWeights, add_lora

CASES = cases.ADD_LORA + cases.ADD_LORA_LARGE


def run(engine: engines.Engine, case: cases.Case) -> np.ndarray:
    """y after add_lora, checked against the exact result; what surrounds x and y is checked too."""
    data = cases.build(case)
    weights, batch = cases.load(data, engine.device, engine.array)
    x = cases.framed(engine, data.x, case)
    y = cases.framed(engine, data.y, case)
    assert add_lora(y.view, x.view, weights, batch, scale=case.scale) is y.view
    x.check(engine, "x")
    result = y.check(engine, "y")
    cases.assert_added(result, data)
    start = 0
    for part, width in enumerate(case.outs):
        has = np.array([bool(case.rank_of(slot, part)) for slot in range(len(case.ranks))])
        valid = cases.valid(data.indices, len(case.ranks))
        bare = ~(valid & has[np.where(valid, data.indices, 0)])
        columns = slice(start, start + width)
        tolerance.assert_same_bits(result[bare, columns], data.y[bare, columns], "rows without an adapter")
        start += width
    return result


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_add_lora(engine: engines.Engine, case: cases.Case) -> None:
    if engine.small_only and not case.small:
        pytest.skip("too many multiply-adds for this engine")
    run(engine, case)


def draw_case(data: st.DataObject, largest: int) -> cases.Case:
    slots = data.draw(st.integers(1, 6), "slots")
    outs = tuple(data.draw(st.lists(st.integers(1, largest), min_size=1, max_size=3), "outs"))
    rank = st.one_of(st.sampled_from((0, 8, 16, 32, 64)), st.integers(1, 256))
    dtype = data.draw(st.sampled_from(("float16", "bfloat16")), "dtype")
    return cases.Case(
        tokens=data.draw(st.integers(0, 90), "tokens"),
        in_features=data.draw(st.one_of(st.integers(1, largest), st.sampled_from((64, 128, 2048, 4096))), "in"),
        outs=outs,
        ranks=tuple(data.draw(st.tuples(*(rank for _ in outs))) for _ in range(slots)),
        pattern=data.draw(st.sampled_from(cases.PATTERNS), "pattern"),
        dtype=dtype,
        out=data.draw(st.sampled_from((dtype, "float32")), "out"),
        pad=data.draw(st.sampled_from(((0, 0), (8, 8), (1, 0), (0, 3))), "pad"),
        scale=data.draw(st.sampled_from((1.0, -0.25, 8.0)), "scale"),
        index=data.draw(st.sampled_from(("int32", "int64")), "index"),
    )


@given(data=st.data())
def test_fuzz(data: st.DataObject) -> None:
    with engines.running("numpy") as engine:
        run(engine, draw_case(data, 150))


@pytest.mark.gpu
@settings(max_examples=60)
@given(data=st.data())
def test_fuzz_on_the_gpu(data: st.DataObject) -> None:
    with engines.running("gpu") as engine:
        run(engine, draw_case(data, 700))


# ---------------------------------------------------------------------------------------- bits

BITS = [
    cases.Case(9, 256, (128,), (16, 16, 16), "random"),
    cases.Case(9, 256, (128,), (8, 16, 32, 64), "random", "float16", "float32"),
    cases.Case(40, 128, (64, 32), (16, 8), "runs", "float16", "float16"),
]
BITS_LARGE = [
    cases.Case(64, 4096, (4096,), (16,) * 8, "random", small=False),
    cases.Case(300, 4096, (1024, 512), (64, 16, 8, 33), "random", small=False),
]


def apply(
    engine: engines.Engine, data: cases.Data, rows: np.ndarray, weights: LoraWeights, out: np.ndarray | None = None
) -> np.ndarray:
    """add_lora over these rows only, in this order, in a batch of their own."""
    batch = LoraBatch(len(rows), max_adapters=len(data.case.ranks), device=engine.device)
    batch.update(engine.array(data.indices[rows]))
    y = engine.array(data.y[rows] if out is None else out)
    add_lora(y, engine.array(data.x[rows]), weights, batch, scale=data.case.scale)
    return engine.numpy(y)


@pytest.mark.parametrize("case", BITS + BITS_LARGE, ids=lambda case: case.id)
def test_a_row_does_not_depend_on_its_batch(kernels: engines.Engine, case: cases.Case) -> None:
    """Alone, reversed, doubled and at any place of a longer batch: the same bits."""
    if kernels.small_only and not case.small:
        pytest.skip("too many multiply-adds for this engine")
    data = cases.build(case)
    weights, _ = cases.load(data, kernels.device, kernels.array)
    every = np.arange(case.tokens)
    whole = apply(kernels, data, every, weights)
    tolerance.assert_same_bits(apply(kernels, data, every, weights), whole, "the same again")
    tolerance.assert_same_bits(apply(kernels, data, every[::-1], weights), whole[::-1], "reversed")
    twice = np.concatenate([every, every])
    tolerance.assert_same_bits(apply(kernels, data, twice, weights), np.concatenate([whole, whole]), "doubled")
    for row in {0, case.tokens // 2, case.tokens - 1}:
        one = np.array([row])
        tolerance.assert_same_bits(apply(kernels, data, one, weights)[0], whole[row], f"row {row} alone")
    same_adapter = np.flatnonzero(data.indices == data.indices[0])
    tolerance.assert_same_bits(apply(kernels, data, same_adapter, weights), whole[same_adapter], "one adapter alone")


def test_rank_of_neighbours_does_not_change_the_bits(kernels: engines.Engine) -> None:
    """A slot gives the same bits whether the others have its rank, another, or nothing."""
    case = cases.Case(6, 256, (128,), (16, 16, 16), "one")
    data = cases.build(case)
    weights, _ = cases.load(data, kernels.device, kernels.array)
    alike = apply(kernels, data, np.arange(6), weights)
    other = np.random.default_rng(3)
    weights.load(
        0,
        kernels.array(cases.normal(other, (64, 256), "bfloat16")),
        kernels.array(cases.normal(other, (128, 64), "bfloat16")),
    )
    weights.unload(1)
    assert weights.ranks == (64, 0, 16)
    tolerance.assert_same_bits(apply(kernels, data, np.arange(6), weights), alike)


def test_segments_give_the_bits_of_indices(engine: engines.Engine) -> None:
    case = cases.Case(33, 128, (64,), (16, 16, 8), "runs")
    data = cases.build(case)
    weights, batch = cases.load(data, engine.device, engine.array)
    by_row = engine.array(data.y)
    add_lora(by_row, engine.array(data.x), weights, batch)
    starts, lengths, slots = cases.segments(data.indices)
    indptr = np.append(starts, case.tokens)
    assert np.array_equal(np.diff(indptr), lengths)
    batch.update_segments(engine.array(indptr), engine.array(slots), num_tokens=case.tokens)
    by_segment = engine.array(data.y)
    add_lora(by_segment, engine.array(data.x), weights, batch)
    tolerance.assert_same_bits(engine.numpy(by_segment), engine.numpy(by_row))


def test_one_batch_serves_many_layers(engine: engines.Engine) -> None:
    """The same schedule with layers of other widths, ranks and slices."""
    first = cases.build(cases.Case(12, 256, (128,), (16, 8, 32), "random"))
    second = cases.build(cases.replace(first.case, in_features=128, outs=(64, 32), ranks=(8, 8, 8)))
    _, batch = cases.load(first, engine.device, engine.array)
    for data in (first, second):
        data = cases.replace(data, indices=first.indices)
        weights, _ = cases.load(data, engine.device, engine.array)
        y = engine.array(data.y)
        add_lora(y, engine.array(data.x), weights, batch)
        cases.assert_added(engine.numpy(y), data)


def test_loop_path(engine: engines.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """DISABLE_SGMV=1: a loop of matrix products gives the same results, within rounding."""
    monkeypatch.setenv("DISABLE_SGMV", "1")
    for case in cases.ADD_LORA:
        if case.pattern == "out_of_range" or len(case.outs) > 1:
            run(engine, case)


# ---------------------------------------------------------------------------------------- GPU


def loaded(gpu: engines.Engine, case: cases.Case) -> tuple[cases.Data, LoraWeights, LoraBatch]:
    data = cases.build(case)
    return (data, *cases.load(data, gpu.device, gpu.array))


CASE = cases.Case(24, 512, (256,), (16, 16, 8, 64), "random")


@pytest.mark.gpu
def test_streams(gpu: engines.Engine) -> None:
    """Work on streams of the caller's, none of them the default one."""
    import cupy

    data, weights, batch = loaded(gpu, CASE)
    exact, magnitude = cases.exact_add(data)
    cupy.cuda.Device().synchronize()
    outputs = []
    for _ in range(4):
        with cupy.cuda.Stream(non_blocking=True) as stream:
            y, x = gpu.array(data.y), gpu.array(data.x)
            batch.update(gpu.array(data.indices))
            add_lora(y, x, weights, batch)
            stream.synchronize()
        outputs.append(gpu.numpy(y))
    for output in outputs:
        tolerance.assert_close(output, exact, magnitude, cases.terms(CASE))


@pytest.mark.gpu
@pytest.mark.parametrize("copy", [True, False])
def test_graph_replay_sees_swapped_adapters(gpu: engines.Engine, copy: bool) -> None:
    """One captured graph; between replays other adapters (of other ranks) and other indices."""
    import cupy

    data, weights, batch = loaded(gpu, CASE)
    x = gpu.array(data.x)
    y = gpu.array(data.y)
    indices = gpu.array(data.indices)
    batch.update(indices)
    add_lora(y, x, weights, batch)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        batch.update(indices)
        add_lora(y, x, weights, batch)
        graph = stream.end_capture()
    rng = np.random.default_rng(6)
    for rank in (16, 8, 64, 100, 1):
        a = cases.normal(rng, (rank, CASE.in_features), CASE.dtype, CASE.in_features**-0.5)
        b = cases.normal(rng, (CASE.outs[0], rank), CASE.dtype)
        slots = rng.integers(-1, 4, CASE.tokens).astype(data.indices.dtype)
        with stream:
            y.set(data.y, stream=stream)
            indices.set(slots, stream=stream)
            weights.load(2, gpu.array(a), gpu.array(b), scale=0.5, copy=copy)
            weights.unload(3)
            graph.launch(stream)
            stream.synchronize()
        swapped = cases.replace(
            data,
            case=cases.replace(CASE, ranks=(16, 16, rank, 0)),
            indices=slots,
            a=[*data.a[:2], [a], [None]],
            b=[*data.b[:2], [b], [None]],
            scales=[*data.scales[:2], 0.5, 1.0],
        )
        cases.assert_added(gpu.numpy(y), swapped)


@pytest.mark.gpu
def test_host_time_has_no_wait(gpu: engines.Engine) -> None:
    """Calls return while an earlier kernel still runs: nothing waits for the device."""
    import cupy

    data, weights, batch = loaded(gpu, CASE)
    x, y, indices = gpu.array(data.x), gpu.array(data.y), gpu.array(data.indices)
    a, b = gpu.array(data.a[0][0]), gpu.array(data.b[0][0])
    for _ in range(2):  # compiles, loads modules and fills the memory pool: all of these may wait
        batch.update(indices)
        batch.update(np.asarray(data.indices))
        add_lora(y, x, weights, batch)
        weights.load(1, a, b)
        weights.unload(1)
    # Gives up after some seconds, so that a call which does wait fails the test instead of hanging it.
    code = """extern "C" __global__ void spin(volatile int* flag) {
        for (long long start = clock64(); *flag == 0 && clock64() - start < 6000000000LL;) {}
    }"""
    spin = cupy.RawKernel(code, "spin", backend="nvrtc")
    flag = cupy.cuda.alloc_pinned_memory(4)
    word = np.frombuffer(flag, np.int32, 1)
    stream = cupy.cuda.Stream(non_blocking=True)
    word[0] = 1
    spin((1,), (1,), (flag.ptr,), stream=stream)
    cupy.cuda.Device().synchronize()
    word[0] = 0
    with stream:
        spin((1,), (1,), (flag.ptr,))
        # Were any of these to wait for the stream, the kernel would have given up by the time they return.
        batch.update(indices)
        batch.update(np.asarray(data.indices))
        add_lora(y, x, weights, batch)
        weights.load(1, a, b)
        weights.unload(1)
        waiting = not stream.done
        word[0] = 1
        stream.synchronize()
    assert waiting


@pytest.mark.gpu
def test_two_devices_are_refused(gpu: engines.Engine) -> None:
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one GPU only")
    data, weights, batch = loaded(gpu, CASE)
    other = engines.Gpu(1)
    with pytest.raises(ValueError, match=r"x: expected an array on the same device .*GPU 0.*, got one on GPU 1"):
        add_lora(gpu.array(data.y), other.array(data.x), weights, batch)
    weights_1, batch_1 = cases.load(data, 1, other.array)
    with pytest.raises(ValueError, match="weights: expected an array on the same device"):
        add_lora(gpu.array(data.y), gpu.array(data.x), weights_1, batch)
    # On the arrays' device, not on the current one.
    y = other.array(data.y)
    with cupy.cuda.Device(0):
        add_lora(y, other.array(data.x), weights_1, batch_1)
    cases.assert_added(other.numpy(y), data)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "out"), [("float16", "float16"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_torch(gpu: engines.Engine, dtype: str, out: str) -> None:
    """torch tensors throughout, on torch's default stream and on a side stream."""
    torch = pytest.importorskip("torch")
    case = cases.replace(CASE, dtype=dtype, out=out)
    data = cases.build(case)

    def tensor(host: np.ndarray) -> object:
        bits = torch.from_numpy(np.ascontiguousarray(host).view(f"i{host.itemsize}")).cuda()
        return bits.view(getattr(torch, host.dtype.name))

    def values(result: object) -> np.ndarray:
        bits = result.view({2: torch.int16, 4: torch.int32}[result.element_size()]).cpu().numpy()
        return bits.view(cases.DTYPES[out])

    exact, magnitude = cases.exact_add(data)
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            weights = LoraWeights(case.in_features, case.outs[0], max_adapters=4, dtype=dtype, device=0)
            for slot in range(4):
                weights.load(slot, tensor(data.a[slot][0]), tensor(data.b[slot][0]), scale=data.scales[slot])
            batch = LoraBatch(case.tokens, max_adapters=4, device=0)
            batch.update(tensor(data.indices))
            y = tensor(data.y)
            assert add_lora(y, tensor(data.x), weights, batch) is y
            stream.synchronize()
        tolerance.assert_close(values(y), exact, magnitude, cases.terms(case))


@pytest.mark.gpu
def test_torch_graph(gpu: engines.Engine) -> None:
    """torch.cuda.graph captures the calls."""
    torch = pytest.importorskip("torch")
    data, weights, batch = loaded(gpu, cases.replace(CASE, dtype="float16", out="float16"))
    x, y = torch.from_numpy(data.x).cuda(), torch.from_numpy(data.y).cuda()
    indices = torch.from_numpy(data.indices).cuda()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        batch.update(indices)
        add_lora(y, x, weights, batch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch.update(indices)
        add_lora(y, x, weights, batch)
    y.copy_(torch.from_numpy(data.y))
    graph.replay()
    torch.cuda.synchronize()
    cases.assert_added(y.cpu().numpy(), data)


@pytest.mark.gpu
def test_jax_arrays_are_read(gpu: engines.Engine) -> None:
    """x, weights and indices from JAX, by DLPack; y is CuPy's, as JAX arrays are not written to."""
    jax = pytest.importorskip("jax")
    data = cases.build(CASE)
    device = jax.devices("gpu")[0]

    def array(host: np.ndarray) -> object:
        return jax.device_put(host, device).block_until_ready()

    weights, batch = cases.load(data, gpu.device, array)
    y = gpu.array(data.y)
    add_lora(y, array(data.x), weights, batch)
    cases.assert_added(gpu.numpy(y), data)


def test_plans_are_kept_and_still_checked(kernels: engines.Engine) -> None:
    """The second call of a kind takes the kept plan: with other arrays, after other loads, and with bad ones."""
    case = cases.Case(8, 128, (128,), (16, 16), "random")
    data = cases.build(case)
    weights, batch = cases.load(data, kernels.device, kernels.array)
    x = kernels.array(data.x)
    for _ in range(2):
        y = kernels.array(data.y)
        add_lora(y, x, weights, batch)
        cases.assert_added(kernels.numpy(y), data)
    assert len(weights.launches) == 1
    before = kernels.numpy(x)
    with pytest.raises(ValueError, match="y: expected memory of its own, got memory that overlaps x"):
        add_lora(x, x, weights, batch)
    both = kernels.array(np.zeros(2 * x.size, before.dtype))
    with pytest.raises(ValueError, match="y: expected memory of its own, got memory that overlaps x"):
        add_lora(both[8 : 8 + x.size].reshape(x.shape), both[: x.size].reshape(x.shape), weights, batch)
    tolerance.assert_same_bits(kernels.numpy(x), before)
    batch.update(kernels.array(np.zeros(7, np.int32)))
    with pytest.raises(ValueError, match="y: expected the 7 rows of the batch, got 8"):
        add_lora(y, x, weights, batch)
    batch.update(kernels.array(data.indices))
    swapped = cases.build(cases.replace(case, ranks=(16, 40)))
    weights.load(1, kernels.array(swapped.a[1][0]), kernels.array(swapped.b[1][0]), scale=3.0)
    assert not weights.launches, "a kernel for the ranks that were"
    mixed = cases.replace(
        data,
        case=cases.replace(case, ranks=(16, 40)),
        a=[data.a[0], swapped.a[1]],
        b=[data.b[0], swapped.b[1]],
        scales=[data.scales[0], 3.0],
    )
    y = kernels.array(data.y)
    add_lora(y, x, weights, batch)
    cases.assert_added(kernels.numpy(y), mixed)


@pytest.mark.gpu
def test_a_stream_in_use_stays_in_use(gpu: engines.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """``Stream.use`` outlives every call of the library, the loop path included."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    data = cases.build(CASE)
    stream.use()
    try:
        weights, batch = cases.load(data, gpu.device, gpu.array)
        weights.load(0, data.a[0][0], data.b[0][0])
        batch.update(data.indices)
        add_lora(gpu.array(data.y), gpu.array(data.x), weights, batch)
        monkeypatch.setenv("DISABLE_SGMV", "1")
        batch.update(data.indices)
        add_lora(gpu.array(data.y), gpu.array(data.x), weights, batch)
        assert cupy.cuda.get_current_stream().ptr == stream.ptr
    finally:
        cupy.cuda.Stream.null.use()
