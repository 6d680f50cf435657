"""Read LoRA adapters that the PEFT library saved, without torch and without guessing.

An adapter folder holds ``adapter_config.json`` and ``adapter_model.safetensors``. :func:`load_peft` accepts it only
when every tensor and every setting in it is understood: what it cannot honour is an error that names the key. Modules
match the config's patterns by PEFT's own rules.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._arrays import FLOATS

if TYPE_CHECKING:
    from .lora_weights import LoraWeights

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"

_TENSOR_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
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

# What the parts of a tensor's name say about it, for the message.
_VARIANTS = (
    ("lora_magnitude_vector", "a DoRA tensor"),
    ("lora_embedding_", "a LoRA of an embedding"),
    ("lora_A.bias", "a LoRA bias"),
    ("lora_B.bias", "a LoRA bias"),
    ("modules_to_save", "a module saved whole"),
    ("trainable_tokens_", "trained token embeddings"),
)


class PeftModule(NamedTuple):
    """One adapted linear layer: ``y += scale * (x a^T) b^T``.

    Attributes
    ----------
    a : numpy.ndarray
        ``(rank, in_features)``.
    b : numpy.ndarray
        ``(out_features, rank)``.
    rank : int
        The config's r for this module.
    scale : float
        ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
    """

    a: np.ndarray
    b: np.ndarray
    rank: int
    scale: float


class FusedSlices(NamedTuple):
    """Several modules as the slices of one fused projection, in the form that ``LoraWeights.load`` takes.

    A module that the adapter leaves alone is None in ``a`` and ``b``, and has the scale 1.0, which multiplies nothing.
    """

    a: tuple[np.ndarray | None, ...]
    b: tuple[np.ndarray | None, ...]
    scale: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class PeftAdapter:
    """A LoRA adapter in host memory.

    Attributes
    ----------
    path : pathlib.Path
        The folder that it came from.
    modules : dict of str to PeftModule
        By the module's name inside the base model (``"model.layers.0.self_attn.q_proj"``), in the order of the names.
    unused : tuple of str
        Entries of the config that no tensor answers to (``"target_modules: lm_head"``).
    fan_in_fan_out : bool
        The base layers store their weight as ``(in_features, out_features)``. It matters for merging only:
        ``a`` and ``b`` have the same layout either way.
    """

    path: Path
    modules: dict[str, PeftModule]
    unused: tuple[str, ...]
    fan_in_fan_out: bool

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks, ascending."""
        return tuple(sorted({module.rank for module in self.modules.values()}))

    @property
    def nbytes(self) -> int:
        """Bytes of all A and B."""
        return sum(module.a.nbytes + module.b.nbytes for module in self.modules.values())

    def fuse(self, *names: str) -> FusedSlices | None:
        """The named modules as slices of one fused projection; None if the adapter has none of them.

        Parameters
        ----------
        *names : str
            Module names inside the base model, one per slice, in the order of the slices.

        Raises
        ------
        ValueError
            If no name is given, a name is given twice, or the modules differ in their ``in_features`` or their dtype.
        """
        if not names or len(set(names)) != len(names):
            raise ValueError(f"names: expected one distinct module per slice, got {names}")
        modules = [self.modules.get(name) for name in names]
        present = [(name, module) for name, module in zip(names, modules, strict=True) if module is not None]
        if not present:
            return None
        first_name, first = present[0]
        for name, module in present[1:]:
            got, expected = (module.a.shape[1], module.a.dtype.name), (first.a.shape[1], first.a.dtype.name)
            if got != expected:
                raise ValueError(f"{name}: expected in_features and dtype as in {first_name}, {expected}, got {got}")
        return FusedSlices(
            tuple(None if module is None else module.a for module in modules),
            tuple(None if module is None else module.b for module in modules),
            tuple(1.0 if module is None else module.scale for module in modules),
        )

    def fuse_qkv(self, prefix: str) -> FusedSlices | None:
        """``q_proj``, ``k_proj`` and ``v_proj`` under ``prefix`` (``"model.layers.0.self_attn"``) as three slices."""
        return self.fuse(*(f"{prefix}.{name}" for name in ("q_proj", "k_proj", "v_proj")))

    def fuse_gate_up(self, prefix: str) -> FusedSlices | None:
        """``gate_proj`` and ``up_proj`` under ``prefix`` (``"model.layers.0.mlp"``) as two slices."""
        return self.fuse(*(f"{prefix}.{name}" for name in ("gate_proj", "up_proj")))

    def load_into(self, weights: LoraWeights, slot: int, *names: str) -> bool:
        """Put the named modules into a slot of ``weights``, one per slice; unload the slot if there are none.

        Returns
        -------
        bool
            Whether the adapter has any of the modules.
        """
        fused = self.fuse(*names)
        if fused is None:
            weights.unload(slot)
            return False
        weights.load(slot, fused.a, fused.b, scale=fused.scale)
        return True

    def report(self) -> str:
        """What was applied, one line per module, and which entries of the config matched no tensor."""
        width = max(len(name) for name in self.modules)
        lines = [f"{self.path}: {len(self.modules)} modules, {self.nbytes} bytes"]
        for name, (a, b, rank, scale) in self.modules.items():
            lines.append(
                f"  {name:{width}}  rank {rank:<4} scale {scale:<10.6g} {a.shape[1]} -> {b.shape[0]}  {a.dtype.name}"
            )
        lines += [f"  matched no tensor: {entry}" for entry in self.unused]
        return "\n".join(lines)


