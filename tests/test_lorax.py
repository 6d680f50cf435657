"""LoRAX's own code as the oracle: its Python on the drop-in module, its tests, its Triton kernels on random inputs."""

from __future__ import annotations

from typing import Any

import lorax_checkout
import numpy as np
import pytest

import cupy_lora
from cupy_lora import _jit, dispatch


@pytest.fixture
def device() -> str:
    lorax_checkout.server()
    return lorax_checkout.device()


@pytest.fixture(
    params=["numpy", pytest.param("simt", marks=pytest.mark.simt), pytest.param("gpu", marks=pytest.mark.gpu)]
)
def where(request: pytest.FixtureRequest, device: str) -> Any:
    """The oracle's device, with the library on the engine that shares its memory."""
    if (request.param == "gpu") != (device == "cuda"):
        pytest.skip(f"the oracle runs on {device}")
    if request.param == "simt":
        from simt import runner

        with _jit.host_runner(runner.run):
            yield device
    else:
        yield device


def both(function: str, ours: Any, theirs: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...], place: Any) -> None:
    """Call both on the same inputs; ``place`` orders inputs and outputs into arguments. Outputs must be equal."""
    import torch

    one, two = (tuple(out.clone() for out in outputs) for _ in range(2))
    ours(*place(inputs, one))
    theirs(*place(inputs, two))
    for i, (actual, expected) in enumerate(zip(one, two, strict=True)):
        assert torch.equal(actual, expected), f"{function}: output {i} differs"


def integers(rng: np.random.Generator, low: int, high: int, size: int, device: str, dtype: Any) -> Any:
    import torch

    return torch.tensor(rng.integers(low, high, size), dtype=dtype, device=device)


def cumulative(lengths: Any, dtype: Any) -> Any:
    import torch

    return torch.nn.functional.pad(torch.cumsum(lengths, 0), (1, 0)).to(dtype)


# ---- metadata -----------------------------------------------------------------------------------
SHAPES = [(1, 1), (7, 30), (33, 700)]


@pytest.mark.parametrize(("batch", "most"), SHAPES)
def test_block_tables(where: str, batch: int, most: int):
    import torch

    lorax = lorax_checkout.load("models.metadata_kernels")
    lorax._HAS_TRITON = True
    rng = np.random.default_rng(batch)
    new = integers(rng, 1, most + 1, batch, where, torch.int32)
    cached = integers(rng, 0, most, batch, where, torch.int32)
    table = torch.randint(0, 10**6, (batch, 2 * most), dtype=torch.int32, device=where)
    arguments = {
        "block_tables": table, "input_lengths": new.tolist(), "cache_lengths": cached.tolist(),
        "input_lengths_tensor": new, "cache_lengths_tensor": cached, "max_current_length": 2 * most,
    }  # fmt: skip
    ragged = lorax.block_tables_to_ragged(**arguments)
    actual = cupy_lora.block_tables_to_ragged(**arguments)
    assert type(actual) is torch.Tensor
    assert actual.dtype == ragged.dtype
    assert torch.equal(actual, ragged)
    cu = cumulative(new + cached, torch.int64)
    padded = torch.full_like(table, -1)
    both(
        "block_tables_to_padded", cupy_lora.block_tables_to_padded, lorax.block_tables_to_padded,
        (cu, ragged), (padded,), lambda i, o: (2 * most, i[0], o[0], i[1]),
    )  # fmt: skip


@pytest.mark.parametrize(("batch", "most"), SHAPES)
def test_copy_next_input_ids(where: str, batch: int, most: int):
    import torch

    lorax = lorax_checkout.load("models.metadata_kernels")
    rng = np.random.default_rng(batch)
    cached = integers(rng, 0, most, batch, where, torch.int32)
    new = integers(rng, 1, 5, batch, where, torch.int32)
    prompts = integers(rng, 0, most + 5, batch, where, torch.int32)
    accepted = integers(rng, 1, 6, batch, where, torch.int64)
    cu = cumulative(accepted, torch.int64)
    tokens = integers(rng, 0, 32000, int(cu[-1]), where, torch.int64)
    ids = torch.full((batch, most + 12), -1, dtype=torch.int64, device=where)
    both(
        "copy_next_input_ids_inplace", cupy_lora.copy_next_input_ids_inplace, lorax.copy_next_input_ids_inplace,
        (cached, new, prompts, tokens, cu), (ids,), lambda i, o: (5, o[0], *i),
    )  # fmt: skip


