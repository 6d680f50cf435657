"""The demo: its model against transformers, its verdicts right and wrong, its command line."""

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import engines
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import cupy_lora
from cupy_lora import _demo_model, _drop_in, _llama, _merged, _server, load_peft, punica_kernels
from cupy_lora.__main__ import main
from cupy_lora._demo_model import ADAPTERS, DEMO_CONFIG
from cupy_lora._llama import Batch, Llama, LlamaConfig, Ops, forward, from_float32, read_config, to_float32
from cupy_lora._merged import MergedOps, Verdict
from cupy_lora._served import ServedOps
from cupy_lora.demo import DROP_IN, DTYPES

EXPECTED = json.loads((Path(__file__).parent / "data" / "expected.json").read_text())
FLOAT32 = np.dtype(np.float32)
NAMES = sorted(folder.name for folder in ADAPTERS.iterdir())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    _demo_model.write_demo_model(path)
    return path


@pytest.fixture
def model_copy(checkpoint, tmp_path):
    """A checkpoint to be damaged."""
    path = tmp_path / "model"
    shutil.copytree(checkpoint, path)
    return path


@pytest.fixture
def cache(checkpoint, tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cupy_lora"


def edit_config(path, **changes):
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**content, **changes}))


def run_demo(*arguments):
    return main(["demo", "--device", "cpu", *arguments])


# ---- the model ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["bare", *NAMES])
def test_merged_logits_are_those_of_transformers_and_peft(checkpoint, name):
    model = Llama.read(checkpoint, np, FLOAT32)
    ops = MergedOps(model, FLOAT32, None if name == "bare" else load_peft(ADAPTERS / name))
    prompt = np.array(EXPECTED["prompt"])
    n = len(prompt)
    batch = Batch(prompt, [ops.open(n)], [0, n])
    got, want = forward(ops, batch, np.array([n - 1]))[0], np.array(EXPECTED[name]["logits"])
    # 16 float32 roundings on the way from the embedding to a logit, each on sums of about the logits' size.
    np.testing.assert_allclose(got, want, rtol=0, atol=16 * np.finfo(np.float32).eps * np.abs(want).max())


def test_tokens_one_by_one_give_the_logits_of_the_whole(checkpoint):
    model = Llama.read(checkpoint, np, FLOAT32)
    ops = Ops(model)
    tokens = np.array(EXPECTED["prompt"])
    n = len(tokens)
    whole = forward(ops, Batch(tokens, [ops.open(n)], [0, n]), np.arange(n))
    cache = ops.open(n)
    for i in range(n):
        batch = Batch(tokens[i : i + 1], [cache], [0, 1])
        np.testing.assert_allclose(forward(ops, batch, np.array([0]))[0], whole[i], rtol=0, atol=3e-5)


def test_sequences_of_a_batch_do_not_see_each_other(checkpoint):
    model = Llama.read(checkpoint, np, FLOAT32)
    ops = Ops(model)
    prompts = [[1, 2, 3], [200], [7, 7, 9, 11, 250]]
    bounds = np.cumsum([0, *map(len, prompts)])
    caches = [ops.open(len(prompt)) for prompt in prompts]
    together = forward(ops, Batch(np.concatenate(prompts), caches, bounds.tolist()), bounds[1:] - 1)
    for row, prompt in zip(together, prompts, strict=True):
        n = len(prompt)
        alone = Batch(np.array(prompt), [ops.open(n)], [0, n])
        np.testing.assert_allclose(row, forward(ops, alone, np.array([n - 1]))[0], rtol=0, atol=3e-5)


def test_the_checkpoint_has_the_same_bits_everywhere():
    digest = hashlib.sha256()
    for name, tensor in _demo_model.demo_tensors().items():
        digest.update(name.encode() + tensor.tobytes())
    assert digest.hexdigest() == "cd14e5169e626e154779ce7c4b1f25772ff80af2f82a2b6600324dc3f4248ece"


