"""load_peft against adapters that the PEFT library made, and against damaged and unsupported ones."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cupy_lora import LoraWeights, load_peft
from cupy_lora.demo import ADAPTERS
from cupy_lora.peft import CONFIG_FILE, TENSOR_FILE

EXPECTED = json.loads((Path(__file__).parent / "data" / "expected.json").read_text())
NAMES = sorted(set(EXPECTED) - {"prompt", "bare"})
BF16 = np.dtype(ml_dtypes.bfloat16)
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def edit_tensors(folder, change):
    tensors = load_file(folder / TENSOR_FILE)
    change(tensors)
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / TENSOR_FILE)


def raw_tensors(path):
    """Name -> (dtype, shape, bytes), by the format's definition."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return {
        key: (entry["dtype"], tuple(entry["shape"]), content[start:][slice(*entry["data_offsets"])])
        for key, entry in header.items()
    }


# ---- what PEFT made -----------------------------------------------------------------------------
def test_the_adapters_cover_what_they_should():
    assert len(NAMES) >= 5
    assert sorted(folder.name for folder in ADAPTERS.iterdir()) == NAMES
    ranks = {module["rank"] for name in NAMES for module in EXPECTED[name]["modules"].values()}
    assert ranks >= {4, 8, 16, 64}
    files = [*ADAPTERS.rglob("*"), *(Path(__file__).parent / "data").rglob("*")]
    assert sum(file.stat().st_size for file in files if file.is_file()) < 1_000_000


@pytest.mark.parametrize("name", NAMES)
def test_modules_ranks_and_scales_are_those_of_peft(name):
    found = load_peft(ADAPTERS / name)
    got = {key: {"rank": module.rank, "scale": module.scale} for key, module in found.modules.items()}
    assert got == EXPECTED[name]["modules"]
    assert found.unused == ()
    assert not found.fan_in_fan_out


@pytest.mark.parametrize("name", NAMES)
def test_every_stored_bit_is_read(name):
    found = load_peft(ADAPTERS / name)
    raw = raw_tensors(ADAPTERS / name / TENSOR_FILE)
    assert len(raw) == 2 * len(found.modules)
    for module, (a, b, _, _) in found.modules.items():
        for part, tensor in ("A", a), ("B", b):
            dtype, shape, content = raw[f"base_model.model.{module}.lora_{part}.weight"]
            assert tensor.dtype == {"BF16": BF16, "F32": np.float32}[dtype]
            assert tensor.shape == shape
            assert tensor.tobytes() == content
    assert found.nbytes == sum(len(content) for _, _, content in raw.values())


def test_ranks_and_report_name_every_module():
    found = load_peft(ADAPTERS / "rank16-pattern-bf16")
    assert found.ranks == (8, 16, 32)
    lines = found.report().splitlines()
    assert len(lines) == 1 + len(found.modules)
    line = next(line for line in lines if "layers.0.self_attn.q_proj" in line)
    assert " ".join(line.split()) == "model.layers.0.self_attn.q_proj rank 16 scale 1.25 64 -> 128 bfloat16"


def test_layers_come_in_their_numeric_order(adapter):
    def change(tensors):
        for key in [key for key in tensors if ".layers.1." in key]:
            tensors[key.replace(".layers.1.", ".layers.10.")] = tensors[key]

    edit_tensors(adapter, change)
    layers = [int(name.split(".")[2]) for name in load_peft(adapter).modules]
    assert layers == sorted(layers)
    assert set(layers) == {0, 1, 10}


# ---- dtypes -------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", np.float16, BF16])
@pytest.mark.parametrize("name", ["rank4-fp32", "rank64-rslora-bf16"])
def test_dtype_rounds_to_nearest(name, dtype):
    stored, found = load_peft(ADAPTERS / name), load_peft(ADAPTERS / name, dtype=dtype)
    for key, module in found.modules.items():
        for got, source in (module.a, stored.modules[key].a), (module.b, stored.modules[key].b):
            assert got.dtype == np.dtype(dtype)
            assert got.flags.c_contiguous
            np.testing.assert_array_equal(got, source.astype(np.float32).astype(dtype))


