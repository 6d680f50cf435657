"""Kept launches where kernels run: segments looked at again, threads, launches that overlap."""

from __future__ import annotations

import threading
from typing import Any

import cases
import engines
import numpy as np
import pytest
import tolerance

import cupy_lora


def test_kept_segments_of_host_memory_are_checked_again(engine: engines.Engine) -> None:
    rng = np.random.default_rng(0)
    x, a = (rng.standard_normal(shape).astype(np.float16) for shape in ((6, 32), (2, 8, 32)))
    given = [engine.array(x), engine.array(a), engine.array(np.zeros((6, 8), np.float32))]

    def vectors(*values: list[int]) -> list[Any]:
        return [engine.array(np.array(value, np.int32)) for value in values]

    for starts, lengths in (([0, 3], [3, 3]), ([0, 2], [2, 4])):
        cupy_lora.sgmv_shrink(*given, *vectors(starts, lengths, [1, 0]), 2, 4, 1.0)
        want = np.concatenate([x[: lengths[0]] @ a[1].T.astype(np.float64), x[lengths[0] :] @ a[0].T.astype(float)])
        np.testing.assert_allclose(engine.numpy(given[2]), want, rtol=1e-5, atol=1e-4)
    if engine.name != "gpu":  # on a device only the debug switch looks
        with pytest.raises(ValueError, match="expected segments that do not overlap"):
            cupy_lora.sgmv_shrink(*given, *vectors([0, 2], [3, 3], [1, 0]), 2, 4, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("own_stream", [False, True])
def test_a_thread_that_never_used_the_gpu_can_call(gpu: engines.Engine, own_stream: bool) -> None:
    """Its first call is a kept one: nothing before it makes the thread's context."""
    import cupy

    data = cases.build(cases.Case(8, 128, (128,), (16, 16), "random"))
    stream = cupy.cuda.Stream(non_blocking=True) if own_stream else cupy.cuda.Stream.null
    stream.use()
    try:
        weights, batch = cases.load(data, gpu.device, gpu.array)
        x, first, second = (gpu.array(host) for host in (data.x, data.y, data.y))
        cupy_lora.add_lora(first, x, weights, batch)
        stream.synchronize()
        failed: list[BaseException] = []

        def call() -> None:
            try:
                if own_stream:
                    stream.use()
                cupy_lora.add_lora(second, x, weights, batch)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        assert not failed, failed
        stream.synchronize()
        tolerance.assert_same_bits(gpu.numpy(second), gpu.numpy(first))
    finally:
        cupy.cuda.Stream.null.use()


@pytest.mark.gpu
def test_many_threads_make_one_kept_call(gpu: engines.Engine) -> None:
    """Each launch reads the arguments of its own call."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 256)).astype(np.float16)
    w = gpu.array(np.ones(256, np.float16))
    inputs = [gpu.array((x * (i + 1)).astype(np.float16)) for i in range(8)]
    outputs = [gpu.array(np.zeros_like(x)) for _ in inputs]
    want = [gpu.numpy(cupy_lora.rms_norm(array, w)) for array in inputs]

    def calls(i: int) -> None:
        for _ in range(300):
            cupy_lora.rms_norm(inputs[i], w, 1e-6, outputs[i])

    threads = [threading.Thread(target=calls, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, expected in zip(outputs, want, strict=True):
        tolerance.assert_same_bits(gpu.numpy(got), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
def test_launches_that_overlap_wait_for_each_other(gpu: engines.Engine, captured: bool) -> None:
    """Each launch reads what the one before wrote: the schedule, the table of adapters, activations."""
    import cupy

    rng = np.random.default_rng(3)
    width, tokens = 1024, 96
    host = rng.standard_normal((tokens, width)).astype(np.float16)
    a, b = (rng.standard_normal(shape).astype(np.float16) / 32 for shape in ((2, 16, width), (2, width, 16)))
    adapters = [(gpu.array(a[i]), gpu.array(b[i])) for i in range(2)]
    indices = [gpu.array(rng.integers(-1, 2, tokens)) for _ in range(4)]
    norm = gpu.array(np.ones(width, np.float16))
    weights = cupy_lora.LoraWeights(width, width, max_adapters=2, dtype="float16", device=gpu.device)
    batch = cupy_lora.LoraBatch(tokens, max_adapters=2, device=gpu.device)
    hidden = gpu.array(np.zeros_like(host))

    def steps(x: object, wait: bool) -> None:
        for i in range(40):
            for step in (
                lambda i=i: captured or weights.load(i % 2, *adapters[i // 2 % 2], scale=0.5),
                lambda i=i: batch.update(indices[i % 4]),
                lambda: cupy_lora.rms_norm(x, norm, 1e-6, hidden),
                lambda: cupy_lora.add_lora(x, hidden, weights, batch),
            ):
                step()
                if wait:
                    cupy.cuda.Device().synchronize()

    for slot in range(2):
        weights.load(slot, *adapters[slot], scale=0.5)
    want, got = gpu.array(host), gpu.array(host)
    steps(want, wait=True)
    steps(gpu.array(host), wait=False)
    if captured:
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            stream.begin_capture()
            steps(got, wait=False)
            graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
    else:
        steps(got, wait=False)
    tolerance.assert_same_bits(gpu.numpy(got), gpu.numpy(want))
