"""Compile a kernel for any architecture with NVRTC, without a GPU, as the library would, and read what it uses."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cupy_backends.cuda.libs import nvrtc

from cupy_lora import _cubins, _jit

_CACHE = Path(__file__).resolve().parent.parent / ".pytest_cache" / "nvrtc"


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses, as ptxas reports it.

    Attributes
    ----------
    registers : int
        Per thread.
    stack_bytes, spill_bytes : int
        Local memory per thread: the frame (arrays that are indexed at run time), and stores plus loads of registers.
    static_shared_bytes : int
    warnings : str
        What the compiler said besides the figures.
    """

    registers: int
    stack_bytes: int
    spill_bytes: int
    static_shared_bytes: int
    warnings: str

    @property
    def local_bytes(self) -> int:
        return self.stack_bytes + self.spill_bytes


def options(kernel: _jit.Kernel, arch: int) -> tuple[str, ...]:
    """The options that a launch's kernel is compiled with."""
    return _cubins.options(_cubins.unit_of(kernel, arch))


def compile_kernel(kernel: _jit.Kernel, arch: int, *, cache: bool = True) -> Resources:
    """Compile one specialisation to machine code; a RuntimeError with the compiler's log where it does not compile.

    Logs are kept by a digest of all that goes into the compile: a second test run costs nothing, and kernels of one
    translation unit are compiled once.
    """
    source = _jit.source_text(kernel)
    flags = (*options(kernel, arch), "--ptxas-options=-v")
    identity = json.dumps([nvrtc.getVersion(), source, flags])
    path = _CACHE / f"{hashlib.sha256(identity.encode()).hexdigest()}.log"
    if cache and path.is_file():
        return read_log(path.read_text(), kernel.symbol)
    log = compile_source(source, f"{kernel.source}-unit.cu", flags)
    if cache:
        _CACHE.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=_CACHE)  # several test processes write here: rename whole files
        with os.fdopen(handle, "w") as file:
            file.write(log)
        Path(name).replace(path)
    return read_log(log, kernel.symbol)


def compile_source(source: str, name: str, flags: tuple[str, ...]) -> str:
    """The compiler's log; a RuntimeError where it made no machine code."""
    program = nvrtc.createProgram(source, name, (), ())
    try:
        try:
            nvrtc.compileProgram(program, flags)
        except nvrtc.NVRTCError as error:
            log = str(nvrtc.getProgramLog(program)).rstrip("\0")
            raise RuntimeError(f"{name} did not compile with {' '.join(flags)}: {error}\n{log}") from error
        if not nvrtc.getCUBIN(program):
            raise RuntimeError(f"{name}: NVRTC made no machine code with {' '.join(flags)}")
        return str(nvrtc.getProgramLog(program)).rstrip("\0")
    finally:
        nvrtc.destroyProgram(program)


def read_log(log: str, symbol: str) -> Resources:
    """The figures of one entry function from the log of ``--ptxas-options=-v``."""
    entry = re.search(
        rf"Compiling entry function '{re.escape(symbol)}' for (.*?)(?=Compiling entry function|\Z)", log, re.S
    )
    if entry is None:
        raise RuntimeError(f"no entry function {symbol} in the compiler's log:\n{log}")
    text = entry.group(1)

    def figure(pattern: str, *, needed: bool = True) -> int:
        # Functions that are called have lines of their own below the entry's.
        found = re.findall(pattern, text)
        if not found and needed:
            raise RuntimeError(f"no '{pattern}' in the compiler's log:\n{text}")
        return sum(map(int, found))

    figures = ("ptxas info", "ptxas  ", "    ")
    # What the assembler makes slower than it is written comes as information with a number (C7515: serial products).
    rest = [line for line in log.splitlines() if line.strip() and ("(C7" in line or not line.startswith(figures))]
    return Resources(
        registers=figure(r"Used (\d+) registers"),
        stack_bytes=figure(r"(\d+) bytes stack frame"),
        spill_bytes=figure(r"(\d+) bytes spill stores") + figure(r"(\d+) bytes spill loads"),
        static_shared_bytes=figure(r"(\d+) bytes smem", needed=False),
        warnings="\n".join(rest),
    )
