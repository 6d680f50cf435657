"""Runs families of cases: check, floors, timing, peers; one that breaks is reported and the others go on."""

from __future__ import annotations

import contextlib
import importlib
import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from . import peers as peer_table
from .harness import launches_of
from .model import OURS, Case, Report, Row, Work, progress, require, say, watchdog

FAMILIES: dict[str, tuple[str, ...]] = {
    "lora": ("bench_lora", "bench_lora_batch", "bench_lora_weights"),
    "bgmv": ("bench_bgmv",),
    "sgmv": ("bench_sgmv",),
    "norm": ("bench_norm",),
    "kv": ("bench_paged_kv",),
    "metadata": ("bench_metadata",),
    "attention": ("bench_attention",),
    "host": ("bench_host",),
}


@dataclass
class Options:
    """What to run.

    ``shard`` is (index, count): with it, every case whose number is index modulo count is built with one set of
    buffers and called once, which compiles what it needs; nothing is checked or timed.
    """

    quick: bool = False
    cases: str = ""
    peers: str = "auto"
    budget: float = float("inf")
    case_timeout: float = 90.0
    warm: bool = True
    shard: tuple[int, int] | None = None
    verbose: bool = False
    told: set[str] = field(default_factory=set)
    unbuilt: peer_table.Unbuilt = field(default_factory=dict)


class DeviceLost(RuntimeError):
    """The GPU context is unusable (an illegal access, say): nothing more can be measured in this process."""


def load_family(family: str) -> list[ModuleType]:
    """The family's modules, if the library has what they benchmark.

    Raises
    ------
    LookupError
        If it is not there.
    """
    modules = []
    for name in FAMILIES[family]:
        try:
            module = importlib.import_module(f"{__package__}.{name}")
        except ModuleNotFoundError as error:
            raise LookupError(f"no bench/{name}.py ({error})") from error
        require(module.NEEDS)
        modules.append(module)
    return modules


def select(module: ModuleType, options: Options) -> list[Case]:
    """The module's cases that the options keep."""
    pattern = re.compile(options.cases) if options.cases else None
    chosen = [case for case in module.cases() if case.quick or not options.quick]
    if pattern is not None:
        chosen = [case for case in chosen if pattern.search(f"{case.family} {case.name}")]
    return chosen


def run_families(families: list[str], rig: Any, report: Report, options: Options) -> None:
    """Run them all; whatever happens to a case ends up in the report."""
    plans: list[tuple[ModuleType, list[Case]]] = []
    for family in families:
        try:
            modules = load_family(family)
        except LookupError as missing:
            report.add(Row(family, "", OURS, "", status="missing", note=str(missing)))
            say(f"[{family}] missing: {missing}")
            continue
        plans += [(module, select(module, options)) for module in modules]
    work = [(module, case) for module, chosen in plans for case in chosen]
    if options.shard is not None:
        index, count = options.shard
        work = work[index::count]
    elif not rig.dry:
        _find_peers(work, rig, report, options)
    with progress(len(work)) as step:
        for module, case in work:
            if report.elapsed > options.budget:
                report.add(Row(case.family, case.name, OURS, "", status="skipped", note="the budget is spent"))
                continue
            before = len(report.rows)
            try:
                with watchdog(options.case_timeout, f"{case.family} {case.name}"):
                    run_case(module, case, rig, report, options)
            except DeviceLost as lost:
                say(f"stopping: {lost}", err=True)
                return
            line = "; ".join(_brief(row) for row in report.rows[before:])
            step(f"{report.elapsed:5.0f} s  {case.family} {case.name}: {line}")


def _find_peers(work: list[tuple[ModuleType, Case]], rig: Any, report: Report, options: Options) -> None:
    """Import the peers and say which there are; one that breaks is a failed row. Compile what they need."""
    working, broken = peer_table.survey(options.peers)
    report.head["peers"] = working
    options.peers = ",".join(working) or "none"
    for name in peer_table.PACKAGES:
        say(f"peer {name}: {working.get(name) or broken.get(name) or 'not installed, or not asked for'}")
    for name, why in broken.items():
        report.add(Row("peers", "import", name, "", status="failed", note=why))
    options.unbuilt = peer_table.compile_ahead(work, options.peers, rig)