def test_a_checkpoint_that_was_cut_short_is_written_again(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(json, "dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        _demo_model.write_demo_model(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    _demo_model.write_demo_model(tmp_path)
    assert read_config(tmp_path) == DEMO_CONFIG


def test_rounding_is_that_of_ml_dtypes():
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    corners = np.array([0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FFFFFFF, 0x7FC00000, 0x7F800001, 0x3F808000, 0x3F818000])
    values = np.concatenate([bits, corners.astype(np.uint32), corners.astype(np.uint32) + 1]).view(np.float32)
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    got = from_float32(np, values, bfloat16)
    with np.errstate(all="ignore"):
        want = values.astype(bfloat16)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(got.view(np.uint16)[number], want.view(np.uint16)[number])
    assert np.isnan(got[~number].astype(np.float32)).all()
    np.testing.assert_array_equal(to_float32(np, got), got.astype(np.float32))


def test_llama3_rotary_frequencies():
    config = LlamaConfig(8, 64, 64, 1, 1, 1, 64, rope_theta=5e5, rope_llama3=(8.0, 1.0, 4.0, 8192.0))
    for i, got in enumerate(config.inverse_frequencies()):
        freq = 5e5 ** (-2 * i / 64)
        wavelength = 2 * math.pi / freq
        if wavelength < 8192 / 4:
            want = freq
        elif wavelength > 8192 / 1:
            want = freq / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            want = (1 - smooth) * freq / 8 + smooth * freq
        assert got == pytest.approx(want, rel=1e-12)


# ---- reading checkpoints ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "qwen2"),
        ("model_type", None),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("quantization_config", {"bits": 4}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
    ],
)
def test_a_model_of_another_shape_is_refused(model_copy, key, value):
    edit_config(model_copy, **{key: value})
    with pytest.raises(ValueError, match=rf"config.json: {key}: expected .*, got "):
        read_config(model_copy)


def test_a_config_without_a_size_is_refused(model_copy):
    content = json.loads((model_copy / "config.json").read_text())
    del content["hidden_size"]
    (model_copy / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"config.json: hidden_size: expected a number, got None"):
        read_config(model_copy)


@pytest.mark.parametrize("content", [None, b"{", b"\xff"])
def test_a_missing_or_damaged_config(model_copy, content):
    (model_copy / "config.json").unlink()
    if content is not None:
        (model_copy / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config.json: expected the config of a model, got: "):
        read_config(model_copy)


def test_llama3_rope_is_read_in_both_spellings(model_copy):
    entries = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    edit_config(model_copy, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **entries})
    old = read_config(model_copy)
    edit_config(model_copy, rope_scaling=None, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **entries})
    assert read_config(model_copy) == old
    assert (old.rope_theta, old.rope_llama3) == (5e5, (8.0, 1.0, 4.0, 8192.0))


def change_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_a_missing_tensor_is_named(model_copy):
    change_tensors(model_copy, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"model.norm.weight: expected a tensor of shape \(64,\), got none"):
        Llama.read(model_copy, np, FLOAT32)


def test_a_tensor_of_another_shape_is_named(model_copy):
    change_tensors(model_copy, lambda tensors: tensors.update({"model.norm.weight": np.ones(65, np.float32)}))
    with pytest.raises(ValueError, match=r"model.norm.weight: expected shape \(64,\), got \(65,\)"):
        Llama.read(model_copy, np, FLOAT32)


def test_a_tensor_too_many_is_named(model_copy):
    bias = {"model.layers.0.self_attn.q_proj.bias": np.ones(128, np.float32)}
    change_tensors(model_copy, lambda tensors: tensors.update(bias))
    with pytest.raises(ValueError, match=r"expected the tensors of a Llama model, got .*q_proj.bias too"):
        Llama.read(model_copy, np, FLOAT32)


