"""Kernel sources to libraries: g++, and a cache that test processes share."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cupy_lora import _jit, _paths

_HERE = Path(__file__).resolve().parent

_sources: Path | None = None


def sources() -> Path:
    """The folder that kernels are compiled from."""
    return _sources or _paths.cuda_src()


@contextlib.contextmanager
def patched(file: str, *changes: tuple[str, str]) -> Iterator[None]:
    """Within this context kernels are compiled from sources that are changed.

    Each change replaces a text that occurs exactly once in the files that match ``file`` (such as ``lora*.cuh``).
    """
    global _sources
    with tempfile.TemporaryDirectory(prefix="cupy_lora_patched_") as folder:
        shutil.copytree(sources(), folder, dirs_exist_ok=True)
        for old, new in changes:
            places = {path: path.read_text().count(old) for path in Path(folder).glob(file)}
            if sum(places.values()) != 1:
                raise ValueError(f"{file}: expected one place that reads {old!r}, got {sum(places.values())}")
            path = max(places, key=lambda path: places[path])
            path.write_text(path.read_text().replace(old, new))
        before, _sources = _sources, Path(folder)
        try:
            yield
        finally:
            _sources = before


def cache_folder() -> Path:
    """Where builds are kept: per user, shared by test processes."""
    folder = os.environ.get("CUPY_LORA_SIMT_CACHE")
    path = Path(folder) if folder else Path(tempfile.gettempdir()) / f"cupy_lora_simt_{os.getuid()}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


@functools.cache
def cuda_includes() -> tuple[Path, ...]:
    """The folders of cuda_fp16.h and of nv/target, which it includes: in wheels, or in a toolkit."""
    candidates = []
    with contextlib.suppress(ImportError):
        import nvidia

        for base in nvidia.__path__:
            candidates += [Path(base) / "cu13" / "include", Path(base) / "cuda_runtime" / "include"]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            candidates.append(Path(os.environ[variable]) / "include")
    candidates.append(Path("/usr/local/cuda/include"))
    found = []
    for folders, headers in (
        (candidates, ("cuda_fp16.h", "cuda_bf16.h", "vector_types.h")),
        ([place for folder in candidates for place in (folder, folder / "cccl")], ("nv/target",)),
    ):
        folder = next((f for f in folders if all((f / header).is_file() for header in headers)), None)
        if folder is None:
            raise RuntimeError(
                f"the simt tests need CUDA's headers: expected {', '.join(headers)} of nvidia-cuda-runtime "
                f"and nvidia-cuda-cccl or of a toolkit (CUDA_HOME), got none in {', '.join(map(str, folders))}"
            )
        found.append(folder)
    return tuple(dict.fromkeys(found))


@functools.cache
def _compiler() -> tuple[str, ...]:
    """The command that builds a library, without sources and optimisation."""
    # No GNU_UNIQUE: two specialisations define inline variables of one name and different values.
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"]
    command += ["-fno-omit-frame-pointer", "-fno-strict-aliasing", "-fwrapv", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]
    command += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Wno-unused-function"]
    with contextlib.suppress(OSError):
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
        if flags and {"avx2", "bmi2", "f16c", "fma"} <= set(flags[1].split()):
            command.append("-march=x86-64-v3")
    return (*command, f"-I{_HERE}", *(f"-I{folder}" for folder in cuda_includes()))


@functools.cache
def _kernel_options() -> tuple[str, ...]:
    """How kernels are compiled: misaligned accesses and indices outside local arrays trap, others are reported."""
    checks = (
        "-fsanitize=alignment,bounds-strict,object-size",
        "-fsanitize-undefined-trap-on-error",
        "-DCUPY_LORA_SIMT",
    )
    races = ("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "-fno-threadsafe-statics")
    if os.environ.get("CUPY_LORA_SIMT_DEBUG"):
        return ("-O0", "-g3", *checks, *races)
    if os.environ.get("CUPY_LORA_SIMT_COVERAGE"):
        return ("-O0", "-g1", "--coverage", *checks)
    return ("-O1", "-g1", *checks, *races)


def _closure(path: Path, folder: Path, seen: dict[Path, bytes]) -> None:
    if path in seen or not path.is_file():
        return
    seen[path] = path.read_bytes()
    for name in re.findall(rb'^\s*#include\s+"([^"]+)"', seen[path], re.M):
        for base in (path.parent, folder, _HERE):
            _closure((base / name.decode()).resolve(), folder, seen)


def _digest(unit: str, folder: Path, options: tuple[str, ...]) -> str:
    """Names a build by all that goes into it: the compiler, the options and each source that is read."""
    files: dict[Path, bytes] = {}
    for include in re.findall(r'#include "([^"]+)"', unit):
        for base in (folder, _HERE):
            _closure((base / include).resolve(), folder, files)
    digest = hashlib.sha256(repr((_compiler(), options, unit)).encode())
    for path in sorted(files, key=lambda p: p.name):
        digest.update(path.name.encode() + b"\0" + files[path] + b"\0")
    return digest.hexdigest()[:24]


def _library(name: str, unit: str, folder: Path, options: tuple[str, ...]) -> Path:
    """The library of a translation unit, built unless it is in the cache; safe among processes."""
    library = cache_folder() / f"{name}-{_digest(unit, folder, options)}.so"
    if library.exists():
        return library
    scratch = Path(tempfile.mkdtemp(prefix="build_", dir=cache_folder()))
    try:
        source, built = scratch / f"{library.stem}.cpp", scratch / library.name
        compiled = source.with_suffix(".o")
        source.write_text(unit)
        # Linked without the sanitizer's library: the engine has what it would have.
        linked = [option for option in options if option in ("--coverage",)]
        for command in (
            [*_compiler(), *options, f"-I{folder}", "-c", str(source), "-o", str(compiled)],
            [_compiler()[0], "-shared", *linked, str(compiled), "-o", str(built), "-ldl"],
        ):
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode != 0:
                raise RuntimeError(f"{name} did not compile for the CPU:\n{' '.join(command)}\n{result.stderr[:6000]}")
        built.replace(library)
    finally:
        if "--coverage" not in options:  # gcov's notes and counts lie beside the source
            shutil.rmtree(scratch)
    return library


def _engine_unit() -> str:
    return "".join(f'#include "engine/{part.name}"\n' for part in sorted((_HERE / "engine").glob("*.cpp")))


def engine() -> Path:
    """The library that runs the threads of every kernel."""
    options = ("-O0", "-g3") if os.environ.get("CUPY_LORA_SIMT_DEBUG") else ("-O2", "-g1")
    return _library("engine", _engine_unit(), _HERE, options)


@functools.cache
def _precompiled() -> Path:
    """A folder with ``ahead.h`` and the compiled form of what every kernel includes: half of the time of a build."""
    files: dict[Path, bytes] = {}
    _closure(_HERE / "simt.h", _HERE, files)
    digest = hashlib.sha256(repr((_compiler(), _kernel_options())).encode())
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + files[path] + b"\0")
    folder = cache_folder() / f"ahead-{digest.hexdigest()[:24]}"
    if not folder.exists():
        scratch = Path(tempfile.mkdtemp(prefix="build_", dir=cache_folder()))
        header = scratch / "ahead.h"
        header.write_text('#include "simt.h"\n')
        command = [*_compiler(), *_kernel_options(), "-x", "c++-header", str(header), "-o", f"{header}.gch"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(f"simt.h did not compile:\n{' '.join(command)}\n{result.stderr[:6000]}")
        try:
            scratch.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(scratch)
    return folder


def specialisation(kernel: _jit.Kernel, folder: Path) -> Path:
    """The library of one specialisation of a kernel, from the sources in ``folder``."""
    unit = f'#include "{kernel.source}.cu"\nSIMT_KERNEL({kernel.symbol})\n'
    defines = tuple(f"-D{name}={value}" for name, value in kernel.defines)
    options = (*_kernel_options(), *defines)
    if "--coverage" not in options:
        options = (*options, f"-I{_precompiled()}", "-include", "ahead.h")
    return _library(Path(kernel.source).name, unit, folder, options)


def symbolised(text: str, library: Path) -> str:
    """The text with its code addresses ("@1f3@2a0") replaced by places in the kernel sources."""
    addresses = sorted(set(re.findall(r"@([0-9a-f]+)", text)))
    tool = shutil.which("addr2line")
    places: dict[str, str] = {}
    for address in addresses if tool else ():
        command = [str(tool), "-i", "-e", str(library), address]
        out = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        lines = [Path(line.split(" ")[0]).name for line in out.splitlines()]
        places[address] = " < ".join(line for line in lines if re.match(r"(?!ptx(_wgmma)?\.)[^:]*\.cuh?:", line))

    def replace(match: re.Match[str]) -> str:
        chain = [places[address] for address in re.findall(r"@([0-9a-f]+)", match[0]) if places.get(address)]
        return f"at {' < '.join(chain)}" if chain else match[0]

    return re.sub(r"(?:@[0-9a-f]+)+", replace, text)
