"""Rules by rank: LoRAX's own, kept for callers that prepare weights by them, and the library's choice.

No kernel of this library needs a padded rank, fails between two supported ranks, or stops at 128.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import numpy as np

from . import _env
from ._jit import DeviceFacts
from ._lora_checks import integer
from ._lora_choice import LoraConfig as LoraConfig
from ._lora_choice import choose, staged_alone, staged_rank

MIN_SGMV_RANK: Final = 8
MIN_RANK_CUSTOM: Final = 16
MAX_RANK_CUSTOM: Final = 128
SGMV_BLOCK_SIZE: Final = 16
BGMV_MAX_RANK: Final = 128


def has_sgmv() -> bool:
    """False when the environment says ``DISABLE_SGMV=1``: a loop of matrix products then serves every LoRA call."""
    return not _env.DISABLE_SGMV.on


def pad_rank(t: Any, dim: int, world_size: int) -> Any:
    """Pad the rank for SGMV: :func:`pad_to_min_rank` to ``8 * world_size``; ``t`` itself without SGMV.

    Tensor parallelism divides the rank by ``world_size``, hence the factor.

    Parameters
    ----------
    t : array
        CuPy, torch, JAX or NumPy.
    dim : int
        The axis of the rank.
    world_size : int
        At least 1.
    """
    world_size = integer("world_size", world_size, 1)
    if not has_sgmv():
        return t
    return pad_to_min_rank(t, dim, MIN_SGMV_RANK * world_size)


def pad_to_min_rank(t: Any, dim: int, min_rank: int) -> Any:
    """Append zeros along ``dim`` up to ``min_rank``, or above it to the next multiple of 16.

    Parameters
    ----------
    t : array
        CuPy, torch, JAX or NumPy.
    dim : int
        The axis to pad; negative counts from the end.
    min_rank : int
        Least extent of the axis.

    Returns
    -------
    array
        ``t`` itself where nothing is to be padded, else a new array of the same kind.

    Raises
    ------
    TypeError, ValueError
        For arguments that are not integers, or a ``dim`` that ``t`` does not have.
    """
    ndim = len(t.shape)
    dim = integer("dim", dim, -ndim, ndim - 1) % ndim
    min_rank = integer("min_rank", min_rank, 0)
    rank = int(t.shape[dim])
    target = min_rank if rank <= min_rank else -(-rank // SGMV_BLOCK_SIZE) * SGMV_BLOCK_SIZE
    if target == rank:
        return t
    widths = [(0, target - rank if axis == dim else 0) for axis in range(ndim)]
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(t, torch.Tensor):
        return torch.nn.functional.pad(t, [width for pair in reversed(widths) for width in pair])
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(t, jax.Array):
        return jax.numpy.pad(t, widths)
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(t, cupy.ndarray):
        return cupy.pad(t, widths)
    if not isinstance(t, np.ndarray):
        raise TypeError(f"t: expected a CuPy, torch, JAX or NumPy array, got {type(t).__name__}")
    return np.pad(t, widths)


def use_cutlass_shrink(lora_rank: int) -> bool:
    """Whether LoRAX shrinks this rank by its CUTLASS kernel: below 16."""
    return lora_rank < MIN_RANK_CUSTOM


def orient_for_rank(t: Any, rank: int) -> Any:
    """``t`` with its first two axes transposed (a view) for ranks 16 to 128, else ``t`` itself."""
    if not MIN_RANK_CUSTOM <= rank <= MAX_RANK_CUSTOM:
        return t
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(t, torch.Tensor):
        return t.transpose(0, 1)
    return t.swapaxes(0, 1)


def choose_lora(
    rank: int,
    tokens: int,
    in_features: int,
    widths: Sequence[int],
    *,
    dtype: Any = "bfloat16",
    arch: int = 90,
    sm_count: int = 132,
    tiles: Mapping[int, int] | None = None,
    aligned: bool = True,
    ranks: Collection[int] = (),
) -> LoraConfig:
    """The config of a fused layer: a pure function, the same on any machine.

    Parameters
    ----------
    rank : int
        The largest rank that is loaded.
    tokens : int
        Rows of the batch.
    in_features : int
        Columns of x.
    widths : sequence of int
        Columns of each slice of y.
    dtype : dtype or str
        Of y; the ring form takes 16-bit ones only.
    arch : int
        Compute capability of the GPU, 90 for 9.0.
    sm_count : int
        Its multiprocessors.
    tiles : mapping of int to int, optional
        Tiles of each height that the batch has lists for, at most. Default: every row another adapter's.
    aligned : bool
        Whether all rows of x and y are 16-byte aligned.
    ranks : collection of int, optional
        Every rank that is loaded, each as often as any other in the batch, as far as anybody knows. Default: `rank`.

    Returns
    -------
    LoraConfig

    Raises
    ------
    TypeError, ValueError
        For sizes that are not integers of at least 1 (``tokens``: 0), or no slice.
    """
    rank, in_features = integer("rank", rank, 1), integer("in_features", in_features, 1)
    tokens, arch, sm_count = integer("tokens", tokens, 0), integer("arch", arch, 80), integer("sm_count", sm_count, 1)
    if not widths:
        raise ValueError("widths: expected at least one slice, got none")
    widths = tuple(integer(f"widths[{i}]", width, 1) for i, width in enumerate(widths))
    if tiles is None:
        tiles = dict.fromkeys((8, 16), tokens)
    ring = aligned and np.dtype(dtype).itemsize == 2
    loaded = frozenset(integer("ranks", each, 1) for each in ranks) | {rank}
    return choose(rank, tokens, in_features, widths, tiles, ring, loaded, DeviceFacts(arch, sm_count))


def explain(rank: int, tokens: int, in_features: int, widths: Sequence[int], **options: Any) -> str:
    """What :func:`choose_lora` chooses for these arguments (the same ones), and why, in words."""
    config = choose_lora(rank, tokens, in_features, widths, **options)
    sms = options.get("sm_count", 132)
    tiles = (options.get("tiles") or {}).get(config.rows, tokens)
    clusters = tiles * len(widths)
    blocks = "1 block" if config.cluster == 1 else f"a cluster of {config.cluster} blocks"
    lines = [
        f"rank {rank}, {tokens} tokens, {in_features} -> {' + '.join(map(str, widths))}: the {config.form} form",
        f"  {tiles} tiles (at most) of up to {config.rows} rows by {len(widths)} slices: {clusters} on {sms} SMs",
        f"  each by {blocks} of {config.warps} warps",
    ]
    if config.form == "ring":
        if staged_rank(rank):
            lines.append(f"  x, A, B and y stream through {config.stages} slots of shared memory")
        else:
            lines.append("  eight rows at a time, read in a loop (no code of its own for this rank)")
    else:
        staged = (
            "staged in shared memory"
            if staged_alone(rank, config, in_features)
            else "read in a loop (no code of its own for this rank)"
        )
        lines.append(f"  x and A go straight to registers; B and y are {staged}")
    if options.get("arch", 90) < 90:
        lines.append("  no clusters before compute capability 9.0")
    return "\n".join(lines)