def test_shards_and_tied_embeddings(model_copy):
    tensors = load_file(model_copy / "model.safetensors")
    whole = Llama.read(model_copy, np, FLOAT32)
    del tensors["lm_head.weight"]
    (model_copy / "model.safetensors").unlink()
    keys = sorted(tensors)
    shards = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, model_copy / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (model_copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    edit_config(model_copy, tie_word_embeddings=True)
    tied = Llama.read(model_copy, np, FLOAT32)
    assert tied.head is tied.embed
    for got, want in zip(tied.layers, whole.layers, strict=True):
        assert all(np.array_equal(got.weight[group], want.weight[group]) for group in _llama.GROUPS)


# ---- verdicts -----------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=sorted(DTYPES))
def served(request, checkpoint):
    """The demo's requests, served on the CPU in each dtype: what check() needs."""
    dtype = DTYPES[request.param]
    model = Llama.read(checkpoint, np, dtype)
    adapters = [load_peft(ADAPTERS / name) for name in NAMES]
    requests = _server.make_requests(12, len(adapters), 256)
    rounded = [load_peft(ADAPTERS / name, dtype=dtype) for name in NAMES]
    ops = ServedOps(model, dtype, rounded, 500, _server.room_for(requests, 8))
    _server.serve(ops, requests, 8, 5)
    return model, dtype, adapters, requests


def test_every_request_agrees_and_every_adapter_shows(served):
    model, dtype, adapters, requests = served
    verdicts = _merged.check(model, dtype, adapters, requests)
    assert sorted(verdicts) == [request.name for request in requests]
    for request in requests:
        verdict = verdicts[request.name]
        assert verdict.passed, (request.name, verdict)
        assert 0 < verdict.noise < 0.3
        if request.adapter >= 0:
            assert verdict.effect > 8 * verdict.tolerance
        else:
            assert verdict.effect == 0


@pytest.mark.simt
@pytest.mark.slow
def test_the_cuda_sources_serve_the_demo(checkpoint, monkeypatch):
    dtype = DTYPES["float16"]
    model = Llama.read(checkpoint, np, dtype)
    adapters = [load_peft(ADAPTERS / name) for name in NAMES]
    requests = _server.make_requests(6, len(adapters), 256)
    for request in requests:
        del request.prompt[4:]
        request.shared = 2
    monkeypatch.setattr(_server, "CHUNK", 3)
    with engines.running("simt"):
        _server.serve(ServedOps(model, dtype, adapters, 24, _server.room_for(requests, 2)), requests, 2, 3)
    verdicts = _merged.check(model, dtype, adapters, requests)
    assert {name: verdict for name, verdict in verdicts.items() if not verdict.passed} == {}


def test_an_adapter_changes_the_tokens(served):
    _, _, _, requests = served
    same_prompt = [request for request in requests if request.prompt == requests[0].prompt]
    assert len({request.adapter for request in same_prompt}) > 1
    assert len({tuple(request.tokens) for request in same_prompt}) == len(same_prompt)


def test_a_step_mixes_prompts_and_single_tokens_of_many_adapters(checkpoint, monkeypatch):
    model = Llama.read(checkpoint, np, DTYPES["float16"])
    requests = _server.make_requests(8, len(NAMES), 256)
    adapters = [load_peft(ADAPTERS / name) for name in NAMES]
    ops = ServedOps(model, DTYPES["float16"], adapters, 500, _server.room_for(requests, 4))
    seen = []
    begin = ops.begin

    def watch(batch):
        seen.append((np.diff(batch.bounds).tolist(), ops.schedule.indices[: batch.bounds[-1]].tolist(), batch))
        begin(batch)

    monkeypatch.setattr(ops, "begin", watch)
    answered = []
    _server.serve(ops, requests, 4, 6, answered.append)
    assert sum(answered) == 8 * 4
    lengths = [len(request.prompt) for request in requests]
    assert max(lengths[:6]) > 32 >= min(lengths[:6])
    # First the chunks of six prompts; then what is left of them, or a token, beside the chunks of two more: the system
    # prompts of theirs are in the cache.
    assert seen[0][0] == [min(length, 32) for length in lengths[:6]]
    assert seen[1][0] == [max(length - 32, 1) for length in lengths[:6]] + [
        min(length - requests[0].shared, 32) for length in lengths[6:]
    ]
    assert seen[1][1] == np.repeat([-1, 0, 1, 2, 3, 4, -1, 0], seen[1][0]).tolist()
    assert any(batch.single for *_, batch in seen)
    assert all(len(request.tokens) == len(request.logits) == 4 for request in requests)
    assert ops.cache.free_pages == ops.cache.num_pages  # every request gave its slots back


def test_requests_of_an_adapter_share_the_slots_of_the_system_prompt(checkpoint):
    model = Llama.read(checkpoint, np, DTYPES["float16"])
    requests = _server.make_requests(12, len(NAMES), 256)
    ops = ServedOps(model, DTYPES["float16"], [load_peft(ADAPTERS / name) for name in NAMES], 500, 3000)
    server = _server.Server(ops, 100, 4)
    server.admit(requests[:6])
    server.admit(requests[6:7])  # the system prompt of the bare model is not in the cache yet
    shared = requests[0].shared
    assert [row.cached for row in server.rows] == [0] * 7
    server.step()
    server.admit(requests[7:8])
    tables = server.block_tables
    assert server.rows[7].cached == shared
    assert (tables[7, :shared] == tables[1, :shared]).all()
    rows = [set(tables[i, : server.rows[i].size].tolist()) for i in range(8)]
    for i, one in enumerate(rows):
        for k, other in enumerate(rows[:i]):
            assert len(one & other) == (shared if (i, k) == (7, 1) else 0)
    server.retire([7, 2])
    assert (server.block_tables[0, : server.rows[0].size] == tables[7, : server.rows[0].size]).all()
    assert (server.block_tables[1, : server.rows[1].size] == tables[2, : server.rows[1].size]).all()
    server.retire([])
    server.close()
    assert ops.cache.free_pages == ops.cache.num_pages


def wrong_scale(real):
    return lambda y, x, weights, batch: real(y, x, weights, batch, scale=1.1)


def no_update(real):
    return lambda y, x, weights, batch: y


def neighbours_adapter(real):
    def add(y, x, weights, batch):
        batch.update(np.where(batch.indices[: len(y)] == 0, 1, batch.indices[: len(y)]))
        return real(y, x, weights, batch)

    return add


def one_nan(real):
    def add(y, x, weights, batch):
        real(y, x, weights, batch)
        y[0, 0] = np.nan
        return y

    return add


def update_for_the_bare_model(real):
    def add(y, x, weights, batch):
        batch.update(np.maximum(batch.indices[: len(y)], 0))
        return real(y, x, weights, batch)

    return add


@pytest.mark.parametrize("fault", [wrong_scale, no_update, neighbours_adapter, one_nan, update_for_the_bare_model])
def test_a_fault_in_add_lora_fails_the_demo(cache, monkeypatch, capsys, fault):
    monkeypatch.setattr(cupy_lora, "add_lora", fault(cupy_lora.add_lora), raising=False)
    assert run_demo("--dtype", "bfloat16", "--tokens", "4", "--requests", "6") == 1  # the coarser dtype hides more
    assert "are further from their merged model than rounding" in " ".join(capsys.readouterr().out.split())


def nothing(real):
    return lambda *args, **kwargs: None


def positions_one_on(real):
    def prepare(*args, **kwargs):
        real(*args, **kwargs)
        positions = kwargs["position_ids"] if kwargs else args[4]
        positions += 1

    return prepare


def entries_moved_on(real):
    def ragged(**kwargs):
        out = real(**kwargs)
        out[:] = np.roll(out, 1)
        return out

    return ragged


def slots_of_others(real):
    return lambda longest, cu, tables, slots: real(longest, cu, tables, slots[::-1].copy())


def slots_of_the_first(real):
    return lambda longest, slots, filtered, cu, starts: real(longest, slots, filtered, cu, starts * 0)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("copy_next_input_ids_inplace", nothing),
        ("prepare_position_slot_ids", positions_one_on),
        ("prepare_decode_step", positions_one_on),
        ("block_tables_to_ragged", entries_moved_on),
        ("block_tables_to_padded", slots_of_others),
        ("slots_filtering", slots_of_the_first),
        ("append_kv", nothing),
        ("init_kv", nothing),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # nothing stored: what is in the memory is read
def test_a_fault_in_the_tables_fails_the_demo(cache, monkeypatch, capsys, name, fault):
    monkeypatch.setattr(cupy_lora, name, fault(getattr(cupy_lora, name)), raising=False)
    assert run_demo("--tokens", "6", "--requests", "7", "--admit", "3") == 1
    assert "are further from their merged model than rounding" in " ".join(capsys.readouterr().out.split())


# ---- through the drop-in module ------------------------------------------------------------------
def test_every_request_agrees_through_the_drop_in_module(served):
    model, dtype, adapters, requests = served
    again = _drop_in.again(model, dtype, adapters, requests)
    assert [len(request.logits) for request in again] == [8] * len(requests)
    verdicts = _merged.check(model, dtype, adapters, again)
    assert {name: verdict for name, verdict in verdicts.items() if not verdict.passed} == {}
    assert any(not np.array_equal(one.logits, other.logits) for one, other in zip(requests, again, strict=True))


def test_the_demo_calls_every_function_of_the_drop_in_module(served, monkeypatch):
    model, dtype, adapters, requests = served
    called = []
    for name in punica_kernels.__all__:
        real = getattr(punica_kernels, name)

        def watched(*args, real=real, name=name):
            called.append((name, *(arg.shape for arg in args[:2] if hasattr(arg, "shape"))))
            return real(*args)

        monkeypatch.setattr(punica_kernels, name, watched)
    _drop_in.again(model, dtype, adapters, requests[:DROP_IN])
    assert {name for name, *_ in called} == set(punica_kernels.__all__)
    ranks = {min(y[1], x[1]) for name, y, x in (call for call in called if call[0] == "dispatch_bgmv")}
    assert ranks == {4, 8, 16, 32}  # one rank in all layers: k_proj of layer 1, of rank 16, is padded to 32


@pytest.mark.simt
@pytest.mark.slow
def test_the_cuda_sources_serve_the_drop_in_module(checkpoint):
    dtype = DTYPES["float16"]
    model = Llama.read(checkpoint, np, dtype)
    adapters = [load_peft(ADAPTERS / name) for name in NAMES]
    requests = _server.make_requests(2, len(adapters), 256)  # the bare model, and ranks 8, 16 and 32
    for request in requests:
        del request.prompt[4:]
        request.tokens = [65, 66]
    with engines.running("simt"):
        again = _drop_in.again(model, dtype, adapters, requests)
    verdicts = _merged.check(model, dtype, adapters, again)
    assert {name: verdict for name, verdict in verdicts.items() if not verdict.passed} == {}


def next_layer(real):
    return lambda *args: real(*args[:-1], 1 - args[-1])


def twice(real):
    return lambda *args: [real(*args) for _ in range(2)]


def half_as_much(real):
    def norm(out, *args):
        real(out, *args)
        out *= 0.5

    return norm


def queries_of_others(real):
    return lambda o, q, *args: real(o, q[::-1].copy(), *args)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("dispatch_bgmv", nothing),
        ("dispatch_bgmv", twice),
        ("sgmv_cutlass", nothing),
        ("sgmv_cutlass", next_layer),
        ("sgmv_shrink", nothing),
        ("sgmv_shrink", next_layer),
        ("rms_norm", half_as_much),
        ("init_kv", nothing),
        ("append_kv", nothing),
        ("batch_prefill", queries_of_others),
        ("batch_decode", queries_of_others),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # nothing stored: what is in the memory is read
def test_a_fault_in_the_drop_in_module_fails_the_demo(cache, monkeypatch, capsys, name, fault):
    monkeypatch.setattr(punica_kernels, name, fault(getattr(punica_kernels, name)))
    assert run_demo("--tokens", "4", "--requests", "6") == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "are further from their merged model than rounding" in text
    assert re.search(r"\['r0\d by punica_kernels'", text), "the served requests themselves are right"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_theta": 5e5}, "this model by 500000"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }
            },
            "this model by llama3's rule",
        ),
    ],
)  # fmt: skip
def test_a_model_that_the_drop_in_module_cannot_rotate_is_named(model_copy, capsys, changes, reason):
    edit_config(model_copy, **changes)
    adapter = ADAPTERS / "rank4-fp32"
    assert run_demo("--model", str(model_copy), "--adapter", f"x={adapter}", "--tokens", "2", "--requests", "2") == 0
    assert f"nothing through cupy_lora.punica_kernels: its attention rotates by theta 10000, {reason}" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_nan_never_passes():
    assert not Verdict(float("nan"), 1.0, 1.0).passed
    assert not Verdict(0.0, float("nan"), 1.0).passed
    assert Verdict(0.0, 0.0, 0.0).passed


