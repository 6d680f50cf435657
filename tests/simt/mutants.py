"""Does simt notice a wrong kernel? ``python tests/simt/mutants.py [--files norm.cu ...] [--sample N]``.

Changes one thing at a time in a copy of the sources: removes a barrier (``__syncthreads()``,
``__syncwarp()``, a meeting of warps, a fence or a wait of warpgroup products), turns a ``<`` into ``<=``,
halves the distance of a shuffle. For each change it runs the simt tests that come by the place, until one
is red. Prints a table; fails where fewer than nine in ten changes of a family of kernels turn a test red.

All changes are compiled into one set of kernels, and a number in memory says which of them is made
(``mutants.h``): each kernel is built once. A test that does not come by a place cannot notice its change
and is not run for it; which do is recorded in a run without a change, which must be green. Each run is a
process of its own, forked after collection, so that a wild write or a hang ends nothing else.

Not changed: what is decided when the kernel is compiled (``constexpr``, ``static_assert``, ``#if``), the
smaller or larger of two values (``a < b ? a : b``), which is the same with ``<=``, and what ``exempt.py`` lists.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import hypothesis
import pytest
from _pytest.runner import runtestprotocol
from exempt import EXEMPT  # beside this file
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "cuda_src"
KINDS = ("barrier removed", "< to <=", "shuffle distance")
REQUIRED = 0.9
LAUNCH_SECONDS = 20  # CPU time after which a launch hangs
JOB_SECONDS = 1800  # after which the tests of a change do
NONE = 0xFFFFFFFF  # no place is changed
PLACES = 8192  # as in mutants.h


@dataclass(frozen=True)
class Mutant:
    """One change of one place."""

    file: str
    start: int
    stop: int
    text: str  # what stands there in the copy: both ways, chosen by the number
    line: int
    kind: str
    shows: str
    changed: str  # what would read otherwise: this line and the next, one space between words


@dataclass(frozen=True)
class Ended:
    """How a forked process ended."""

    red: str  # the first test that failed, or how the process died; empty where all passed
    why: str
    seconds: float  # CPU time without builds
    reached: frozenset[int]


Job = tuple[int, int, list[pytest.Item]]  # key of the result, number of the change, tests in their order


def _code(text: str) -> str:
    """The source with comments, and lines that are decided at compile time, blanked out: offsets stay."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    text = re.sub(r"//[^\n]*|/\*.*?\*/", blank, text, flags=re.S)
    text = re.sub(r"^#ifndef CUPY_LORA_SIMT\n.*?^#(?:else|endif)", blank, text, flags=re.M | re.S)  # the GPU's bodies
    text = re.sub(r"^[ \t]*#[^\n]*", blank, text, flags=re.M)
    text = re.sub(r"\bstatic_assert\s*\(.*?\);", blank, text, flags=re.S)
    return re.sub(r"^[^\n]*\bconstexpr\b(?:[^\n]*\([^\n]*\)\s*\{|[^;{]*[;{])", blank, text, flags=re.M)


def _picks_one(code: str, at: int) -> bool:
    """Whether the ``<`` at this offset belongs to ``a < b ? a : b`` or ``a < b ? b : a``."""
    left = re.search(r"[^=(?:,&|{};]+$", code[:at])
    right = re.match(r"<([^?]+)\?([^:;]+):([^;]+)", code[at:])
    if not left or not right:
        return False

    def plain(text: str) -> str:
        return re.sub(r"\breturn\b|static_cast<\w+>|(?<=\d)[uf]\b|[\s()]", "", text)

    a, b, then, otherwise = plain(left[0]), plain(right[1]), plain(right[2]), plain(right[3])
    return any(then == x and otherwise.startswith(y) for x, y in ((a, b), (b, a)))


def mutants_of(path: Path, number: int) -> list[Mutant]:
    """Every change of one file, numbered from ``number`` on."""
    text = path.read_text()
    code = _code(text)
    lines = text.splitlines()
    found: list[Mutant] = []

    def add(start: int, stop: int, kind: str, new: str) -> None:
        line = text.count("\n", 0, start) + 1
        shows = lines[line - 1].strip()
        after = "\n".join(text[stop:].split("\n", 2)[:2])
        changed = " ".join(f"{text[text.rfind(chr(10), 0, start) + 1 : start]}<={after}".split())
        found.append(Mutant(path.name, start, stop, new, line, kind, shows, changed))

    def at() -> int:
        return number + len(found)

    meetings = r"(?:__syncthreads|__syncwarp|crew_meet)\(\)|ptx::barrier_meet\([^;]*\)"
    for match in re.finditer(rf"({meetings}|ptx::wgmma_(?:fence|fence_shared|wait<\d>)\(\));", code):
        add(match.start(), match.end(), KINDS[0], f"(simt::mutated({at()}) ? void() : {match[1]});")
    for match in re.finditer(r"(?<= )<(?= )", code):
        if not _picks_one(code, match.start()):
            add(match.start(), match.end(), KINDS[1], f"< simt::Bound{{{at()}}} <")
    for match in re.finditer(r"__shfl_(?:xor|up|down)_sync\([^;]*?,\s*([^,;()]+)\)", code):
        distance = match[1]
        add(match.start(1), match.end(1), KINDS[2], f"(simt::mutated({at()}) ? ({distance}) / 2 : ({distance}))")
    return found


