"""add_lora on a GPU: streams, graphs, several devices, other libraries' arrays."""

from __future__ import annotations

import cases
import engines
import numpy as np
import pytest
import tolerance

from cupy_lora import LoraBatch, LoraWeights, add_lora


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
