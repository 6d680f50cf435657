"""The demo's verdicts: what is wrong in any call that it makes fails it."""

import re

import numpy as np
import pytest
from demo_runs import run_demo

import cupy_lora
from cupy_lora import punica_kernels
from cupy_lora._merged import Verdict


def failed(capsys, *arguments):
    """What the demo said, which must be that requests disagree."""
    assert run_demo(*arguments) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "are further from their merged model than rounding" in text
    return text


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
    failed(capsys, "--dtype", "bfloat16", "--tokens", "4", "--requests", "6")  # the coarser dtype hides more


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
    failed(capsys, "--tokens", "6", "--requests", "7", "--admit", "3")


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
    text = failed(capsys, "--tokens", "4", "--requests", "6")
    assert re.search(r"\['r0\d by punica_kernels'", text), "the served requests themselves are right"


def test_a_nan_never_passes():
    assert not Verdict(float("nan"), 1.0, 1.0).passed
    assert not Verdict(0.0, float("nan"), 1.0).passed
    assert Verdict(0.0, 0.0, 0.0).passed