def all_mutants() -> list[Mutant]:
    """Every change of every file; a change's number is its index."""
    found: list[Mutant] = []
    for path in sorted(SOURCES.glob("*.cu*")):
        found += mutants_of(path, len(found))
    assert len(found) <= PLACES
    return found


def exempt(mutants: list[Mutant]) -> tuple[set[int], list[str]]:
    """The numbers of the changes that ``exempt.py`` lists, and what is wrong with its entries."""
    numbers: set[int] = set()
    wrong = []
    for file, bounds in EXEMPT.items():
        of_file = [i for i, m in enumerate(mutants) if m.file == file and m.kind == KINDS[1]]
        for changed, count, _ in bounds:
            places = {i for i in of_file if changed in mutants[i].changed}
            if len(places) != count:
                wrong.append(f"exempt.py: expected {count} bounds of {file} that read {changed!r}, got {len(places)}")
            numbers |= places
    return numbers, wrong


def take_snapshot(folder: Path, mutants: list[Mutant]) -> None:
    """A copy of what the tests need, with all changes compiled into the kernels."""
    for part in ("cupy_lora", "cuda_src", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for mutant in sorted(mutants, key=lambda m: -m.start):
        path = folder / "cuda_src" / mutant.file
        text = path.read_text()
        path.write_text(text[: mutant.start] + mutant.text + text[mutant.stop :])
    header = folder / "tests" / "simt" / "simt.h"
    header.write_text(header.read_text() + '#include "mutants.h"\n')


class Trial:
    """A pytest plugin: instead of running the collected tests once it tries the changes with them."""

    def __init__(self, folder: Path, mutants: list[Mutant], chosen: list[int], jobs: int) -> None:
        self.folder, self.mutants, self.chosen, self.jobs = folder, mutants, chosen, jobs
        self.red: dict[int, str] = {}  # by number of the change; empty: missed
        self.problem = ""
        self.console = Console(soft_wrap=True, highlight=False, markup=False)

    def pytest_collection(self) -> None:
        # An example that fails need not be made small.
        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile("mutants", hypothesis.settings(phases=phases))
        hypothesis.settings.load_profile("mutants")

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        # test_simt.py plants faults of its own, in the sources as they are.
        tests = [item for item in session.items if item.path.name != "test_simt.py"]
        seconds = [0.0] * len(tests)
        passing: dict[int, list[int]] = {number: [] for number in self.chosen}  # tests that come by
        alone: list[Job] = [(i, NONE, [test]) for i, test in enumerate(tests)]
        for i, ended in self._run("tests without a change", len(alone), iter(alone)):
            if ended.red:
                self.problem = f"red without a change: {ended.red}\n{ended.why}"
                return True
            seconds[i] = ended.seconds
            for number in ended.reached & passing.keys():
                passing[number].append(i)

        kills: Counter[tuple[str, int]] = Counter()  # the test that found the last one may find the next one

        def jobs() -> Iterator[Job]:
            for number in self.chosen:
                file = self.mutants[number].file
                order = sorted(passing[number], key=lambda i: seconds[i] / (1 + 10 * kills[file, i]))
                yield number, number, [tests[i] for i in order]

        for number, ended in self._run("changes", len(self.chosen), jobs()):
            mutant = self.mutants[number]
            self.red[number] = ended.red
            kills.update((mutant.file, i) for i in passing[number] if tests[i].nodeid == ended.red)
            if not ended.red:
                why = f"{len(passing[number])} tests come by" if passing[number] else "no test comes by"
                self.console.print(f"missed  {mutant.file}:{mutant.line}  {mutant.kind} ({why})  {mutant.shows}")
        return True

    def _run(self, name: str, total: int, work: Iterator[Job]) -> Iterator[tuple[int, Ended]]:
        """Run jobs, so many at a time, and yield how they ended as they do."""
        running: dict[int, tuple[int, Path]] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(name, total=total)
            job = next(work, None)
            while job or running:
                while job and len(running) < self.jobs:
                    key, number, tests = job
                    handle, path = tempfile.mkstemp(dir=self.folder, prefix="mutant_")
                    with os.fdopen(handle, "wb") as file:
                        file.write(number.to_bytes(4, sys.byteorder) + bytes(PLACES))
                    child = os.fork()
                    if child == 0:
                        _run_tests(tests, Path(path))
                    running[child] = key, Path(path)
                    job = next(work, None)
                child, status = os.wait()
                key, path = running.pop(child)
                progress.advance(task)
                yield key, _ended(path, status)


def _run_tests(tests: list[pytest.Item], path: Path) -> NoReturn:
    """In a process of its own: run the tests up to the first that fails."""
    signal.alarm(JOB_SECONDS)
    os.environ["CUPY_LORA_SIMT_MUTANTS"] = str(path)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        os.dup2(null, stream)
    try:
        from simt import runner  # of the snapshot

        runner._SECONDS = LAUNCH_SECONDS
        begin, red, why = time.process_time(), "", ""
        for test, following in zip(tests, [*tests[1:], None], strict=True):
            failed = [report for report in runtestprotocol(test, log=False, nextitem=following) if report.failed]
            if failed:
                red, why = test.nodeid, failed[0].longreprtext
                break
        path.with_suffix(".json").write_text(json.dumps((red, why, time.process_time() - begin)))
    except BaseException:
        os._exit(1)
    os._exit(0)


def _ended(path: Path, status: int) -> Ended:
    reached = frozenset(i for i, byte in enumerate(path.read_bytes()[4:]) if byte)
    path.unlink()
    report = path.with_suffix(".json")
    if status != 0:
        return Ended(f"the process ended with status {status}", "", 0, reached)
    red, why, seconds = json.loads(report.read_text())
    report.unlink()
    return Ended(red, why, seconds, reached)


def family(file: str) -> str:
    stem = file.split(".")[0].split("_")[0]
    return "lora" if stem in ("bgmv", "sgmv") else stem


def show(console: Console, mutants: list[Mutant], red: dict[int, str]) -> float:
    """Print what was tried and caught; the smallest share of a family and of all."""
    table = Table("", "tried", "caught", "", "missed, by line")
    shares = []

    def add(name: str, numbers: list[int], lines: bool) -> None:
        if not numbers:
            return
        caught = sum(bool(red[number]) for number in numbers)
        missed = ", ".join(str(mutants[number].line) for number in numbers if not red[number]) if lines else ""
        table.add_row(name, str(len(numbers)), str(caught), f"{100 * caught / len(numbers):.0f} %", missed)
        if not lines:
            shares.append(caught / len(numbers))

    for file in sorted({mutants[number].file for number in red}):
        add(file, sorted(number for number in red if mutants[number].file == file), True)
    table.add_section()
    for kind in KINDS:
        add(kind, [number for number in red if mutants[number].kind == kind], False)
    shares.clear()
    table.add_section()
    for name in sorted({family(mutants[number].file) for number in red}):
        add(f"{name}*", [number for number in red if family(mutants[number].file) == name], False)
    table.add_section()
    add("all", list(red), False)
    console.print(table)
    return min(shares)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", nargs="*", default=[], help="files of cuda_src (default: all)")
    parser.add_argument("--kinds", nargs="*", default=[], choices=KINDS, help="what to change (default: all)")
    parser.add_argument("--lines", nargs="*", type=int, default=[], help="lines of these files (default: all)")
    parser.add_argument("--sample", type=int, default=0, help="try so many of the bounds (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--list", action="store_true", help="print the changes and try none")
    parser.add_argument("tests", nargs="*", help="after --: what pytest gets (default: all tests marked simt)")
    options = parser.parse_args()
    mutants = all_mutants()
    left_out, wrong = exempt(mutants)
    print("\n".join(wrong), end="\n" if wrong else "")
    chosen = [i for i, m in enumerate(mutants) if i not in left_out and (not options.files or m.file in options.files)]
    if options.lines:
        chosen = [i for i in chosen if mutants[i].line in options.lines]
    if options.kinds:
        chosen = [i for i in chosen if mutants[i].kind in options.kinds]
    bounds = [i for i in chosen if mutants[i].kind == "< to <="]
    if options.sample and len(bounds) > options.sample:
        dropped = set(bounds) - set(random.Random(options.seed).sample(bounds, options.sample))
        chosen = [i for i in chosen if i not in dropped]
    if options.list:
        for i in chosen:
            print(f"{mutants[i].file}:{mutants[i].line}  {mutants[i].kind}  {mutants[i].shows}")
        print(len(chosen))
        return 0
    with tempfile.TemporaryDirectory(prefix="cupy_lora_mutants_") as name:
        folder = Path(name)
        take_snapshot(folder, mutants)
        trial = Trial(folder, mutants, chosen, options.jobs)
        os.environ.setdefault("CUPY_LORA_SIMT_CACHE", str(folder / "builds"))
        os.chdir(folder)
        sys.path.insert(0, name)
        sys.dont_write_bytecode = True
        arguments = [
            "-m",
            "simt",
            "-s",
            "-o",
            "addopts=",
            "-p",
            "no:terminal",
            "-p",
            "no:cacheprovider",
            *options.tests,
        ]
        status = pytest.main(arguments, plugins=[trial])
        os.chdir(ROOT)
    if trial.problem or len(trial.red) < len(chosen) or not chosen:
        print(trial.problem or f"pytest ended with {status}")
        return 2
    least = show(trial.console, mutants, trial.red)
    print(f"{len(left_out)} bounds of exempt.py were not tried")
    return 2 if wrong else 0 if least >= REQUIRED else 1


if __name__ == "__main__":
    sys.exit(main())
