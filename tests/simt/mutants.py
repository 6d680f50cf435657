"""Does simt notice a wrong kernel? ``python tests/simt/mutants.py [--files norm.cu ...] [--sample N]``.

Changes one thing at a time in a copy of the sources (removes a ``__syncthreads()``, turns a ``<`` into
``<=``, changes the distance of a shuffle) and runs the simt tests of the kernels that include the file.
Prints a table; fails where fewer than nine in ten changes turn a test red.

Not changed: what is decided when the kernel is compiled (``constexpr``, ``static_assert``, ``#if``), and
the smaller or larger of two values (``a < b ? a : b``), which is the same with ``<=``.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "cuda_src"
REQUIRED = 0.9
TIMEOUT = 900  # seconds a mutant's tests may take; a test that hangs is red too


@dataclass(frozen=True)
class Mutant:
    """One change of one place."""

    file: str
    start: int
    stop: int
    text: str
    line: int
    kind: str
    shows: str


@dataclass(frozen=True)
class Result:
    mutant: Mutant
    caught: bool
    by: str
    seconds: float


def _code(text: str) -> str:
    """The source with comments, and lines that are decided at compile time, blanked out: offsets stay."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    text = re.sub(r"//[^\n]*|/\*.*?\*/", blank, text, flags=re.S)
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


def mutants_of(path: Path) -> list[Mutant]:
    """Every change of one file."""
    text = path.read_text()
    code = _code(text)
    lines = text.splitlines()
    found: list[Mutant] = []

    def add(start: int, stop: int, new: str, kind: str) -> None:
        line = text.count("\n", 0, start) + 1
        found.append(Mutant(path.name, start, stop, new, line, kind, lines[line - 1].strip()))

    for match in re.finditer(r"__syncthreads\(\);", code):
        add(match.start(), match.end(), ";", "barrier removed")
    for match in re.finditer(r"(?<= )<(?= )", code):
        if not _picks_one(code, match.start()):
            add(match.start(), match.end(), "<=", "< to <=")
    for match in re.finditer(r"__shfl_(?:xor|up|down)_sync\([^;]*,\s*([^,;]+?)\)\s*;", code):
        add(match.start(1), match.end(1), f"({match[1]}) / 2", "shuffle distance")
    return found


def includers(name: str) -> set[str]:
    """Stems of the .cu files that a file is part of."""
    if name.endswith(".cu"):
        return {name.removesuffix(".cu")}
    stems: set[str] = set()
    for path in SOURCES.glob("*.cu*"):
        if re.search(rf'^\s*#include "{re.escape(name)}"', path.read_text(), re.M):
            stems |= includers(path.name)
    return stems


def tests_for(name: str) -> list[str]:
    """The test files of the kernels that a source is part of, those of the same stem first."""
    stems = includers(name) or {"ptx"}
    wanted = set()
    for stem in stems:
        own = ROOT / "tests" / f"test_{stem}.py"
        family = sorted((ROOT / "tests").glob(f"test_{stem.split('_')[0]}*.py"))
        wanted |= {own} if own.exists() else set(family)
        wanted |= {path for path in (ROOT / "tests").glob("test_*_forms.py") if f"{stem}_" in path.read_text()}
    if name == "ptx.cuh":
        wanted = {ROOT / "tests" / "test_ptx.py"}
    return [str(path.relative_to(ROOT)) for path in sorted(wanted)]


def run_tests(folder: Path, tests: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    """The simt tests of these files over the copy of the repository in ``folder``."""
    changes = {
        "PYTHONPATH": str(folder),
        "CUPY_LORA_SIMT_CACHE": str(folder / "builds"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "simt", "-p", "no:cacheprovider", *options, *tests]
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **changes},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def try_mutant(snapshot: Path, mutant: Mutant) -> Result:
    """Run the tests over a copy of the snapshot with the change in it."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cupy_lora_mutant_") as name:
        folder = Path(name)
        shutil.copytree(snapshot, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("builds"))
        target = folder / "cuda_src" / mutant.file
        text = target.read_text()
        target.write_text(text[: mutant.start] + mutant.text + text[mutant.stop :])
        try:
            run = run_tests(folder, tests_for(mutant.file))
        except subprocess.TimeoutExpired:
            return Result(mutant, True, "took too long", time.monotonic() - begin)
    seconds = time.monotonic() - begin
    if run.returncode == 0:
        return Result(mutant, False, "", seconds)
    failed = re.search(r"^FAILED (?:tests/)?(\S+)(?: - (.*))?", run.stdout, re.M)
    if run.returncode != 1 or not failed:
        raise RuntimeError(f"{mutant}: pytest ended with {run.returncode}:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return Result(mutant, True, f"{failed[1]}: {failed[2] or ''}"[:110], seconds)


def choose(files: list[str], sample: int, seed: int) -> list[Mutant]:
    """Every barrier and shuffle, and ``sample`` of the bounds (0: all)."""
    names = files or sorted(path.name for path in SOURCES.glob("*.cu*"))
    found = [mutant for name in names for mutant in mutants_of(SOURCES / name)]
    bounds = [mutant for mutant in found if mutant.kind == "< to <="]
    if sample and len(bounds) > sample:
        bounds = random.Random(seed).sample(bounds, sample)
    kept = set(bounds)
    return [mutant for mutant in found if mutant.kind != "< to <=" or mutant in kept]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", nargs="*", default=[], help="files of cuda_src (default: all)")
    parser.add_argument("--sample", type=int, default=0, help="try so many of the bounds (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--list", action="store_true", help="print the changes and try none")
    options = parser.parse_args()
    mutants = choose(options.files, options.sample, options.seed)
    if options.list:
        for mutant in mutants:
            print(f"{mutant.file}:{mutant.line}  {mutant.kind}  {mutant.shows}")
        print(len(mutants))
        return 0
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="cupy_lora_snapshot_") as folder, ThreadPoolExecutor(options.jobs) as pool:
        # A copy, so that edits during the run do not count as mutants; and it must be green without a change.
        snapshot = Path(folder)
        for part in ("cupy_lora", "cuda_src", "tests"):
            shutil.copytree(ROOT / part, snapshot / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", snapshot)
        tests = sorted({test for mutant in mutants for test in tests_for(mutant.file)})
        control = run_tests(snapshot, tests, "-n", str(options.jobs))
        if control.returncode != 0:
            print(f"red without any change:\n{control.stdout[-3000:]}{control.stderr[-1000:]}")
            return 2
        print(f"green without any change: {control.stdout.strip().splitlines()[-1]}", flush=True)
        for result in pool.map(lambda mutant: try_mutant(snapshot, mutant), mutants):
            results.append(result)
            mutant = result.mutant
            verdict = "caught" if result.caught else "MISSED"
            place = f"{mutant.file}:{mutant.line}"
            print(
                f"{verdict}  {place:22} {mutant.kind:17} {result.seconds:5.0f} s  {result.by or mutant.shows}",
                flush=True,
            )
    print(f"\n{'':22}{'caught':>8}{'of':>6}")
    for kind in ("barrier removed", "< to <=", "shuffle distance"):
        of_kind = [result for result in results if result.mutant.kind == kind]
        print(f"{kind:22}{sum(result.caught for result in of_kind):8}{len(of_kind):6}")
    caught = sum(result.caught for result in results)
    print(f"{'all':22}{caught:8}{len(results):6}  {100 * caught / max(1, len(results)):.0f} %")
    return 0 if results and caught >= REQUIRED * len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
