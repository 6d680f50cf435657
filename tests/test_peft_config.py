"""What load_peft reads in an adapter's config: scales and patterns by PEFT's rules, and what it refuses by name."""

import json
import math

import pytest

from cupy_lora import load_peft
from cupy_lora.peft import CONFIG_FILE


def edit(folder, **changes):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---- scales and patterns ------------------------------------------------------------------------
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [8, 0.3, 1, 0])
def test_scale(adapter, alpha, rslora):
    edit(adapter, lora_alpha=alpha, use_rslora=rslora)
    scales = {module.scale for module in load_peft(adapter).modules.values()}
    assert scales == {alpha / (math.sqrt(4) if rslora else 4)}


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("q_proj", ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
        ("proj", []),
        (".*proj", ["0.self_attn.q_proj", "1.self_attn.q_proj", "0.mlp.up_proj"]),
        (".*q_proj|up_proj", ["0.self_attn.q_proj", "1.self_attn.q_proj", "0.mlp.up_proj"]),
        ("layers.0.self_attn.q_proj", ["0.self_attn.q_proj"]),
        (r"layers\.[01]\.self_attn\.q_proj", ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
        ("model.layers.0.self_attn.q_proj", ["0.self_attn.q_proj"]),
        ("^model.layers.0.self_attn.q_proj", ["0.self_attn.q_proj"]),
        ("^layers.0.self_attn.q_proj", []),
        ("yers.0.self_attn.q_proj", []),
        ("self_attn", []),
    ],
)
def test_patterns_match_from_a_dot_to_the_end(adapter, pattern, matched):
    edit(adapter, alpha_pattern={pattern: 40})
    found = load_peft(adapter)
    checked = ["0.self_attn.q_proj", "1.self_attn.q_proj", "0.mlp.up_proj"]
    assert [name for name in checked if found.modules[f"model.layers.{name}"].scale == 10.0] == matched
    assert found.unused == (() if matched else (f"alpha_pattern: {pattern}",))


def test_the_first_pattern_that_matches_wins(adapter):
    edit(adapter, alpha_pattern={"q_proj": 40, "layers.0.self_attn.q_proj": 80})
    found = load_peft(adapter)
    assert found.modules["model.layers.0.self_attn.q_proj"].scale == 10.0
    assert found.unused == ("alpha_pattern: layers.0.self_attn.q_proj",)


def test_config_entries_without_a_tensor_are_reported(adapter):
    edit(adapter, target_modules=[*json.loads((adapter / CONFIG_FILE).read_text())["target_modules"], "lm_head"])
    found = load_peft(adapter)
    assert found.unused == ("target_modules: lm_head",)
    assert found.report().splitlines()[-1] == "  matched no tensor: target_modules: lm_head"


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_dropout": 0.1, "peft_version": "0.99", "inference_mode": False, "task_type": None},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"qalora_group_size": 32, "megatron_core": "x", "loftq_config": {"loftq_bits": 4}},
        {"a_setting_of_a_later_version": None, "another": False, "a_third": [], "a_fourth": {}},
        {"target_modules": "all-linear"},
        {"target_modules": r"model\.layers\.\d+\.(mlp|self_attn)\.\w+_proj"},
        {"fan_in_fan_out": True},
        {"layers_to_transform": [0, 1]},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"exclude_modules": ["lm_head"]},
        {"lora_alpha": 8.0},
    ],
)
def test_settings_that_change_no_result_are_accepted(adapter, changes):
    before = load_peft(adapter)
    edit(adapter, **changes)
    after = load_peft(adapter)
    assert after.fan_in_fan_out == bool(changes.get("fan_in_fan_out"))
    assert {name: (m.rank, m.scale) for name, m in after.modules.items()} == {
        name: (m.rank, m.scale) for name, m in before.modules.items()
    }