def load_peft(path: str | Path, *, dtype: Any = None) -> PeftAdapter:
    """Read a LoRA adapter in PEFT's format.

    Parameters
    ----------
    path : str or Path
        The folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
    dtype : numpy.dtype or str, optional
        ``float16``, ``bfloat16`` or ``float32``: what A and B are rounded to. By default they stay as they are stored.

    Returns
    -------
    PeftAdapter

    Raises
    ------
    TypeError
        If ``dtype`` is not one of the three.
    ValueError
        If a file is missing or damaged; if the config asks for what this library does not do (DoRA, a bias, modules
        saved whole, an initialisation that changed the base weights, ...); if a tensor is not the A or B of a targeted
        module; if a rank differs from the config's; if a scale or an element is not finite (in ``dtype``).
    RuntimeError
        If the package safetensors is not installed.
    """
    folder = Path(path)
    target = None if dtype is None else _check_dtype(dtype)
    for name in (CONFIG_FILE, TENSOR_FILE):
        if not (folder / name).is_file():
            found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else "no such folder"
            raise ValueError(f"{folder}: expected a folder with {CONFIG_FILE} and {TENSOR_FILE}, got {found}")
    config = _Config(folder / CONFIG_FILE)
    tensors = read_safetensors(folder / TENSOR_FILE)

    parts: dict[str, dict[str, str]] = {}  # module -> "A" or "B" -> key
    for key in tensors:
        match = _TENSOR_KEY.fullmatch(key)
        if match is None:
            got = next((text for part, text in _VARIANTS if part in key), "a tensor of another kind")
            raise ValueError(f"{key}: expected base_model.model.<module>.lora_A.weight or .lora_B.weight, got {got}")
        config.check_targeted(key, match["module"])
        parts.setdefault(match["module"], {})[match["part"]] = key
    if not parts:
        raise ValueError(f"{folder / TENSOR_FILE}: expected LoRA tensors, got a file without a tensor")

    modules: dict[str, PeftModule] = {}
    for module in sorted(parts, key=_natural):
        keys = parts[module]
        for part, other in ("A", "B"), ("B", "A"):
            if part not in keys:
                raise ValueError(f"{keys[other]}: expected lora_{part}.weight of the same module beside it, got none")
        rank, scale = config.rank_and_scale(module)
        a, b = tensors[keys["A"]], tensors[keys["B"]]
        for key, tensor, axis in (keys["A"], a, 0), (keys["B"], b, 1):
            if tensor.ndim != 2 or tensor.shape[axis] != rank:
                shape = f"({rank}, in_features)" if axis == 0 else f"(out_features, {rank})"
                raise ValueError(f"{key}: expected shape {shape} (r = {rank} by the config), got {tensor.shape}")
            if 0 in tensor.shape:
                raise ValueError(f"{key}: expected a tensor with elements, got shape {tensor.shape}")
        modules[module] = PeftModule(_convert(keys["A"], a, target), _convert(keys["B"], b, target), rank, scale)
    return PeftAdapter(folder, modules, tuple(config.unused(modules)), config.flag("fan_in_fan_out"))


def safetensors_package() -> Any:
    """The package safetensors; RuntimeError with what to install where it is missing."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise RuntimeError(
            "cupy_lora: the package safetensors is needed to read adapters: expected it to be installed "
            f"(pip install 'cupy-lora[peft]'), got ImportError: {error}"
        ) from error
    return safetensors


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file as a NumPy array, bfloat16 included.

    Raises
    ------
    ValueError
        If the file is missing, truncated or otherwise damaged, or holds a dtype other than float16, bfloat16 or
        float32.
    RuntimeError
        If the package safetensors is not installed.
    """
    safetensors = safetensors_package()
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118 (the file is not a mapping)
                stored = file.get_slice(key).get_dtype()
                if stored not in names:
                    raise ValueError(f"{key}: expected a tensor of {' or '.join(names)}, got {stored}")
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: expected a whole safetensors file, got: {error}") from error


class _Config:
    """The checked content of adapter_config.json."""

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
        rank = _by_pattern(self.rank_pattern, module, self.r)
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        scale = float(alpha) / (math.sqrt(rank) if self.rslora else rank)
        if not abs(scale) <= _FLOAT32_MAX:
            raise self._error("lora_alpha", f"a finite float32 scale for {module}", f"{alpha} over rank {rank}")
        return rank, scale

    def unused(self, modules: Mapping[str, PeftModule]) -> Iterator[str]:
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


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _check_dtype(dtype: Any) -> np.dtype[Any]:
    try:
        found: np.dtype[Any] = np.dtype(dtype)  # ml_dtypes, imported by _arrays, makes the name "bfloat16" known
    except TypeError as error:
        raise TypeError(f"dtype: expected {' or '.join(d.name for d in FLOATS)}, got {dtype!r}") from error
    if found not in FLOATS:
        raise TypeError(f"dtype: expected {' or '.join(d.name for d in FLOATS)}, got {found.name}")
    return found


def _convert(key: str, tensor: np.ndarray, dtype: np.dtype[Any] | None) -> np.ndarray:
    if dtype is not None and tensor.dtype != dtype:
        with np.errstate(over="ignore"):  # reported below, by name
            tensor = tensor.astype(np.float32).astype(dtype)
    wrong = ~np.isfinite(tensor)
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(f"{key}: expected finite elements in {tensor.dtype.name}, got {tensor[place]} at {place}")
    return np.ascontiguousarray(tensor)
