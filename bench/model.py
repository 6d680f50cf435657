"""What the benchmark measures and what it writes: cases, rows, statistics, the report file. No GPU needed."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA = 1
OURS = "cupy_lora"
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes
    ----------
    family, name : str
    nbytes : int
        The fewest bytes that any kernel must move for it: the floor's size.
    params : object
        What the family's module needs to build it.
    quick : bool
        Whether ``--quick`` keeps it (the rows that have a figure of record).
    target : float or None
        Microseconds to reach.
    over_read : (float, float) or None
        Instead: factor and addend (microseconds) over the 1-read floor of the same run.
    record : tuple of (str, float)
        Peers of record, microseconds.
    """

    family: str
    name: str
    nbytes: int
    params: Any
    quick: bool = False
    target: float | None = None
    over_read: tuple[float, float] | None = None
    record: tuple[tuple[str, float], ...] = ()

    def target_us(self, read_us: float | None) -> float | None:
        """The target, given the 1-read floor measured in this run."""
        if self.over_read is not None:
            if read_us is None:
                return None
            factor, addend = self.over_read
            return factor * read_us + addend
        return self.target


@dataclass
class Work:
    """A case built for one engine.

    Attributes
    ----------
    calls : list of callables
        One per rotating set of buffers; each only enqueues.
    check : callable
        Runs the first set and returns the worst error over its tolerance (at most 1 is right).
    capture : str
        ``"cupy"``, or ``"torch"`` where the calls allocate torch tensors and need torch's graph pools.
    data : object
        What the peers of the same case build on.
    """

    calls: list[Callable[[], Any]]
    check: Callable[[], float]
    capture: str = "cupy"
    data: Any = None


@dataclass(frozen=True)
class Stats:
    """Microseconds per call over the samples of one measurement."""

    median: float
    p10: float
    p90: float
    samples: int
    calls: int = 1  # in each sample


def stats(samples: Iterable[float], calls: int = 1) -> Stats:
    """Median, 10th and 90th percentile (linear interpolation) of samples of ``calls`` calls each."""
    values = np.asarray(list(samples), np.float64)
    if values.size == 0:
        raise ValueError("samples: expected at least one, got none")
    p10, median, p90 = np.percentile(values, (10, 50, 90))
    return Stats(float(median), float(p10), float(p90), int(values.size), calls)


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of positive numbers; NaN for none."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


@dataclass
class Row:
    """One result. Times are microseconds; None where nothing was measured.

    ``floor_us`` is the 1-read floor (a kernel that only reads the fewest bytes, cold, in a graph)
    and ``copy_floor_us`` the fewest bytes over the copy bandwidth, both of the same run. ``status`` is
    ``ok``, ``wrong`` (failed its check, so it was not timed), ``failed`` (raised), ``missing``,
    ``skipped`` (no budget left) or ``dry``. ``error`` is the worst error over its
    tolerance, ``launch`` what one call launches.
    """

    family: str
    case: str
    engine: str
    mode: str
    status: str = "ok"
    median_us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    floor_us: float | None = None
    copy_floor_us: float | None = None
    target_us: float | None = None
    nbytes: int = 0
    gbps: float | None = None
    percent_copy: float | None = None
    error: float | None = None
    samples: int = 0
    calls: int = 0
    sets: int = 0
    rotation_mb: float = 0.0
    record: dict[str, float] = field(default_factory=dict)
    launch: str = ""
    note: str = ""

    def set_time(self, timing: Stats, copy_gbps: float | None) -> None:
        """Fill in a measurement and what follows from it."""
        self.median_us, self.p10_us, self.p90_us = timing.median, timing.p10, timing.p90
        self.calls, self.samples = timing.calls, timing.samples
        if self.nbytes and timing.median > 0:
            self.gbps = self.nbytes / timing.median / 1e3
            if copy_gbps:
                self.percent_copy = 100.0 * self.gbps / copy_gbps
                self.copy_floor_us = self.nbytes / copy_gbps / 1e3

    @property
    def ratio(self) -> float | None:
        """Time over target: at most 1 reaches it."""
        if self.median_us is None or not self.target_us:
            return None
        return self.median_us / self.target_us

    @property
    def best_record(self) -> float | None:
        """The best peer of record, microseconds."""
        return min(self.record.values()) if self.record else None