def _brief(row: Row) -> str:
    if row.median_us is None:
        return f"{row.engine} {row.status} {row.note}".strip()
    aim = f" ({row.ratio:.2f} x target)" if row.ratio is not None else ""
    return f"{row.engine} {row.mode} {row.median_us:.2f} us{aim}"


@contextlib.contextmanager
def _reported(case: Case, engine: str, rig: Any, report: Report, options: Options) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        note = f"{type(error).__name__}: {error}".strip().split("\n", 1)[0][:300]
        report.add(Row(case.family, case.name, engine, "", status="failed", note=note))
        if options.verbose or note not in options.told:  # one traceback for each error, not one for each case
            options.told.add(note)
            say(f"{case.family} {case.name} ({engine}): {traceback.format_exc()}", err=True)
        try:
            rig.sync()
        except Exception as lost:
            raise DeviceLost(f"the device is lost after {case.family} {case.name} ({engine}): {lost}") from error


def run_case(module: ModuleType, case: Case, rig: Any, report: Report, options: Options) -> None:
    """Check and time one case: this library, then each peer on the same buffers."""
    if hasattr(module, "run_case"):  # a family with a procedure of its own
        with _reported(case, OURS, rig, report, options):
            module.run_case(case, rig, report, options)
        return
    if rig.dry:
        case = module.shrunk(case)
    rig.reseed()
    with _reported(case, OURS, rig, report, options):
        if options.shard is not None:
            module.build(case, rig, 1).calls[0]()
            rig.sync()
            report.add(Row(case.family, case.name, OURS, "compile"))
            return
        sets = module.sets_for(case, rig) if hasattr(module, "sets_for") else rig.sets_for(case.nbytes)
        work = module.build(case, rig, sets)
        _measure(case, OURS, work, rig, report, options)
        stem = module.__name__.rpartition(".")[2]
        for name in {} if rig.dry else peer_table.chosen(stem, options.peers):
            with _reported(case, name, rig, report, options):
                other = peer_table.build(stem, name, case, rig, work, options.unbuilt)
                if other is not None:
                    _measure(case, name, other, rig, report, options)
        del work
    rig.release()


def _measure(case: Case, engine: str, work: Work, rig: Any, report: Report, options: Options) -> None:
    """Check, then time cold (the buffers rotate) and warm (one set of buffers)."""
    floor = rig.read_floor(case.nbytes, len(work.calls))
    common: dict[str, Any] = {
        "floor_us": floor,
        "target_us": case.target_us(floor) if engine == OURS else None,
        "nbytes": case.nbytes,
        "record": dict(case.record) if engine == OURS else {},
        "error": work.check(),
        "launch": launches_of(work.calls[0]) if engine == OURS else "",
    }
    if not common["error"] <= 1.0:
        report.add(Row(case.family, case.name, engine, "", status="wrong", note="failed its check", **common))
        return
    expected = max(floor or 0.0, 2.0) * 1.3 if engine == OURS else None
    modes = [("cold", work.calls)]
    if options.warm and engine == OURS:
        modes.append(("warm", work.calls[:1]))
    for mode, calls in modes:
        timing = rig.time(calls, expected, work.capture)
        row = Row(case.family, case.name, engine, mode, **common)
        row.sets = len(calls)
        row.rotation_mb = len(calls) * case.nbytes / 1e6
        if timing is None:
            row.status = "dry"
        else:
            row.set_time(timing, rig.copy_gbps)
        if mode == "warm":  # floor and target are those of cold buffers
            row.floor_us = row.target_us = row.copy_floor_us = None
            row.record = {}
        report.add(row)