@pytest.mark.parametrize("dtype", ["float64", "int8", "bf16", 3.0])
def test_other_dtypes_are_type_errors(adapter, dtype):
    with pytest.raises(TypeError, match=r"^dtype: expected float16 or bfloat16 or float32, got "):
        load_peft(adapter, dtype=dtype)


def test_an_element_that_the_dtype_cannot_hold_is_named(adapter):
    def change(tensors):
        tensors[f"{Q0}.lora_A.weight"][2, 5] = 7e4

    edit_tensors(adapter, change)
    assert load_peft(adapter, dtype="bfloat16").modules
    message = rf"^{Q0}.lora_A.weight: expected finite elements in float16, got inf at \(2, 5\)$"
    with pytest.raises(ValueError, match=message):
        load_peft(adapter, dtype="float16")


def test_a_stored_nan_is_named(adapter):
    edit_tensors(adapter, lambda tensors: tensors[f"{Q0}.lora_B.weight"].fill(np.nan))
    with pytest.raises(ValueError, match=rf"^{Q0}.lora_B.weight: expected finite elements in float32, got nan"):
        load_peft(adapter)


@pytest.mark.parametrize("dtype", [np.int8, np.float64])
def test_a_stored_dtype_without_a_kernel_is_named(adapter, dtype):
    def change(tensors):
        tensors[f"{Q0}.lora_A.weight"] = tensors[f"{Q0}.lora_A.weight"].astype(dtype)

    edit_tensors(adapter, change)
    with pytest.raises(ValueError, match=rf"^{Q0}.lora_A.weight: expected a tensor of F16 or BF16 or F32, got "):
        load_peft(adapter)


# ---- tensors that are refused -------------------------------------------------------------------
def test_a_b_of_another_rank_than_its_a_is_named(adapter):
    def change(tensors):
        tensors[f"{Q0}.lora_B.weight"] = tensors[f"{Q0}.lora_B.weight"][:, :3]

    edit_tensors(adapter, change)
    with pytest.raises(
        ValueError, match=rf"^{Q0}.lora_B.weight: expected shape \(out_features, 4\) .*, got \(128, 3\)"
    ):
        load_peft(adapter)


@pytest.mark.parametrize(
    ("key", "what"),
    [
        (f"{Q0}.lora_magnitude_vector", "a DoRA tensor"),
        (f"{Q0}.lora_magnitude_vector.weight", "a DoRA tensor"),
        (f"{Q0}.lora_B.bias", "a LoRA bias"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "a LoRA of an embedding"),
        ("base_model.model.model.embed_tokens.lora_embedding_B", "a LoRA of an embedding"),
        ("base_model.model.lm_head.modules_to_save.weight", "a module saved whole"),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", "trained token embeddings"),
        ("base_model.model.lm_head.weight", "a tensor of another kind"),
        (f"{Q0}.lora_A.default.weight", "a tensor of another kind"),
        (f"{Q0}.lora_C.weight", "a tensor of another kind"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "a tensor of another kind"),
    ],
)
def test_a_tensor_that_was_not_used_is_named(adapter, key, what):
    edit_tensors(adapter, lambda tensors: tensors.update({key: np.ones((4, 64), np.float32)}))
    with pytest.raises(ValueError, match=rf"^{key}: expected base_model.model.<module>.lora_A.weight .*, got {what}$"):
        load_peft(adapter)


@pytest.mark.parametrize(("there", "missing"), [("A", "B"), ("B", "A")])
def test_half_a_pair_is_named(adapter, there, missing):
    edit_tensors(adapter, lambda tensors: tensors.pop(f"{Q0}.lora_{missing}.weight"))
    message = rf"^{Q0}.lora_{there}.weight: expected lora_{missing}.weight of the same module beside it, got none"
    with pytest.raises(ValueError, match=message):
        load_peft(adapter)


@pytest.mark.parametrize("shape", [(4,), (4, 64, 1, 1), (4, 0), ()])
def test_a_tensor_that_is_no_matrix_is_named(adapter, shape):
    edit_tensors(adapter, lambda tensors: tensors.update({f"{Q0}.lora_A.weight": np.ones(shape, np.float32)}))
    with pytest.raises(ValueError, match=rf"^{Q0}.lora_A.weight: expected .*, got "):
        load_peft(adapter)