def commit() -> str:
    """The checkout's commit, ``-dirty`` appended where tracked files differ; else ``BENCH_COMMIT``; else unknown."""
    given = os.environ.get("BENCH_COMMIT", "").strip()
    if given:
        return given
    try:
        head = _git("rev-parse", "HEAD")
        return f"{head}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*args: str) -> str:
    command = ["git", "-C", str(ROOT), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()


def versions() -> dict[str, str]:
    """Python and the installed packages that take part."""
    found = {"python": platform.python_version()}
    packages = (
        "numpy", "ml_dtypes", "cupy-cuda12x", "cupy-cuda13x", "torch", "triton", "vllm", "sglang", "flashinfer-python",
        "liger-kernel", "nvidia-cuda-nvrtc",
    )  # fmt: skip
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Report:
    """The rows of one run, with where and from what they come; written to disk after every case."""

    def __init__(self, path: Path | None, machine: dict[str, Any], argv: Sequence[str]) -> None:
        self.path = path
        self.rows: list[Row] = []
        self.head: dict[str, Any] = {
            "schema": SCHEMA,
            # Names of files, not where this machine keeps them.
            "command": " ".join(("python -m bench", *(Path(a).name if a.startswith("/") else a for a in argv))),
            "commit": commit(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": machine,
            "versions": versions(),
        }
        self._began = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._began

    def add(self, *rows: Row) -> None:
        """Append rows and write the file."""
        self.rows.extend(rows)
        self.write()

    def as_dict(self) -> dict[str, Any]:
        return {
            **self.head,
            "seconds": round(self.elapsed, 1),
            "rows": [{k: _rounded(v) for k, v in dataclasses.asdict(row).items()} for row in self.rows],
        }

    def write(self) -> None:
        """Replace the file in one step, so that an interrupted run leaves a readable one."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(self.path.suffix + ".part")
        beside.write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        beside.replace(self.path)

    @property
    def bad(self) -> list[Row]:
        """Rows that make the run a failure."""
        return [row for row in self.rows if row.status in ("failed", "wrong")]


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None  # JSON has no infinity


def read_report(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The head and the rows of a report file.

    Raises
    ------
    ValueError
        If the file is of another schema.
    """
    content = json.loads(path.read_text())
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected schema {SCHEMA}, got {content.get('schema')}")
    rows = [Row(**row) for row in content.pop("rows")]
    return content, rows


def require(needs: Sequence[str]) -> None:
    """LookupError unless the library has these names."""
    for need in needs:
        try:
            getattr(importlib.import_module("cupy_lora"), need)
        except (ImportError, AttributeError) as error:
            raise LookupError(f"cupy_lora.{need} is not there ({type(error).__name__}: {error})") from error


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A step function that takes one line for each thing done: above a bar on a terminal, numbered elsewhere."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, transient=True) as bar:
            task = bar.add_task("", total=total)

            def step(line: str) -> None:
                bar.console.print(line, markup=False, highlight=False)
                bar.advance(task)

            yield step
        return
    done = 0

    def count(line: str) -> None:
        nonlocal done
        done += 1
        say(f"[{done:>3}/{total}] {line}")

    yield count


@contextlib.contextmanager
def watchdog(seconds: float, what: str) -> Iterator[None]:
    """Ends the process with status 3 if the block takes longer: a kernel that hangs cannot be stopped otherwise."""

    def give_up() -> None:
        say(f"stopping: {what} did not end within {seconds:.0f} s", err=True)
        os._exit(3)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def say(text: str, *, err: bool = False) -> None:
    """One line, flushed: a run that is cut off keeps what it printed."""
    print(text, file=sys.stderr if err else sys.stdout, flush=True)
