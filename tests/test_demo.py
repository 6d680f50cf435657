"""The demo: what it serves, and its command line."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import engines
import numpy as np
import pytest
from demo_runs import edit_config, run_demo
from safetensors.numpy import load_file, save_file

import cupy_lora
from cupy_lora import _demo_model, _drop_in, _merged, _server, load_peft, punica_kernels
from cupy_lora.__main__ import main
from cupy_lora._demo_model import ADAPTERS
from cupy_lora._llama import Llama
from cupy_lora._served import ServedOps
from cupy_lora.demo import DROP_IN, DTYPES

NAMES = sorted(folder.name for folder in ADAPTERS.iterdir())


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