# ---- the command --------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_the_demo_passes(cache, capsys, dtype):
    assert run_demo("--dtype", dtype) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.endswith(" ok")]
    assert len(rows) >= 16
    assert {row[1] for row in rows} == {"(none)", *NAMES}
    assert all(row[-5].endswith("+32") or row[-6].endswith("+32") for row in rows)
    assert f"all {len(rows)} requests agree with their merged model within the rounding of {dtype}" in lines[-1]
    assert lines[-3] == "r00, r01, r02 again through cupy_lora.punica_kernels, by LoRAX's calls:"
    difference, allowed = re.fullmatch(r"difference (\S+), allowed (\S+)", lines[-2]).groups()
    assert 0 < float(difference) < float(allowed)
    assert (cache / "demo-llama-1" / "config.json").is_file()


def test_the_second_run_takes_the_model_from_the_cache(cache, monkeypatch):
    assert run_demo("--requests", "1", "--tokens", "1") == 0
    monkeypatch.setattr(_demo_model, "demo_tensors", None)
    assert run_demo("--requests", "1", "--tokens", "1") == 0


def test_a_model_and_adapters_of_ones_own(checkpoint, capsys):
    arguments = ["--model", str(checkpoint), "--tokens", "2", "--requests", "3"]
    for name in "rank4-fp32", "rank8-qv-bf16":
        arguments += ["--adapter", f"mine-{name}={ADAPTERS / name}"]
    assert run_demo(*arguments) == 0
    assert {"mine-rank4-fp32", "mine-rank8-qv-bf16"} <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "name"], "--adapter: expected NAME=DIR"),
        (["--adapter", "=x"], "--adapter: expected NAME=DIR"),
        (["--adapter", "x=a", "--adapter", "x=b"], "--adapter: expected NAME=DIR with a name of its own"),
        (["--adapter", "x=/nowhere"], "expected a folder with adapter_config.json"),
        (["--model", "/nowhere"], "expected at least one NAME=DIR with --model"),
        (["--model", "/nowhere", "--adapter", "x=y"], "expected the config of a model"),
        (["--requests", "0"], "--requests: expected a positive number, got 0"),
        (["--tokens", "-1"], "--tokens: expected a positive number, got -1"),
        (["--admit", "0"], "--admit: expected a positive number, got 0"),
    ],
)
def test_wrong_arguments(cache, capsys, arguments, message):
    assert run_demo(*arguments) == 2
    assert message in capsys.readouterr().err


