"""One picture per family from a report: this library, the peers, the floor and the target of every case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .model import OURS, Row
from .table import peers_of, record_of


def plot_path(base: Path, family: str) -> Path:
    """``speed.png`` becomes ``speed-lora.png``."""
    return base.with_name(f"{base.stem}-{family}{base.suffix or '.png'}")


def plot(head: dict[str, Any], rows: Sequence[Row], base: Path) -> list[Path]:
    """Write the pictures; the paths written.

    Raises
    ------
    RuntimeError
        If matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError(f"--plot: expected the package matplotlib, got ImportError: {error}") from error
    matplotlib.use("Agg")
    written = []
    for family in dict.fromkeys(row.family for row in rows):
        mode = "host" if family == "host" else "cold"
        timed = [row for row in rows if row.family == family and row.mode == mode and row.median_us]
        ours = [row for row in timed if row.engine == OURS]
        if ours:
            written.append(_plot_family(head, family, ours, timed, plot_path(base, family)))
    return written


def _plot_family(head: dict[str, Any], family: str, ours: list[Row], timed: list[Row], path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 1.6 + 0.28 * len(ours)), layout="constrained")
    places = range(len(ours))
    engines: dict[str, list[tuple[float, int]]] = {}
    for place, row in zip(places, ours, strict=True):
        for name, us in peers_of(row, timed).items():
            engines.setdefault(name, []).append((us, place))
        for name, us in record_of(row, timed).items():
            engines.setdefault(f"{name} (of record)", []).append((us, place))
    markers = "sDv^<>pPXh*d"
    for index, (name, points) in enumerate(sorted(engines.items())):
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, markers[index % len(markers)], ms=5, alpha=0.75, ls="none", label=name)
    _ticks(axes, [(row.floor_us, place) for place, row in zip(places, ours, strict=True)], "0.5", "1-read floor")
    _ticks(axes, [(row.target_us, place) for place, row in zip(places, ours, strict=True)], "tab:red", "target")
    medians = [row.median_us or 0.0 for row in ours]
    low = [m - (row.p10_us or m) for m, row in zip(medians, ours, strict=True)]
    high = [(row.p90_us or m) - m for m, row in zip(medians, ours, strict=True)]
    spread = [[max(v, 0.0) for v in side] for side in (low, high)]
    axes.errorbar(medians, list(places), xerr=spread, fmt="o", ms=7, color="black", label=OURS, zorder=5)
    axes.set_yticks(list(places), [row.case for row in ours], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    kind = "host time per call, us (median)" if family == "host" else "GPU time per call, us (median, cold)"
    axes.set_xlabel(kind)
    axes.grid(axis="x", which="both", alpha=0.25)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    machine = head.get("machine", {})
    axes.set_title(
        f"{family}: {machine.get('gpu')}, driver {machine.get('driver')}, commit {str(head.get('commit'))[:12]}",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path


def _ticks(axes: Any, points: list[tuple[float | None, int]], color: str, label: str) -> None:
    known = [(x, y) for x, y in points if x]
    if known:
        xs, ys = zip(*known, strict=True)
        axes.scatter(xs, ys, marker="|", s=140, color=color, label=label, zorder=4, linewidths=2)
