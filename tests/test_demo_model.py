"""The demo's model against transformers, and the checkpoints that it reads or refuses."""

import hashlib
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from demo_runs import edit_config
from safetensors.numpy import load_file, save_file

from cupy_lora import _demo_model, _llama, load_peft
from cupy_lora._demo_model import ADAPTERS, DEMO_CONFIG
from cupy_lora._llama import Batch, Llama, LlamaConfig, Ops, forward, from_float32, read_config, to_float32
from cupy_lora._merged import MergedOps

EXPECTED = json.loads((Path(__file__).parent / "data" / "expected.json").read_text())
FLOAT32 = np.dtype(np.float32)
NAMES = sorted(folder.name for folder in ADAPTERS.iterdir())


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
