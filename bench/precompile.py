"""Compiles ahead of the timing: each process calls its share of the cases once, which fills CuPy's disk cache."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from .model import ROOT, say

# What a compile process leaves out: it writes nothing, and starts no processes of its own.
_WITH_VALUE = ("--json", "--plot", "--jobs", "--peers")


def child_arguments(given: Sequence[str]) -> list[str]:
    """The command line without what only the timing process does."""
    kept: list[str] = []
    skip = False
    for word in given:
        if skip:
            skip = False
        elif word in _WITH_VALUE:
            skip = True
        elif not word.startswith(tuple(f"{option}=" for option in _WITH_VALUE)):
            kept.append(word)
    return [*kept, "--peers", "none"]


def run(given: Sequence[str], jobs: int, timeout_s: float = 240.0) -> None:
    """Start the processes and wait for them; one that fails is reported, its cases compile later."""
    began = time.monotonic()
    base = [sys.executable, "-m", "bench", *child_arguments(given)]
    children = []
    for index in range(jobs):
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed below, after the process
        command = [*base, "--shard", f"{index}/{jobs}"]
        children.append((subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT), output))
    failed = 0
    for child, output in children:
        try:
            code = child.wait(max(timeout_s - (time.monotonic() - began), 1.0))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            code = -1
        if code != 0:
            failed += 1
            if failed == 1:
                output.seek(0)
                say(f"a compile process failed ({code}):\n{output.read()[-1500:]}", err=True)
        output.close()
    say(
        f"compiled ahead in {jobs} processes, {time.monotonic() - began:.0f} s"
        + (f", {failed} failed" if failed else "")
    )
