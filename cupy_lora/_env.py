"""Every environment switch of the library, in one table. Read at each use, so tests may set them."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Switch:
    """One environment variable: its name and what setting it does."""

    name: str
    effect: str

    @functools.cached_property
    def _key(self) -> Any:
        """The name as ``os.environ`` keeps it."""
        return os.environ.encodekey(self.name)

    @property
    def value(self) -> str:
        """What it is set to; empty where it is not set."""
        return os.environ.get(self.name, "").strip()

    @property
    def on(self) -> bool:
        """True for any value but the empty string, ``0``, ``false``, ``no`` and ``off``."""
        # os.environ answers for an absent name through an exception (0.5 us, and calls of a few microseconds ask more
        # than once); the dict that it keeps in CPython does not.
        try:
            if self._key not in os.environ._data:  # type: ignore[attr-defined]
                return False
        except (AttributeError, TypeError):
            pass
        value = os.environ.get(self.name)
        return value is not None and value.strip().lower() not in ("", "0", "false", "no", "off")


DEBUG = Switch(
    "CUPY_LORA_DEBUG", "check indices, pointers and sizes held in device memory; names the bad row; synchronises"
)
DISABLE_SGMV = Switch("DISABLE_SGMV", "has_sgmv() is False: a loop of matrix products serves every LoRA call")
CUBINS = Switch(
    "CUPY_LORA_CUBINS", "the folder of kernels compiled ahead by `python -m cupy_lora warmup --cubins`, looked at first"
)
SERIAL = Switch(
    "CUPY_LORA_SERIAL",
    "launch kernels without the driver's early start, for measuring or debugging (read at the first launch)",
)
REQUIRE_GPU = Switch("CUPY_LORA_REQUIRE_GPU", "in the tests: fail instead of skipping where there is no usable GPU")
LORAX_CHECKOUT = Switch(
    "CUPY_LORA_LORAX_CHECKOUT",
    "the path of a LoRAX checkout: its own code is then an oracle of the tests and a peer in bench",
)

SWITCHES = (DEBUG, DISABLE_SGMV, CUBINS, SERIAL, REQUIRE_GPU, LORAX_CHECKOUT)