# ---- configs that are refused -------------------------------------------------------------------
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [5]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1e-4}),
        ("velora_config", {"num_groups": 4}),
        ("monteclora_config", {"num_samples": 4}),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
        ("ensure_weight_tying", True),
        ("a_setting_of_a_later_version", 1),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "mica"),
        ("init_lora_weights", 1),
        ("peft_type", "IA3"),
        ("peft_type", None),
        ("r", 0),
        ("r", -4),
        ("r", "4"),
        ("r", 4.0),
        ("r", True),
        ("r", None),
        ("lora_alpha", None),
        ("lora_alpha", "8"),
        ("lora_alpha", True),
        ("lora_alpha", float("inf")),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 2e39),
        ("use_rslora", "yes"),
        ("fan_in_fan_out", 1),
        ("target_modules", None),
        ("target_modules", []),
        ("target_modules", [1]),
        ("target_modules", "(q_proj"),
        ("exclude_modules", "(q_proj"),
        ("rank_pattern", [4]),
        ("rank_pattern", {"q_proj": "4"}),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"(q_proj": 4}),
        ("alpha_pattern", {"q_proj": None}),
        ("alpha_pattern", {"q_proj": float("inf")}),
        ("layers_to_transform", ["0"]),
        ("layers_pattern", ["(layers"]),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused_by_name(adapter, key, value):
    edit(adapter, **{key: value})
    with pytest.raises(ValueError, match=rf"{CONFIG_FILE}: {key}\b.*: expected .*, got "):
        load_peft(adapter)


def test_layers_to_transform_beside_a_regular_expression_is_refused(adapter):
    edit(adapter, target_modules=r".*_proj", layers_to_transform=[0, 1])
    with pytest.raises(ValueError, match="layers_to_transform: expected null where target_modules is a string"):
        load_peft(adapter)


@pytest.mark.parametrize(
    ("changes", "module", "why"),
    [
        ({"target_modules": ["q_proj"]}, "layers.0.mlp.down_proj", "target_modules"),
        ({"target_modules": ["proj"]}, "layers.0.mlp.down_proj", "target_modules"),
        ({"target_modules": r"layers\.0.*"}, "layers.0.mlp.down_proj", "target_modules"),
        ({"exclude_modules": ["o_proj"]}, "layers.0.self_attn.o_proj", "exclude_modules"),
        ({"exclude_modules": r".*\.1\..*"}, "layers.1.mlp.down_proj", "exclude_modules"),
        ({"layers_to_transform": [0]}, "layers.1.mlp.down_proj", "layers_to_transform"),
        ({"layers_to_transform": 1}, "layers.0.mlp.down_proj", "layers_to_transform"),
        ({"layers_to_transform": [0, 1], "layers_pattern": ["h"]}, "layers.0.mlp.down_proj", "layers_to_transform"),
    ],
)
def test_a_tensor_that_peft_would_leave_out_is_named(adapter, changes, module, why):
    edit(adapter, **changes)
    with pytest.raises(ValueError, match=rf"^base_model.model.model.{module}.lora_A.weight: expected .*{why} .*, got "):
        load_peft(adapter)


def test_a_rank_that_disagrees_with_a_tensor_is_named(adapter):
    edit(adapter, r=8)
    message = r"lora_A.weight: expected shape \(8, in_features\) \(r = 8 by the config\), got \(4, "
    with pytest.raises(ValueError, match=message):
        load_peft(adapter)


def test_a_rank_pattern_that_disagrees_with_a_tensor_is_named(adapter):
    edit(adapter, rank_pattern={"layers.1.self_attn.k_proj": 2})
    with pytest.raises(ValueError, match=r"layers.1.self_attn.k_proj.lora_A.weight: expected shape \(2, in_features\)"):
        load_peft(adapter)


@pytest.mark.parametrize(("content", "got"), [(b'{"r": 4', "JSON"), (b"[]", "a JSON object"), (b"\xff\xfe", "JSON")])
def test_a_damaged_config(adapter, content, got):
    (adapter / CONFIG_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{CONFIG_FILE}: expected {got}, got"):
        load_peft(adapter)