@pytest.mark.parametrize(("batch", "most"), SHAPES)
def test_positions_and_slots(where: str, batch: int, most: int):
    import torch

    lorax = lorax_checkout.load("models.metadata_kernels")
    rng = np.random.default_rng(batch)
    cached = integers(rng, 0, most, batch, where, torch.int32)
    new = integers(rng, 0, most + 1, batch, where, torch.int32)
    cu, cu_slots = cumulative(new, torch.int32), cumulative(new + cached, torch.int64)
    positions = torch.full((int(cu[-1]),), -1, dtype=torch.int32, device=where)
    both(
        "prepare_position_slot_ids", cupy_lora.prepare_position_slot_ids, lorax.prepare_position_slot_ids,
        (cached, cu, cu_slots), (positions, positions.to(torch.int64)), lambda i, o: (most, *i, *o),
    )  # fmt: skip
    slots = integers(rng, 0, 10**9, int(cu_slots[-1]) + most, where, torch.int64)
    keep = cumulative(new, torch.int64)
    filtered = torch.full((int(keep[-1]),), -1, dtype=torch.int64, device=where)
    both(
        "slots_filtering", cupy_lora.slots_filtering, lorax.slots_filtering, (slots, keep, cu_slots[:-1].contiguous()),
        (filtered,), lambda i, o: (most, i[0], o[0], *i[1:]),
    )  # fmt: skip


# ---- LoRA on Triton -----------------------------------------------------------------------------
RANKS = [8, 16, 64]


def close(actual: Any, expected: Any, magnitude: float, what: str) -> None:
    """LoRAX rounds v and the delta to 16 bits, so its results are good to a few units of the largest term."""
    import torch

    unit = float(torch.finfo(torch.float16).eps)
    worst = float((actual.float() - expected.float()).abs().max())
    assert worst <= 4 * unit * magnitude, f"{what}: differs by {worst}"


@pytest.mark.parametrize("rank", RANKS)
def test_bgmv(where: str, rank: int):
    import torch

    ops = {
        name: lorax_checkout.load(f"utils.ops.{name}") for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")
    }
    torch.manual_seed(rank)
    slots = torch.tensor([2, -1, 0, 2, 1], device=where)
    x = torch.randn(5, 256, dtype=torch.float16, device=where)
    a = torch.randn(3, 1, rank, 256, dtype=torch.float16, device=where) * 0.1
    b = torch.randn(3, 128, rank, dtype=torch.float16, device=where) * 0.1
    one, two = (torch.zeros(5, rank, dtype=torch.float32, device=where) for _ in range(2))
    cupy_lora.bgmv_shrink(x, a, one, slots, 0.5)
    ops["bgmv_shrink"].bgmv_shrink(x, a, two, slots, 0.5)
    close(one, two, float(two.abs().max()), "bgmv_shrink")
    v = two.half()
    y = torch.randn(5, 300, dtype=torch.float16, device=where)
    for add in (True, False):
        one, two = y[:, :128].contiguous(), y[:, :128].contiguous()
        cupy_lora.bgmv_expand(v, b, one, slots, add)
        ops["bgmv_expand"].bgmv_expand(v, b, two, slots, add)
        close(one, two, float(two.abs().max()) * rank**0.5, f"bgmv_expand, add_inputs={add}")
        one, two = y.clone(), y.clone()
        cupy_lora.bgmv_expand_slice(v, b, one, slots, 40, 128, add)
        ops["bgmv_expand_slice"].bgmv_expand_slice(v, b, two, slots, 40, 128, add)
        close(one, two, float(two.abs().max()) * rank**0.5, f"bgmv_expand_slice, add_inputs={add}")
        assert torch.equal(one[1], y[1]), "a row without an adapter was written"


@pytest.mark.parametrize("rank", RANKS)
def test_sgmv(where: str, rank: int):
    import torch

    ops = {
        name: lorax_checkout.load(f"utils.ops.{name}") for name in ("sgmv_shrink", "sgmv_expand", "sgmv_expand_slice")
    }
    torch.manual_seed(rank)
    lengths = torch.tensor([3, 40, 1, 16], device=where)
    starts = cumulative(lengths, torch.int64)[:-1].contiguous()
    slots = torch.tensor([1, 0, -1, 2], device=where)
    tokens = int(lengths.sum())
    rows = (starts, lengths, slots, 4, 40)
    x = torch.randn(tokens, 256, dtype=torch.float16, device=where)
    a = torch.randn(3, rank, 256, dtype=torch.float16, device=where) * 0.1
    b = torch.randn(3, 1, 128, rank, dtype=torch.float16, device=where) * 0.1
    one, two = (torch.zeros(tokens, rank, dtype=torch.float32, device=where) for _ in range(2))
    cupy_lora.sgmv_shrink(x, a, one, *rows, 0.5)
    ops["sgmv_shrink"].sgmv_shrink(x, a, two, *rows, 0.5)
    close(one, two, float(two.abs().max()), "sgmv_shrink")
    v = two.half()
    y = torch.randn(tokens, 300, dtype=torch.float16, device=where)
    for add in (True, False):
        one, two = y[:, :128].contiguous(), y[:, :128].contiguous()
        cupy_lora.sgmv_expand(v, b, one, *rows, add)
        ops["sgmv_expand"].sgmv_expand(v, b, two, *rows, add)
        close(one, two, float(two.abs().max()), f"sgmv_expand, add_inputs={add}")
        one, two = y.clone(), y.clone()
        cupy_lora.sgmv_expand_slice(v, b, one, *rows, 40, 128, add)
        ops["sgmv_expand_slice"].sgmv_expand_slice(v, b, two, *rows, 40, 128, add)
        close(one, two, float(two.abs().max()), f"sgmv_expand_slice, add_inputs={add}")


