"""Line coverage of the CUDA sources under simt: ``python tests/simt/gcov.py [pytest arguments]``.

Builds every kernel with gcov, runs the tests marked simt, prints the share of executable lines that
ran for each file of cuda_src and the lines that did not. Fails below 95 % in any file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = 95.0  # percent of each file


def line_counts(folder: Path) -> dict[str, dict[int, int]]:
    """How often each line of each source ran, over all builds in ``folder``."""
    counts: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for data in sorted(folder.rglob("*.gcda")):
        command = ["gcov", "--json-format", "--stdout", str(data)]
        out = subprocess.run(command, capture_output=True, check=True, cwd=data.parent).stdout
        for report in out.splitlines():
            for file in json.loads(report)["files"]:
                path = Path(os.path.normpath(data.parent / file["file"]))
                if path.parent != ROOT / "cuda_src":
                    continue
                for line in file["lines"]:
                    counts[path.name][line["line_number"]] += line["count"]
    return counts


def ranges(lines: list[int]) -> str:
    """[1, 2, 3, 7] as "1-3, 7"."""
    parts: list[list[int]] = []
    for line in lines:
        if parts and line == parts[-1][1] + 1:
            parts[-1][1] = line
        else:
            parts.append([line, line])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="cupy_lora_gcov_") as folder:
        env = {**os.environ, "CUPY_LORA_SIMT_COVERAGE": folder, "CUPY_LORA_SIMT_CACHE": folder}
        # The planted faults want the race detector, which builds that count lines leave out.
        planted = f"--ignore={ROOT / 'tests' / 'test_simt.py'}"
        tests = [sys.executable, "-m", "pytest", "-q", "-m", "simt", planted, *sys.argv[1:]]
        status = subprocess.run(tests, env=env, cwd=ROOT, check=False).returncode
        counts = line_counts(Path(folder))
    if not counts:
        print("no line of cuda_src ran")
        return 1
    low = False
    print(f"\n{'file':20}{'lines':>7}{'run':>7}{'':>8}  not run")
    for name, lines in sorted(counts.items()):
        missed = sorted(line for line, count in lines.items() if count == 0)
        percent = 100 * (1 - len(missed) / len(lines))
        low |= percent < REQUIRED
        print(f"{name:20}{len(lines):7}{len(lines) - len(missed):7}{percent:7.1f}%  {ranges(missed)}")
    total = sum(len(lines) for lines in counts.values())
    run = sum(count > 0 for lines in counts.values() for count in lines.values())
    print(f"{'all':20}{total:7}{run:7}{100 * run / total:7.1f}%")
    never = sorted({p.name for p in (ROOT / "cuda_src").glob("*.cu")} - set(counts))
    if never:
        print(f"never run: {', '.join(never)}")
    return 1 if status or low or never else 0


if __name__ == "__main__":
    sys.exit(main())
