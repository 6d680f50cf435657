"""Read LoRA adapters that the PEFT library saved, without torch and without guessing.

An adapter folder holds ``adapter_config.json`` and ``adapter_model.safetensors``. :func:`load_peft` accepts it only
when every tensor and every setting in it is understood: what it cannot honour is an error that names the key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._arrays import FLOATS, dtype_among
from ._peft_config import Config

if TYPE_CHECKING:
    from .lora_weights import LoraWeights

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"

_TENSOR_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")

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
    target = None if dtype is None else dtype_among(dtype, FLOATS)
    for name in (CONFIG_FILE, TENSOR_FILE):
        if not (folder / name).is_file():
            found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else "no such folder"
            raise ValueError(f"{folder}: expected a folder with {CONFIG_FILE} and {TENSOR_FILE}, got {found}")
    config = Config(folder / CONFIG_FILE)
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


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _convert(key: str, tensor: np.ndarray, dtype: np.dtype[Any] | None) -> np.ndarray:
    if dtype is not None and tensor.dtype != dtype:
        with np.errstate(over="ignore"):  # reported below, by name
            tensor = tensor.astype(np.float32).astype(dtype)
    wrong = ~np.isfinite(tensor)
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(f"{key}: expected finite elements in {tensor.dtype.name}, got {tensor[place]} at {place}")
    return np.ascontiguousarray(tensor)
