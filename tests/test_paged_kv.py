"""init_kv and append_kv: against loops that write each element by itself, on every engine, with bad tables."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tolerance
from engines import Engine
from hypothesis import given
from hypothesis import strategies as st

import cupy_lora
from cupy_lora import _arrays

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)


class Pool:
    """Pages on an engine, and their copy on the host that the expected writes go to."""

    def __init__(self, engine: Engine, pages: int, layers: int, heads: int, page_size: int, dim: int, dtype: np.dtype):
        rng = np.random.default_rng(pages)
        self.engine = engine
        self.expected = rng.standard_normal((pages, layers, 2, heads, page_size, dim)).astype(dtype)
        self.pages = engine.array(self.expected)
        self.base = _arrays.view("pages", self.pages).ptr
        self.page_bytes = self.expected[0].nbytes

    @property
    def sizes(self) -> tuple[int, int, int]:
        """num_layers, num_kv_heads, page_size."""
        _, layers, _, heads, page_size, _ = self.expected.shape
        return layers, heads, page_size

    def pointers(self, order: list[int]) -> np.ndarray:
        return np.array([self.base + page * self.page_bytes for page in order], np.int64)

    def expect(self, page: int, layer: int, offset: int, k: np.ndarray, v: np.ndarray) -> None:
        for head in range(k.shape[0]):
            for d in range(k.shape[1]):
                self.expected[page, layer, 0, head, offset, d] = k[head, d]
                self.expected[page, layer, 1, head, offset, d] = v[head, d]

    def check(self) -> None:
        tolerance.assert_same_bits(self.engine.numpy(self.pages), self.expected, "pages")


def tables(pool: Pool, rng: np.random.Generator, lengths: list[int]) -> tuple[list[list[int]], list[np.ndarray]]:
    """Random pages for sequences of these lengths: page numbers per sequence, and the three tables."""
    page_size = pool.sizes[2]
    order = rng.permutation(pool.expected.shape[0]).tolist()
    owned, indptr, last = [], [0], []
    for length in lengths:
        count = -(-length // page_size)
        owned.append([order.pop() for _ in range(count)])
        indptr.append(indptr[-1] + count)
        last.append(length - (count - 1) * page_size if count else 0)
    flat = [page for pages in owned for page in pages]
    return owned, [pool.pointers(flat), np.array(indptr, np.int32), np.array(last, np.int32)]


def init_case(
    engine: Engine, lengths: list[int], new: list[int], heads: int, dim: int, page_size: int, dtype: np.dtype, gap: int
) -> None:
    """The last ``new[i]`` of ``lengths[i]`` tokens, from rows ``gap`` elements apart."""
    rng = np.random.default_rng(sum(lengths))
    pages = sum(-(-length // page_size) for length in lengths) + 2
    pool = Pool(engine, pages, 2, heads, page_size, dim, dtype)
    owned, host_tables = tables(pool, rng, lengths)
    starts = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    wide = rng.standard_normal((2, int(starts[-1]), heads * dim + gap)).astype(dtype)
    k, v = (part[:, : heads * dim].reshape(-1, heads, dim) for part in wide)
    for i, length in enumerate(lengths):
        for j in range(new[i]):
            position = length - new[i] + j
            row = starts[i] + j
            pool.expect(owned[i][position // page_size], 1, position % page_size, k[row], v[row])
    ke, ve = (engine.array(part) for part in wide)
    if gap:
        ke, ve = (_heads(part, heads, dim) for part in (ke, ve))
    else:
        ke, ve = (part.reshape(-1, heads, dim) for part in (ke, ve))
    layers, _, _ = pool.sizes
    cupy_lora.init_kv(
        *(engine.array(t) for t in host_tables), ke, ve, engine.array(starts), layers, 1, heads, page_size
    )
    pool.check()


def _heads(wide: Any, heads: int, dim: int) -> Any:
    """(tokens, heads, dim) over the first columns of wider rows, without a copy."""
    return wide[:, : heads * dim].reshape(wide.shape[0], heads, dim)


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize(("heads", "dim", "page_size"), [(8, 128, 16), (1, 8, 1), (3, 40, 5), (2, 256, 64), (5, 80, 7)])
def test_init_writes_whole_prompts(engine: Engine, heads: int, dim: int, page_size: int, dtype: np.dtype):
    lengths = [1, 17, page_size, 2 * page_size + 1, 33]
    init_case(engine, lengths, lengths, heads, dim, page_size, dtype, 0)


@pytest.mark.parametrize("gap", [8, 4, 2, 1])
def test_init_appends_chunks_from_strided_rows(engine: Engine, gap: int):
    init_case(engine, [40, 3, 64, 0, 9], [10, 3, 1, 0, 0], 2, 64, 16, BF16, gap)


def test_init_finds_the_sequence_among_many(engine: Engine):
    """Two steps of the search (more than 32 sequences), empty ones among them, at both ends and in the middle."""
    rng = np.random.default_rng(0)
    lengths = [0, 0, *rng.integers(0, 4, 1100).tolist(), 0]
    init_case(engine, lengths, lengths, 1, 8, 4, F16, 0)


@pytest.mark.parametrize("batch", [32, 33, 35, 39])
def test_init_finds_the_sequence_where_a_step_ends(engine: Engine, batch: int):
    """One step of the search or two; with 35 and 39 the end of the table is the end of a page."""
    lengths = [1] * batch
    init_case(engine, lengths, lengths, 1, 8, 4, F16, 0)


def test_init_of_a_token_behind_its_sequence(engine: Engine):
    """Ends out of order lead to a sequence that ends at the token; the page past its last one is not there."""
    rng = np.random.default_rng(8)
    pool = Pool(engine, 10, 2, 1, 4, 8, F16)
    _, host_tables = tables(pool, rng, [12, 12, 16])
    k, v = rng.standard_normal((2, 9, 1, 8)).astype(F16)
    starts = np.array([0, 9, 0, 2], np.int32)
    cupy_lora.init_kv(*(engine.array(t) for t in (*host_tables, k, v, starts)), 2, 1, 1, 4)
    tolerance.assert_same_bits(engine.numpy(pool.pages)[:, 0], pool.expected[:, 0], "the other layer")


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize(("heads", "dim", "page_size"), [(8, 128, 16), (1, 8, 1), (3, 40, 5), (32, 128, 8)])
def test_append_writes_the_last_position(engine: Engine, heads: int, dim: int, page_size: int, dtype: np.dtype):
    rng = np.random.default_rng(heads)
    lengths = [1, page_size, page_size + 1, 3 * page_size, 11]
    pool = Pool(engine, 40, 3, heads, page_size, dim, dtype)
    owned, host_tables = tables(pool, rng, lengths)
    k, v = rng.standard_normal((2, len(lengths), heads, dim)).astype(dtype)
    for i, length in enumerate(lengths):
        pool.expect(owned[i][-1], 2, (length - 1) % page_size, k[i], v[i])
    sizes = 3, 2, heads, page_size
    cupy_lora.append_kv(*(engine.array(t) for t in host_tables), engine.array(k), engine.array(v), *sizes)
    pool.check()


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("append", [False, True], ids=["init", "append"])
@pytest.mark.parametrize(("heads", "dim", "page_size", "gap"), [(8, 128, 16, 0), (1, 16, 1, 8), (3, 48, 5, 1)])
def test_keys_are_rotated_when_stored(
    engine: Engine, append: bool, heads: int, dim: int, page_size: int, gap: int, dtype: np.dtype
):
    """Pairs as complex numbers, turned by their position; one rounding. Values as they are."""
    rng = np.random.default_rng(dim)
    lengths = [1, 7, 300, 33]
    new = [1] * 4 if append else [1, 5, 40, 33]
    pool = Pool(engine, sum(-(-n // page_size) for n in lengths) + 1, 2, heads, page_size, dim, dtype)
    owned, host_tables = tables(pool, rng, lengths)
    starts = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    wide = rng.standard_normal((2, int(starts[-1]), heads * dim + gap)).astype(dtype)
    k, v = (part[:, : heads * dim].reshape(-1, heads, dim) for part in wide)
    turned, sizes = np.zeros(k.shape), np.zeros(k.shape)
    frequencies = 5e5 ** (-np.arange(0, dim, 2) / dim) / 2.0
    for i, length in enumerate(lengths):
        for j in range(new[i]):
            row, position = starts[i] + j, length - new[i] + j
            pairs = k[row, :, : dim // 2].astype(np.float64) + 1j * k[row, :, dim // 2 :].astype(np.float64)
            moved = pairs * np.exp(1j * frequencies * position)
            turned[row] = np.concatenate([moved.real, moved.imag], axis=1)
            sizes[row] = np.tile(np.abs(pairs), 2) * 2
            pool.expect(owned[i][position // page_size], 1, position % page_size, k[row], v[row])
    ke, ve = (_heads(engine.array(part), heads, dim) for part in wide)
    arrays = [engine.array(t) for t in host_tables]
    sizes_of = 2, 1, heads, page_size
    options = {"rope": "llama", "rope_theta": 5e5, "rope_scale": 2.0}
    if append:
        cupy_lora.append_kv(*arrays, ke, ve, *sizes_of, **options)
    else:
        cupy_lora.init_kv(*arrays, ke, ve, engine.array(starts), *sizes_of, **options)
    pages = engine.numpy(pool.pages)
    for i, length in enumerate(lengths):
        for j in range(new[i]):
            row, position = starts[i] + j, length - new[i] + j
            place = owned[i][position // page_size], 1, 0, slice(None), position % page_size
            # The angle is right to a few units in float32's last place: four terms stand for that.
            tolerance.assert_close(pages[place], turned[row], sizes[row], 4, f"token {j} of sequence {i}")
            pool.expected[place] = pages[place]
    pool.check()


def test_rotated_keys_need_whole_pairs_of_vectors():
    arguments = {**good(), "k": np.ones((2, 2, 24), BF16), "v": np.ones((2, 2, 24), BF16)}
    with pytest.raises(ValueError, match=r"k: expected a head_dim that is a multiple of 16 \(with rope\), got 24"):
        cupy_lora.append_kv(**arguments, rope="llama")
    with pytest.raises(ValueError, match="rope: expected 'llama' or None, got 'yarn'"):
        cupy_lora.append_kv(**good(), rope="yarn")


BROKEN = {
    "pointer 0": (lambda t: t[0].__setitem__(2, 0), "kv_ptrs: expected an address that is not 0 .* at 2"),
    "pointer off by 8": (lambda t: t[0].__setitem__(2, t[0][2] + 8), "kv_ptrs: expected an address"),
    "offset 0": (lambda t: t[2].__setitem__(1, 0), r"last_page_offset: expected 1 .. 4, got 0 for sequence 1"),
    "offset negative": (lambda t: t[2].__setitem__(1, -3), "last_page_offset: expected 1 .. 4, got -3"),
    "offset too large": (lambda t: t[2].__setitem__(1, 5), "last_page_offset: expected 1 .. 4, got 5"),
    "pages out of the table": (lambda t: t[1].__setitem__(-1, 99), "kv_indptr: expected ascending entries of 0 .. "),
    "pages negative": (lambda t: t[1].__setitem__(0, -1), "kv_indptr: expected ascending entries"),
    "no pages": (lambda t: t[1].__setitem__(1, t[1][2]), "kv_indptr: expected pages for"),
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("append", [False, True], ids=["init", "append"])
def test_wrong_tables_are_skipped_and_named_under_debug(
    engine: Engine, append: bool, fault: str, monkeypatch: pytest.MonkeyPatch
):
    rng = np.random.default_rng(5)
    lengths, heads, dim, page_size = [4, 6, 5], 2, 16, 4
    pool = Pool(engine, 9, 1, heads, page_size, dim, BF16)
    owned, host_tables = tables(pool, rng, lengths)
    healthy = [np.array(t) for t in host_tables]
    break_it, text = BROKEN[fault]
    break_it(host_tables)
    new = [1, 1, 1] if append else [2, 6, 3]
    starts = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    k, v = rng.standard_normal((2, int(starts[-1]), heads, dim)).astype(BF16)
    flat = [page for pages in owned for page in pages]
    for i in range(3):
        first, end, last = int(host_tables[1][i]), int(host_tables[1][i + 1]), int(host_tables[2][i])
        length = (end - first - 1) * page_size + last
        if not (0 <= first < end <= len(flat) and 1 <= last <= page_size) or length < new[i]:
            continue
        for j in range(new[i]):
            position = length - new[i] + j
            at = first + position // page_size
            if host_tables[0][at] == healthy[0][at]:
                row = starts[i] + j
                pool.expect(flat[at], 0, position % page_size, k[row], v[row])
    arguments = [engine.array(t) for t in (*host_tables, k, v, *([] if append else [starts]))]
    function = cupy_lora.append_kv if append else cupy_lora.init_kv
    function(*arguments, 1, 0, heads, page_size)
    pool.check()
    monkeypatch.setenv("CUPY_LORA_DEBUG", "1")
    with pytest.raises(ValueError, match=text):
        function(*arguments, 1, 0, heads, page_size)
    function(*(engine.array(t) for t in healthy), *arguments[3:], 1, 0, heads, page_size)


def test_pages_that_do_not_hold_the_tokens(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(6)
    pool = Pool(engine, 6, 1, 1, 4, 8, F16)
    owned, host_tables = tables(pool, rng, [5, 4])
    starts = np.array([0, 6, 10], np.int32)  # sequence 0 has 6 tokens but room for 5
    k, v = rng.standard_normal((2, 10, 1, 8)).astype(F16)
    for j in range(4):
        pool.expect(owned[1][0], 0, j, k[6 + j], v[6 + j])
    arguments = [engine.array(t) for t in (*host_tables, k, v, starts)]
    cupy_lora.init_kv(*arguments, 1, 0, 1, 4)
    pool.check()
    monkeypatch.setenv("CUPY_LORA_DEBUG", "1")
    with pytest.raises(ValueError, match="expected pages that hold the 6 tokens of sequence 0, got a length of 5"):
        cupy_lora.init_kv(*arguments, 1, 0, 1, 4)


@pytest.mark.parametrize("starts", [[0, 9, 4, 10], [3, 5, 7, 10], [0, 4, 8, 40], [-5, 4, 8, 10], [10, 8, 4, 0]])
def test_wrong_seqlen_indptr_never_leaves_the_pages(engine: Engine, starts: list[int], monkeypatch: pytest.MonkeyPatch):
    """Which tokens are written does not matter, that nothing else is does (guard pages and the other layer)."""
    rng = np.random.default_rng(7)
    pool = Pool(engine, 9, 2, 1, 4, 8, F16)
    _, host_tables = tables(pool, rng, [12, 12, 12])
    k, v = rng.standard_normal((2, 10, 1, 8)).astype(F16)
    arguments = [engine.array(t) for t in (*host_tables, k, v, np.array(starts, np.int32))]
    cupy_lora.init_kv(*arguments, 2, 1, 1, 4)
    tolerance.assert_same_bits(engine.numpy(pool.pages)[:, 0], pool.expected[:, 0], "the other layer")
    monkeypatch.setenv("CUPY_LORA_DEBUG", "1")
    with pytest.raises(ValueError, match="seqlen_indptr: expected"):
        cupy_lora.init_kv(*arguments, 2, 1, 1, 4)


def test_empty_batches(engine: Engine):
    nothing = np.empty((0, 2, 8), F16)
    empty = [np.empty(0, np.int64), np.zeros(1, np.int32), np.empty(0, np.int32), nothing, nothing]
    cupy_lora.append_kv(*(engine.array(t) for t in empty), 1, 0, 2, 4)
    cupy_lora.init_kv(*(engine.array(t) for t in (*empty, np.zeros(1, np.int32))), 1, 0, 2, 4)


@given(data=st.data(), page_size=st.integers(1, 20), heads=st.integers(1, 4), eighths=st.integers(1, 20))
def test_any_batch(data: st.DataObject, page_size: int, heads: int, eighths: int):
    from engines import Numpy

    lengths = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=6))
    new = [data.draw(st.integers(0, length)) for length in lengths]
    init_case(Numpy(), lengths, new, heads, 8 * eighths, page_size, BF16, data.draw(st.integers(0, 3)))


def good() -> dict[str, Any]:
    k = np.ones((2, 2, 16), BF16)
    return {
        "kv_ptrs": np.zeros(2, np.int64), "kv_indptr": np.array([0, 1, 2], np.int32),
        "last_page_offset": np.ones(2, np.int32), "k": k, "v": k.copy(), "num_layers": 2, "layer_idx": 1,
        "num_kv_heads": 2, "page_size": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"kv_ptrs": np.zeros(2, np.int32)}, TypeError, "kv_ptrs: expected dtype int64, got int32"),
        ({"kv_indptr": np.zeros(3, np.int64)}, TypeError, "kv_indptr: expected dtype int32, got int64"),
        ({"last_page_offset": np.ones(2, np.int64)}, TypeError, "last_page_offset: expected dtype int32"),
        ({"kv_ptrs": np.zeros((2, 1), np.int64)}, ValueError, "kv_ptrs: expected one axis"),
        ({"kv_ptrs": np.zeros(4, np.int64)[::2]}, ValueError, "kv_ptrs: expected a C-contiguous"),
        ({"kv_indptr": np.zeros(2, np.int32)}, ValueError, r"kv_indptr: expected shape \(3\), got \(2,\)"),
        ({"k": np.ones((2, 2, 16), np.float64)}, TypeError, "k: expected dtype"),
        ({"v": np.ones((2, 2, 16), F16)}, TypeError, "v: expected dtype bfloat16, got float16"),
        ({"v": np.ones((2, 2, 8), BF16)}, ValueError, r"v: expected shape \(2, 2, 16\)"),
        ({"k": np.ones((3, 2, 16), BF16)}, ValueError, r"k: expected shape \(2, 2, head_dim\)"),
        ({"k": np.ones((2, 3, 16), BF16)}, ValueError, r"k: expected shape \(2, 2, head_dim\)"),
        ({"k": np.ones((2, 2, 12), BF16)}, ValueError, "k: expected a head_dim that is a multiple of 8, got 12"),
        ({"k": np.ones((2, 2, 32), BF16)[:, :, ::2]}, ValueError, "k: expected contiguous rows"),
        ({"layer_idx": 2}, ValueError, "layer_idx: expected an integer in 0 .. 1, got 2"),
        ({"layer_idx": 1.0}, TypeError, "layer_idx: expected an integer"),
        ({"page_size": 0}, ValueError, "page_size: expected an integer of at least 1, got 0"),
        ({"num_layers": 0}, ValueError, "num_layers: expected an integer"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], text: str):
    with pytest.raises(error, match=text):
        cupy_lora.append_kv(**{**good(), **change})


def test_init_checks_its_indptr():
    arguments = good()
    with pytest.raises(TypeError, match="seqlen_indptr: expected dtype int32"):
        cupy_lora.init_kv(**arguments, seqlen_indptr=np.zeros(3, np.int64))
    with pytest.raises(ValueError, match=r"seqlen_indptr: expected shape \(3\), got \(4,\)"):
        cupy_lora.init_kv(**arguments, seqlen_indptr=np.zeros(4, np.int32))


def test_pages_larger_than_2_to_the_31_bytes(engine: Engine):
    """The last layer of a page of 2.2 GB, of which the system backs only what is touched (on the host)."""
    layers = 8300
    shape = (1, layers, 2, 8, 64, 128)
    if engine.name == "gpu":
        import cupy

        pool = cupy.empty(shape, BF16)
    else:
        pool = np.empty(shape, BF16)
    assert pool.nbytes > 2**31
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 1, 8, 128)).astype(BF16)
    base = _arrays.view("pool", pool).ptr
    host_tables = np.array([base], np.int64), np.array([0, 1], np.int32), np.array([64], np.int32)
    cupy_lora.append_kv(*(engine.array(t) for t in (*host_tables, k, v)), layers, layers - 1, 8, 64)
    tolerance.assert_same_bits(engine.numpy(pool[0, -1, :, :, 63]), np.stack([k[0], v[0]]))


@pytest.mark.gpu
def test_flashinfer_reads_the_same_pages(gpu: Engine):
    """Its append writes the same bits into pages of one layer (its layout "HND")."""
    torch = pytest.importorskip("torch")
    flashinfer = pytest.importorskip("flashinfer")
    lengths, heads, dim, page_size = [17, 1, 48, 5], 8, 128, 16
    counts = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(counts), device="cuda").to(torch.int32)
    indptr = torch.tensor([0, *np.cumsum(counts).tolist()], dtype=torch.int32, device="cuda")
    last = torch.tensor([length - (n - 1) * page_size for length, n in zip(lengths, counts, strict=True)])
    last = last.to(torch.int32).cuda()
    starts = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32, device="cuda")
    k, v = torch.randn(2, sum(lengths), heads, dim, dtype=torch.bfloat16, device="cuda")
    ours, theirs = (torch.zeros(sum(counts), 2, heads, page_size, dim, dtype=k.dtype, device="cuda") for _ in range(2))
    step = ours[0].numel() * ours.element_size()
    pointers = ours.data_ptr() + order.to(torch.int64) * step
    cupy_lora.init_kv(pointers, indptr, last, k, v, starts, 1, 0, heads, page_size)
    lengths_on_gpu = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    rows = flashinfer.get_batch_indices_positions(starts, lengths_on_gpu, sum(lengths))
    flashinfer.append_paged_kv_cache(k, v, *rows, theirs, order, indptr, last, kv_layout="HND")
    assert torch.equal(ours, theirs)
