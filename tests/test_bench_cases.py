"""What the benchmark's families time: names, figures of record, bytes."""

from __future__ import annotations

import dataclasses

import pytest

from bench import (
    bench_attention,
    bench_bgmv,
    bench_host,
    bench_lora,
    bench_lora_batch,
    bench_lora_weights,
    bench_metadata,
    bench_norm,
    bench_paged_kv,
    bench_sgmv,
    targets,
)

CASE_FAMILIES = [
    bench_lora,
    bench_lora_batch,
    bench_lora_weights,
    bench_bgmv,
    bench_sgmv,
    bench_norm,
    bench_paged_kv,
    bench_metadata,
    bench_attention,
    bench_host,
]


@pytest.mark.parametrize("module", CASE_FAMILIES, ids=lambda module: module.__name__)
def test_case_names_are_unique(module):
    cases = module.cases()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert all(case.family == module.FAMILY for case in cases)
    without_figures = (bench_bgmv, bench_sgmv, bench_lora_weights)
    assert any(case.quick for case in cases) or module in without_figures


def test_every_figure_of_record_has_its_case():
    names = {case.name for case in bench_lora.cases()}
    assert set(targets.LORA) <= names
    norms = {(case.params.rows, case.params.columns) for case in bench_norm.cases() if case.target}
    assert norms == set(targets.NORM)
    appended = {case.params.tokens for case in bench_paged_kv.cases() if case.target}
    assert appended == set(targets.KV_APPEND)
    steps = {(case.params.function, case.params.batch) for case in bench_metadata.cases() if case.target}
    assert steps == set(targets.METADATA)
    attended = {case.name.removesuffix(" rope"): case for case in bench_attention.cases() if case.target}
    assert set(targets.ATTENTION) <= set(attended)
    assert attended["decode 1 context 131072"].target == pytest.approx(179.2, abs=0.2)  # 0.537 GB


def test_other_families_bytes_by_hand():
    assert bench_norm.norm_bytes(bench_norm.Norm(3, 10)) == 2 * (30 + 30 + 10)
    assert bench_norm.norm_bytes(bench_norm.Norm(3, 10, add=True)) == 2 * (4 * 30 + 10)
    append = bench_paged_kv.Append(2, 3, 9, heads=4, head_dim=8)
    assert bench_paged_kv.append_bytes(append) == 2 * (2 * 6 * 4 * 8 * 2)
    decode = bench_attention.Attention((5, 3), heads=2, group=4, head_dim=16)
    assert bench_attention.attention_bytes(decode) == 2 * 16 * (2 * 8 * 2 + 2 * 2 * 8)
    prefill = dataclasses.replace(decode, new=3)
    assert bench_attention.attention_bytes(prefill) == 2 * 16 * (2 * 8 * 2 + 2 * 6 * 8)
    shrink = bench_bgmv.Half("shrink", 4, 8, 32, "one")
    assert bench_bgmv.half_bytes(shrink) == 2 * 8 * 32 + 4 * (4 * 8 + 2 * 32)
    expand = dataclasses.replace(shrink, op="expand")
    assert bench_bgmv.half_bytes(expand) == 2 * 8 * 32 + 4 * (4 * 8 + 4 * 32)


def test_segments_cover_the_rows():
    starts, lengths, owners = bench_sgmv.segments(bench_bgmv.Half("shrink", 10, 8, 32, "seq 4"))
    assert starts.tolist() == [0, 4, 8]
    assert lengths.tolist() == [4, 4, 2]
    assert owners.tolist() == [0, 1, 2]
