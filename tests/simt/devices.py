"""The CPU runner as GPUs of another kind: without clusters, or so small that every block has to loop."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import engines
import numpy as np

from cupy_lora import _jit
from cupy_lora._plans import Plans

from . import runner


@contextlib.contextmanager
def on_cpu(edge: str = "end", clusters: int | None = None, arch: int = 90, sms: int = 108) -> Iterator[engines.Simt]:
    """The ``simt`` engine of the tests.

    Parameters
    ----------
    edge : str
        Where arrays lie in their pages in ascending thread order.
    clusters : int
        At most so many groups of CLUSTER blocks along x, and one along z, as if the GPU held no more.
        Only for kernels that walk over their work with the grid's stride.
    arch : int
        Compute capability that the plans see: 80 is without clusters.
    sms : int
        Multiprocessors that they see.
    """

    def run(launch: _jit.Launch) -> None:
        x, y, z = launch.grid
        if clusters is not None:
            group = int(dict(launch.kernel.defines).get("CLUSTER", 1))  # kernels without barriers go by it too
            launch = dataclasses.replace(launch, grid=(min(x, clusters * group), y, min(z, 1)))
        runner.run(launch)

    engine, facts = engines.Simt(edge), _jit.DeviceFacts(arch, sms)

    def filled(shape: tuple[int, ...], dtype: np.dtype, device: int, value: int) -> np.ndarray:
        return engine.array(np.full(shape, value, dtype))

    find_kept = Plans.find

    def find(plans: Plans, *arguments: Any) -> Any:
        return None, None, *find_kept(plans, *arguments)[2:]  # what is kept is for another kind of GPU

    with (
        _jit.host_runner(run),
        mock.patch("cupy_lora._arrays.empty", engine.empty),
        mock.patch("cupy_lora._device.filled", filled),
        mock.patch("cupy_lora._plans.Plans.find", find),
        mock.patch("cupy_lora._jit.device_facts", return_value=facts),
    ):
        yield engine