def test_an_adapter_of_a_module_that_the_model_lacks_is_refused(cache, tmp_path, capsys):
    folder = tmp_path / "adapter"
    shutil.copytree(ADAPTERS / "rank4-fp32", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key.replace("layers.1.", "layers.7."): value for key, value in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    assert run_demo("--adapter", f"x={folder}") == 2
    error = capsys.readouterr().err
    assert "expected adapters of modules that the model has, got model.layers.7." in error


def test_an_adapter_of_other_widths_is_refused(cache, tmp_path, capsys):
    folder = tmp_path / "adapter"
    shutil.copytree(ADAPTERS / "rank4-fp32", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    save_file({**tensors, key: np.ascontiguousarray(tensors[key][:, :-1])}, folder / "adapter_model.safetensors")
    assert run_demo("--adapter", f"x={folder}") == 2
    assert "expected shape (rank, 128), got (4, 127)" in capsys.readouterr().err


def test_gpu_asked_for_where_there_is_none(cache, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert main(["demo", "--device", "gpu"]) == 2
    assert "--device: expected a machine with a GPU and CuPy, got one with no CuPy" in capsys.readouterr().err
    assert main(["demo", "--requests", "1", "--tokens", "1"]) == 0
    assert "CPU, NumPy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "extra"), [("rich.console", "demo"), ("safetensors", "peft"), ("safetensors.numpy", "peft")]
)
def test_a_missing_package_is_named_with_its_extra(cache, capsys, monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    assert run_demo() == 2
    assert f"pip install 'cupy-lora[{extra}]'" in capsys.readouterr().err


def test_info_names_versions_switches_and_paths(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for part in (cupy_lora.__version__, np.__version__, "device", "cache", "DISABLE_SGMV", "CUPY_LORA_DEBUG"):
        assert part in text
    for rank in (1, 16, 512):
        line = next(line for line in text.splitlines() if line.startswith(f"  rank {rank} "))
        assert line.count("cluster") == 3  # one batch each


def test_info_knows_the_loop(capsys, monkeypatch):
    monkeypatch.setenv("DISABLE_SGMV", "1")
    assert main(["info"]) == 0
    assert "any rank  a loop of matrix products (DISABLE_SGMV)" in capsys.readouterr().out


def test_the_command_runs_as_a_module_without_torch():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['cupy_lora', 'info']\n"
        "try:\n"
        "    runpy.run_module('cupy_lora', run_name='__main__')\n"
        "except SystemExit as done:\n"
        "    assert done.code == 0\n"
        "assert not {'torch', 'jax'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], capture_output=True)


# ---- on a GPU -----------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_the_demo_passes_on_the_gpu_without_torch(cache, dtype):
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from cupy_lora.__main__ import main\n"
        f"sys.exit(main(['demo', '--device', 'gpu', '--dtype', {dtype!r}]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 18 requests agree" in done.stdout
