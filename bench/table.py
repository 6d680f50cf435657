"""The table that a person reads: aligned columns, units in the heads."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from .model import OURS, Row, geometric_mean

_HEADS = (
    "case", "engine", "mode", "us", "p10", "p90", "1-read", "target", "x target", "GB/s", "% copy", "best peer",
    "faster x", "err/tol", "note",
)  # fmt: skip
_LEFT = {"case", "engine", "mode", "note"}


def peers_of(row: Row, rows: Sequence[Row]) -> dict[str, float]:
    """Peers timed in the same run for the same case and mode, microseconds."""
    return {
        other.engine: other.median_us
        for other in rows
        if other.engine != OURS
        and (other.family, other.case, other.mode) == (row.family, row.case, row.mode)
        and other.median_us
    }


def record_of(row: Row, rows: Sequence[Row]) -> dict[str, float]:
    """The peers of record that were not timed in this run for the same case (``vLLM 0.33`` is where ``vLLM`` was)."""
    timed = peers_of(row, rows)
    kept = {}
    for name, us in row.record.items():
        plain = re.sub(r" [\d.]+$", "", name)
        if not any(engine == plain or engine.startswith(f"{plain} ") for engine in timed):
            kept[name] = us
    return kept


def best_peer(row: Row, rows: Sequence[Row]) -> tuple[str, float] | None:
    """The best peer: of this run and, for cold times, those of record that this run lacks (with an asterisk)."""
    known = dict(peers_of(row, rows))
    if row.mode in ("cold", "host"):
        known.update({f"{name}*": us for name, us in record_of(row, rows).items()})
    return min(known.items(), key=lambda item: item[1]) if known else None


def _number(value: float | None, digits: int = 2) -> str:
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:.{digits}f}"


def _cells(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    peer = best_peer(row, rows) if row.engine == OURS else None
    status = "" if row.status == "ok" else row.status.upper()
    return (
        row.case,
        row.engine,
        row.mode,
        _number(row.median_us),
        _number(row.p10_us),
        _number(row.p90_us),
        _number(row.floor_us),
        _number(row.target_us),
        _number(row.ratio),
        _number(row.gbps, 0),
        _number(row.percent_copy, 0),
        f"{peer[0]} {peer[1]:.1f}" if peer else "",
        _number(peer[1] / row.median_us) if peer and row.median_us else "",
        _number(row.error),
        " ".join(part for part in (status, row.note) if part),
    )


def text_table(rows: Sequence[Row]) -> str:
    """All rows, family by family."""
    families = list(dict.fromkeys(row.family for row in rows))
    blocks = []
    for family in families:
        mine = [row for row in rows if row.family == family]
        cells = [_HEADS, *(_cells(row, mine) for row in mine)]
        used = [c for c in range(len(_HEADS)) if any(line[c] for line in cells[1:])]
        widths = {c: max(len(line[c]) for line in cells) for c in used}
        lines = []
        for line in cells:
            parts = [line[c].ljust(widths[c]) if _HEADS[c] in _LEFT else line[c].rjust(widths[c]) for c in used]
            lines.append("  ".join(parts).rstrip())
        lines.insert(1, "  ".join("-" * widths[c] for c in used))
        blocks.append("\n".join((f"[{family}]", *lines)))
    return "\n\n".join(blocks)


def summary(rows: Sequence[Row]) -> list[str]:
    """Per family: rows at target, speed against the best peer, and what is wrong, one line each."""
    lines = []
    for family in dict.fromkeys(row.family for row in rows):
        ours = [row for row in rows if row.family == family and row.engine == OURS]
        aimed = [row for row in ours if row.ratio is not None and row.mode != "warm"]
        at = [row for row in aimed if row.ratio is not None and row.ratio <= 1.0]
        text = f"{family}: {len(at)} of {len(aimed)} rows at target"
        gains = [
            peer[1] / row.median_us
            for row in ours
            if row.mode != "warm" and row.median_us and (peer := best_peer(row, rows)) is not None
        ]
        if gains:
            text += (
                f"; against the best peer of {len(gains)} rows: geometric mean {geometric_mean(gains):.2f}x faster, "
                f"worst {min(gains):.2f}x"
            )
        lines.append(text)
        for row in aimed:
            if row not in at and row.ratio is not None:
                lines.append(f"  misses: {row.case} ({row.mode}) {row.median_us:.2f} us, {row.ratio:.2f} x target")
    for status in ("wrong", "failed", "missing", "skipped"):
        for row in rows:
            if row.status == status:
                lines.append(f"  {status}: {row.family} {row.case} {row.engine} {row.note}".rstrip())
    return lines