# ---- files that are missing or damaged ----------------------------------------------------------
def test_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=rf"expected a folder with {CONFIG_FILE} and {TENSOR_FILE}, got \[\]"):
        load_peft(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match=r"expected a folder with .*, got no such folder"):
        load_peft(tmp_path / "nowhere")


@pytest.mark.parametrize("file", [CONFIG_FILE, TENSOR_FILE])
def test_a_missing_file(adapter, file):
    (adapter / file).unlink()
    with pytest.raises(ValueError, match=r"expected a folder with .*, got \['adapter_"):
        load_peft(adapter)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 0.5, -1])
def test_a_truncated_tensor_file(adapter, keep):
    path = adapter / TENSOR_FILE
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=rf"{TENSOR_FILE}: expected a whole safetensors file, got: "):
        load_peft(adapter)


def test_a_tensor_file_without_a_tensor(adapter):
    save_file({}, adapter / TENSOR_FILE)
    with pytest.raises(ValueError, match="expected LoRA tensors, got a file without a tensor"):
        load_peft(adapter)


def test_safetensors_not_installed(adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(RuntimeError, match=r"safetensors is needed .*pip install 'cupy-lora\[peft\]'"):
        load_peft(adapter)


def test_reading_imports_neither_torch_nor_cupy():
    code = (
        "import sys, cupy_lora\n"
        f"for name in {NAMES}:\n"
        f"    assert cupy_lora.load_peft({str(ADAPTERS)!r} + '/' + name, dtype='bfloat16').modules\n"
        "assert not {'torch', 'cupy', 'jax'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# ---- fused projections --------------------------------------------------------------------------
def test_fuse_leaves_out_what_the_adapter_leaves_alone():
    found = load_peft(ADAPTERS / "rank8-qv-bf16")
    fused = found.fuse_qkv("model.layers.1.self_attn")
    q, v = (found.modules[f"model.layers.1.self_attn.{name}_proj"] for name in "qv")
    assert fused.a[0] is q.a
    assert fused.b[2] is v.b
    assert fused.a[1] is None
    assert fused.b[1] is None
    assert fused.scale == (2.0, 1.0, 2.0)
    assert found.fuse_gate_up("model.layers.1.mlp") is None


def test_fuse_keeps_each_slices_rank_and_scale():
    fused = load_peft(ADAPTERS / "rank16-pattern-bf16").fuse_qkv("model.layers.0.self_attn")
    assert [a.shape[0] for a in fused.a] == [16, 32, 32]
    assert fused.scale == (1.25, 1.0, 1.0)


@pytest.mark.parametrize("names", [(), ("model.layers.0.mlp.up_proj",) * 2])
def test_fuse_needs_distinct_names(names):
    with pytest.raises(ValueError, match="names: expected one distinct module per slice"):
        load_peft(ADAPTERS / "rank4-fp32").fuse(*names)


def test_fuse_refuses_modules_of_different_inputs():
    message = r"^model.layers.0.mlp.down_proj: expected in_features and dtype as in model.layers.0.mlp.up_proj, \(64, "
    with pytest.raises(ValueError, match=message):
        load_peft(ADAPTERS / "rank4-fp32").fuse("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj")


def test_load_into_fills_and_empties_a_slot():
    weights = LoraWeights(64, (128, 64, 64), max_adapters=2, dtype="bfloat16", device="cpu")
    names = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    pattern, regex = (load_peft(ADAPTERS / name) for name in ("rank16-pattern-bf16", "rank8-regex-fp32"))
    assert pattern.load_into(weights, 1, *names)
    assert weights.ranks == ((0, 0, 0), (16, 32, 32))
    assert [part.scale for part in weights.slot(1)] == [1.25, 1.0, 1.0]
    np.testing.assert_array_equal(weights.slot(1)[0].a, pattern.modules[names[0]].a)
    assert not regex.load_into(weights, 1, *names)  # it has layer 1 only
    assert weights.ranks == ((0, 0, 0), (0, 0, 0))


def test_load_into_a_layer_of_one_slice():
    weights = LoraWeights(128, 64, max_adapters=1, dtype="float16", device="cpu")
    assert load_peft(ADAPTERS / "rank4-fp32").load_into(weights, 0, "model.layers.1.mlp.down_proj")
    assert weights.ranks == (4,)
