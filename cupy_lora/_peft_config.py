"""What the config of a PEFT adapter says: every setting checked, modules matched to patterns by PEFT's own rules."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

_FLOAT32_MAX = float(np.finfo(np.float32).max)

_HONOURED = frozenset(
    {
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "fan_in_fan_out",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "use_rslora",
    }
)

# Read by PEFT for training, for sharding or as a record; what the adapter computes does not depend on them. Settings
# of the initialisations are here because init_lora_weights itself is checked; qalora_group_size needs use_qalora, which
# is an error.
_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "task_type",
    }
)

# The other initialisations (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, MiCA, ...) change the base weights or the layer.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


class Config:
    """The checked content of adapter_config.json: what is in it is honoured, has no effect, or is an error."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: expected JSON, got: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
        self.content: dict[str, Any] = content

        for key, value in content.items():
            if key not in _HONOURED and key not in _WITHOUT_EFFECT and value not in (None, False, [], {}, ""):
                raise self._error(key, "no such setting, or its default", value)
        if content.get("peft_type") != "LORA":
            raise self._error("peft_type", "'LORA'", content.get("peft_type"))
        if content.get("bias", "none") != "none":
            raise self._error("bias", "'none'", content["bias"])
        init = content.get("init_lora_weights", True)
        if not isinstance(init, str | bool | None) or init not in _PLAIN_INITS:
            raise self._error("init_lora_weights", "one that leaves the base weights as they are", init)
        self.r = self._rank("r", content.get("r"))
        self.alpha = self._number("lora_alpha", content.get("lora_alpha"))
        self.rslora = self.flag("use_rslora")
        self.rank_pattern = self._pattern("rank_pattern", self._rank)
        self.alpha_pattern = self._pattern("alpha_pattern", self._number)
        self.target = self._names("target_modules")
        if not self.target:
            raise self._error(
                "target_modules", "a list of names or a regular expression", content.get("target_modules")
            )
        self.exclude = self._names("exclude_modules")
        self.layers = self._layers()
        layers_pattern = content.get("layers_pattern") or []
        self.layers_pattern = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
        for pattern in self.layers_pattern:
            self._regex("layers_pattern", pattern)

    def _error(self, key: str, expected: str, got: object) -> ValueError:
        return ValueError(f"{self.path}: {key}: expected {expected}, got {got!r}")

    def flag(self, key: str) -> bool:
        value = self.content.get(key) or False
        if not isinstance(value, bool):
            raise self._error(key, "true or false", value)
        return value

    def _rank(self, key: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._error(key, "a positive integer", value)
        return value

    def _number(self, key: str, value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise self._error(key, "a finite number", value)
        return value

    def _regex(self, key: str, pattern: object) -> None:
        try:
            if not isinstance(pattern, str):
                raise self._error(key, "a regular expression", pattern)
            re.compile(pattern)
        except re.error as error:
            raise self._error(key, f"a regular expression ({error})", pattern) from error

    def _pattern(self, key: str, check: Any) -> dict[str, Any]:
        patterns = self.content.get(key) or {}
        if not isinstance(patterns, dict):
            raise self._error(key, "an object of patterns", patterns)
        for pattern, value in patterns.items():
            self._regex(key, pattern)
            check(f"{key}: {pattern}", value)
        return patterns

    def _names(self, key: str) -> str | list[str]:
        names = self.content.get(key) or []
        if isinstance(names, str):
            if names != "all-linear":
                self._regex(key, names)
        elif not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self._error(key, "a list of names or a regular expression", names)
        return names

    def _layers(self) -> list[int] | None:
        layers = self.content.get("layers_to_transform")
        if layers is None or layers == []:
            return None
        found = [layers] if isinstance(layers, int) else layers
        if not isinstance(found, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in found):
            raise self._error("layers_to_transform", "an integer or a list of integers", layers)
        if isinstance(self.target, str):
            # PEFT refuses the pair too: a regular expression says which layers it means.
            raise self._error("layers_to_transform", "null where target_modules is a string", layers)
        return found

    def check_targeted(self, key: str, module: str) -> None:
        """ValueError unless PEFT would put an adapter on this module: if not, it would leave the tensor out."""
        if self.target != "all-linear" and not _matches(self.target, module):
            raise ValueError(f"{key}: expected a module that target_modules {self.target!r} names, got {module}")
        if self.exclude and _matches(self.exclude, module):
            raise ValueError(f"{key}: expected a module that exclude_modules {self.exclude!r} spares, got {module}")
        if self.layers is None or module in self.target:
            return
        # PEFT takes the first number in the name for the layer's; a named pattern says what stands before it.
        patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for pattern in patterns if (match := re.match(pattern, module))), None)
        if found is None or int(found[1]) not in self.layers:
            raise ValueError(f"{key}: expected a layer of layers_to_transform {self.layers}, got {module}")

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """The r of this module, and ``alpha / r`` or ``alpha / sqrt(r)``."""
        rank = _by_pattern(self.rank_pattern, module, self.r)
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        scale = float(alpha) / (math.sqrt(rank) if self.rslora else rank)
        if not abs(scale) <= _FLOAT32_MAX:
            raise self._error("lora_alpha", f"a finite float32 scale for {module}", f"{alpha} over rank {rank}")
        return rank, scale

    def unused(self, modules: Collection[str]) -> Iterator[str]:
        """The entries that none of these modules answers to."""
        if isinstance(self.target, list):
            for name in sorted(self.target):
                if not any(_matches([name], module) for module in modules):
                    yield f"target_modules: {name}"
        for key, patterns in ("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern):
            used = {_pattern_key(patterns, module) for module in modules}
            yield from (f"{key}: {pattern}" for pattern in patterns if pattern not in used)


def _matches(target: str | list[str], module: str) -> bool:
    if isinstance(target, str):
        return re.fullmatch(target, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in target)


def _pattern_key(patterns: Mapping[str, Any], module: str) -> str:
    """The first pattern that matches the end of the name from a dot on, or the name itself: PEFT's rule."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), module)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return patterns.get(_pattern_key(patterns, module), default)