# ---- its Python on the drop-in module -----------------------------------------------------------
def test_its_dispatch_rules_are_ours(device: str):
    import torch

    lorax = lorax_checkout.load("utils.punica")
    assert lorax._kernels is cupy_lora.punica_kernels
    for name in ("MIN_SGMV_RANK", "MIN_RANK_CUSTOM", "MAX_RANK_CUSTOM", "SGMV_BLOCK_SIZE", "BGMV_MAX_RANK"):
        assert getattr(dispatch, name) == getattr(lorax, name)
    assert dispatch.has_sgmv() == lorax.has_sgmv()
    for rank in (1, 7, 8, 9, 15, 16, 17, 33, 100, 128, 129):
        assert dispatch.use_cutlass_shrink(rank) == lorax.use_cutlass_shrink(rank)
        t = torch.arange(rank * 3, dtype=torch.float32).reshape(3, rank)
        assert dispatch.orient_for_rank(t, rank).shape == lorax.orient_for_rank(t, rank).shape
        for world in (1, 2, 4):
            assert torch.equal(torch.as_tensor(dispatch.pad_rank(t, 1, world)), lorax.pad_rank(t, 1, world))
    assert cupy_lora.punica_kernels.sgmv_cutlass_tmp_size(5) == lorax.get_tmp_expand_size(5)


@pytest.mark.parametrize("rank", [4, 8, 16, 40, 64, 128, 160])
def test_add_lora_through_its_python(where: str, rank: int):
    """Both of its layouts, the absent segment included; 4, 40 and 160 are ranks that the original does not take."""
    import torch

    lorax = lorax_checkout.load("utils.punica")
    torch.manual_seed(rank)
    starts, ends = (torch.tensor(part, dtype=torch.int32, device=where) for part in ([0, -1, 2, 5], [2, -1, 2, 6]))
    x = torch.randn(6, 320, dtype=torch.float16, device=where)
    y = torch.randn(6, 200, dtype=torch.float16, device=where)
    a = [torch.randn(2, rank, 320, dtype=torch.float16, device=where) * 0.1 for _ in range(4)]
    b = [torch.randn(2, rank, 200, dtype=torch.float16, device=where) * 0.1 for _ in range(4)]
    exact = y.double()
    for s in (0, 3):
        part = slice(int(starts[s]), int(ends[s]))
        exact[part] += (x[part].double() @ a[s][1].double().T) @ b[s][1].double()
    if not 16 <= rank <= 128:
        a = [w.transpose(1, 2).contiguous() for w in a]
    pointers = [
        torch.tensor([0 if s == 1 else w.data_ptr() for s, w in enumerate(ws)], dtype=torch.int64, device=where)
        for ws in (a, b)
    ]
    lorax.add_lora_sgmv_cutlass(y, x, *pointers, starts, ends, 1, rank)
    close(y, exact, float(exact.abs().max()), "add_lora_sgmv_cutlass")


@pytest.mark.parametrize("rank", [8, 40])
def test_bgmv_through_its_python(where: str, rank: int):
    """40 is a rank that the original does not take."""
    import torch

    lorax = lorax_checkout.load("utils.punica")
    torch.manual_seed(rank)
    slots = torch.tensor([1, 0, 1, 2], device=where)
    x = torch.randn(4, 320, dtype=torch.float16, device=where)
    y = torch.randn(4, 200, dtype=torch.float16, device=where)
    a = [torch.randn(2, rank, 320, dtype=torch.float16, device=where) * 0.1 for _ in range(3)]
    b = [torch.randn(2, 200, rank, dtype=torch.float16, device=where) * 0.1 for _ in range(3)]
    exact = y.double()
    for i, slot in enumerate(slots.tolist()):
        exact[i] += (x[i].double() @ a[slot][1].double().T) @ b[slot][1].double().T
    v = torch.zeros(4, rank, dtype=torch.float16, device=where)
    pointers = [torch.tensor([w.data_ptr() for w in ws], dtype=torch.int64, device=where) for ws in (a, b)]
    lorax.add_lora_a_bgmv(v, x, pointers[0], slots, 1)
    lorax.add_lora_b_bgmv(y, v, pointers[1], slots, 1)
    close(y, exact, float(exact.abs().max()), "add_lora_a_bgmv, add_lora_b_bgmv")


@pytest.mark.parametrize("name", [pytest.param("test_add_lora_sgmv", marks=pytest.mark.gpu), "test_pad_rank"])
def test_its_own_tests(device: str, name: str):
    function = getattr(lorax_checkout.load_test("test_sgmv"), name)
    cases = lorax_checkout.parameters(function)
    assert len(cases) >= 10
    for case in cases:
        function(**case)


def test_its_segment_tests(device: str):
    lorax_checkout.load("utils.segments")
    module = lorax_checkout.load_test("test_segments")
    functions = [value for name, value in vars(module).items() if name.startswith("test_")]
    assert functions
    for function in functions:
        for case in lorax_checkout.parameters(function):
            function(**case)
