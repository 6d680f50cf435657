"""PagedKvCache: who owns which page, what happens when there are none left, and the tables it keeps."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from engines import Engine
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import cupy_lora
from cupy_lora import _arrays, kv_cache

BF16 = np.dtype(ml_dtypes.bfloat16)


def make(pages: int = 10, page_size: int = 4, device: int | str = "cpu") -> cupy_lora.PagedKvCache:
    return cupy_lora.PagedKvCache(pages, 2, 2, page_size, 8, "bfloat16", device=device)


class Model(RuleBasedStateMachine):
    """Any series of calls, beside a plain model of what each sequence should be."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = make(pages=12, page_size=3)
        self.lengths: dict[int, int] = {}

    def fits(self, more: int) -> bool:
        return more <= self.cache.free_pages

    @precondition(lambda self: len(self.lengths) < 12)  # a batch has at most as many sequences as there are pages
    @rule(tokens=st.integers(0, 14))
    def add(self, tokens: int) -> None:
        before = self.cache.free_pages
        if self.fits(-(-tokens // 3)):
            self.lengths[self.cache.add(tokens)] = tokens
        else:
            with pytest.raises(kv_cache.OutOfPagesError, match="free pages"):
                self.cache.add(tokens)
            assert self.cache.free_pages == before

    @precondition(lambda self: self.lengths)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.lengths)), unique=True))
        counts = [data.draw(st.integers(0, 8)) for _ in chosen]
        need = sum(
            -(-(self.lengths[s] + n) // 3) - -(-self.lengths[s] // 3) for s, n in zip(chosen, counts, strict=True)
        )
        if self.fits(need):
            self.cache.extend(chosen, counts)
            for s, n in zip(chosen, counts, strict=True):
                self.lengths[s] += n
        else:
            with pytest.raises(kv_cache.OutOfPagesError):
                self.cache.extend(chosen, counts)

    @precondition(lambda self: self.lengths)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.lengths)))
        self.cache.free(sequence)
        del self.lengths[sequence]
        with pytest.raises(ValueError, match="expected one that is in the cache"):
            self.cache.free(sequence)

    @invariant()
    def consistent(self) -> None:
        assert self.cache.sequences == tuple(self.lengths)
        owned = [page for s in self.lengths for page in self.cache.pages_of(s)]
        assert len(set(owned)) == len(owned), "a page belongs to two sequences"
        assert all(0 <= page < 12 for page in owned)
        assert self.cache.free_pages == 12 - len(owned)
        for s, length in self.lengths.items():
            assert self.cache.length(s) == length
            assert len(self.cache.pages_of(s)) == -(-length // 3)
        ptrs, indptr, last = self.cache.batch()
        base = _arrays.view("pages", self.cache.pages).ptr
        assert ((ptrs - base) // self.cache.pages[0].nbytes).tolist() == owned
        for i, length in enumerate(self.lengths.values()):
            pages = int(indptr[i + 1] - indptr[i])
            assert ((pages - 1) * 3 + int(last[i]) if pages else 0) == length


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=40, stateful_step_count=30, deadline=None, derandomize=True)


def test_tables_are_what_the_ops_take(engine: Engine):
    """Tokens through init_kv and append_kv, read back through pages_of."""
    cache = make(device=engine.device)
    rng = np.random.default_rng(0)
    one, two = cache.add(6), cache.add(3)
    k, v = rng.standard_normal((2, 9, 2, 8)).astype(BF16)
    starts = engine.array(np.array([0, 6, 9], np.int32))
    cupy_lora.init_kv(*cache.batch([one, two]), engine.array(k), engine.array(v), starts, 2, 1, 2, 4)
    cache.extend([one, two])
    more_k, more_v = rng.standard_normal((2, 2, 2, 8)).astype(BF16)
    cupy_lora.append_kv(*cache.batch([two, one]), engine.array(more_k), engine.array(more_v), 2, 1, 2, 4)
    pages = engine.numpy(cache.pages)[:, 1]
    for sequence, new_k, new_v in (
        (one, [*k[:6], more_k[1]], [*v[:6], more_v[1]]),
        (two, [*k[6:], more_k[0]], [*v[6:], more_v[0]]),
    ):
        held = pages[cache.pages_of(sequence)].transpose(1, 0, 3, 2, 4).reshape(2, -1, 2, 8)
        length = cache.length(sequence)
        assert (held[0, :length].view(np.uint16) == np.array(new_k).view(np.uint16)).all()
        assert (held[1, :length].view(np.uint16) == np.array(new_v).view(np.uint16)).all()


def test_block_tables_of_page_numbers_become_pointers(engine: Engine):
    cache = make(device=engine.device)
    cache.add(5)
    sequences = [cache.add(3), cache.add(9)]
    cache.extend(sequences[0], 2)
    pages = [page for sequence in sequences for page in cache.pages_of(sequence)]
    pointers = engine.numpy(cache.page_ptrs)
    assert pointers.dtype == np.int64
    assert pointers[pages].tolist() == engine.numpy(cache.batch(sequences).kv_ptrs).tolist()


def test_the_tables_do_not_move(engine: Engine):
    cache = make(device=engine.device)
    one = cache.add(5)
    addresses = [_arrays.view("table", table).ptr for table in cache.batch()]
    cache.add(9)
    cache.extend(one, 8)
    assert [_arrays.view("table", table).ptr for table in cache.batch()] == addresses
    full = (cache.kv_ptrs, cache.kv_indptr, cache.last_page_offset)
    assert [_arrays.view("table", table).ptr for table in full] == addresses
    assert [table.shape[0] for table in full] == [10, 11, 10]


def test_a_step_that_changes_nothing_sends_nothing(monkeypatch: pytest.MonkeyPatch):
    cache = make()
    one = cache.add(5)
    cache.batch([one])
    cache.kv_ptrs[0], cache.kv_indptr[0], cache.last_page_offset[0] = -1, -1, -1
    cache.batch([one])
    assert (cache.kv_ptrs[0], cache.kv_indptr[0], cache.last_page_offset[0]) == (-1, -1, -1)
    cache.extend(one)
    ptrs, indptr, last = cache.batch([one])
    assert (ptrs[0], indptr[0], last[0]) == (-1, -1, 2), "only the offset changed"
    cache.batch([])
    ptrs, indptr, last = cache.batch([one])
    assert -1 not in (ptrs[0], indptr[0], last[0])


def test_numbers_and_errors():
    cache = make()
    one, two = cache.add(4), cache.add()
    assert cache.free_pages == 9
    with pytest.raises(kv_cache.OutOfPagesError, match="expected at least 11 free pages, got 9"):
        cache.extend([two, one], [24, 20])
    assert (cache.length(one), cache.length(two), cache.free_pages) == (4, 0, 9)
    with pytest.raises(ValueError, match="expected distinct sequences"):
        cache.extend([one, one])
    with pytest.raises(ValueError, match="expected 2 numbers"):
        cache.extend([one, two], [1])
    with pytest.raises(ValueError, match="expected one that is in the cache, got 7"):
        cache.batch([7])
    with pytest.raises(ValueError, match="num_tokens: expected an integer of at least 0"):
        cache.add(-1)
    many = [cache.add() for _ in range(10)]
    with pytest.raises(ValueError, match=r"expected at most 10 \(num_pages\), got 11"):
        cache.batch([*many, one])
    for change, error in (
        ({"head_dim": 12}, ValueError),
        ({"dtype": "int8"}, TypeError),
        ({"num_pages": 0}, ValueError),
    ):
        arguments = {
            "num_pages": 4,
            "num_layers": 1,
            "num_kv_heads": 1,
            "page_size": 4,
            "head_dim": 8,
            "dtype": "float16",
        }
        with pytest.raises(error, match=next(iter(change))):
            cupy_lora.PagedKvCache(**{**arguments, **change}, device="cpu")


@pytest.mark.gpu
def test_steps_do_not_wait_for_the_device(gpu: Engine):
    """Tables sent behind a long queue: staging memory that a copy still reads is not written again."""
    import cupy

    cache = make(pages=64, device=gpu.device)
    sequences = [cache.add(1) for _ in range(4)]
    seen = []
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        big = cupy.ones((6000, 6000), cupy.float32)
        for _ in range(2):  # what compiles or loads at first use may wait
            big = big @ big * 1e-4
            [table.copy() for table in cache.batch(sequences)]
        for _ in range(8):
            big = big @ big * 1e-4  # keeps the stream busy while the host runs ahead
        for _ in range(20):
            cache.extend(sequences)
            seen.append([table.copy() for table in cache.batch(sequences)])
        assert not stream.done, "the host waited for the device"
        stream.synchronize()
    for step, (_, indptr, last) in enumerate(seen):
        lengths = np.diff(indptr.get()) * 4 - 4 + last.get()
        assert (lengths == step + 2).all()
