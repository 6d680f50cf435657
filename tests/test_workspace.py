"""The kernels' scratch memory: one piece a stream, also for streams that are first met under capture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from cupy_lora import _device, _workspace


@dataclass
class Stream:
    ptr: int
    captured: bool = False


@pytest.fixture(autouse=True)
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_workspace, "_of_stream", {})
    monkeypatch.setattr(_workspace, "_spare", {})
    monkeypatch.setattr(_workspace, "_new", lambda nbytes, device: object())
    monkeypatch.setattr(_device, "capturing", lambda stream: stream.captured)


def of(stream: Stream, device: int = 0) -> Any:
    return _workspace.for_stream(device, stream)


def test_a_stream_keeps_its_own() -> None:
    one, two = Stream(1), Stream(2)
    assert of(one) is of(one)
    assert of(one) is not of(two)
    assert of(one) is not of(one, device=1)


def test_nothing_ran_before_the_capture() -> None:
    with pytest.raises(ValueError, match="workspace: expected a call on this GPU outside of stream capture first"):
        of(Stream(1, captured=True))


def test_a_call_in_between_makes_room_for_the_next_captured_stream() -> None:
    usual = Stream(1)
    mine = [of(usual)]
    for handle in (2, 3):
        mine.append(of(Stream(handle, captured=True)))
        with pytest.raises(ValueError, match="got the first one under capture"):
            of(Stream(4, captured=True))
        assert of(Stream(handle, captured=True)) is mine[-1]
        assert of(usual) is mine[0]
    assert len({id(space) for space in mine}) == 3
