"""Machine code of the kernels: from a folder compiled ahead, from the cache on disk, or from NVRTC; none needs a GPU.

CuPy's own way (``RawModule``) compiles an empty file with each set of options in each process, to learn the compiler's
version: 20 ms a kernel even where it has the kernel. Here a kernel that is in the cache costs a read of its file.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import json
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from . import _env, _paths

if TYPE_CHECKING:
    from ._jit import Kernel

MANIFEST: Final = "cubins.json"
# A macro of kernels that use what one architecture alone has: they are compiled for it as `sm_90a`, and run there only.
ARCH_SPECIFIC: Final = "ARCH_SPECIFIC"
_DIGEST: Final = hashlib.sha256().digest_size * 2  # a file is the digest of the machine code, in hex, and then the code

# What is compiled apart: the kernels of one source and one set of macros are one unit.
Unit = tuple[str, tuple[tuple[str, "int | str"], ...], int]


def unit_of(kernel: Kernel, arch: int) -> Unit:
    """The unit that holds this kernel, for compute capability ``arch`` (90 = 9.0)."""
    return kernel.source, kernel.defines, arch


def options(unit: Unit) -> tuple[str, ...]:
    """What NVRTC is told."""
    from . import _jit

    _, defines, arch = unit
    suffix = "a" if dict(defines).get(ARCH_SPECIFIC) else ""
    return (*_jit.compile_options(arch, defines), "-ftz=true", f"-arch=sm_{arch}{suffix}")


def source_text(source: str) -> str:
    """The translation unit: the file, with the digest of all sources in it, as headers are part of a kernel too."""
    return f'// {_paths.source_digest()}\n#include "{source}.cu"\n'


def file_name(unit: Unit, compiler: Sequence[int] = ()) -> str:
    """The file of a unit; in the cache the compiler's version is part of it."""
    source, _, arch = unit
    flags = [flag for flag in options(unit) if not flag.startswith("-I")]  # the folder of the sources may move
    path = _paths.cuda_src() / f"{source}.cu"
    own = "" if path.parent == _paths.cuda_src() else path.read_text(encoding="utf-8")  # a test's: not in the digest
    identity = json.dumps([source_text(source), own, flags, list(compiler)])
    return f"{path.stem}-sm_{arch}-{hashlib.sha256(identity.encode()).hexdigest()[:32]}.cubin"


def cache_folder() -> Path:
    """Where compiled kernels are kept: beside CuPy's."""
    base = os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache"
    return Path(base) / "cupy_lora"


# ---- the compiler -------------------------------------------------------------------------------
@functools.cache
def _nvrtc() -> Any:
    try:
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
    except Exception as error:  # no CuPy, or no library: each raises its own type
        raise RuntimeError(
            "cupy_lora: a compiler is needed: expected CuPy and NVRTC (pip install 'cupy-lora[cuda13]' or "
            f"'cupy-lora[cuda12]' brings both), or the kernel in the folder that {_env.CUBINS.name} names, "
            f"got {type(error).__name__}: {error}"
        ) from error
    return nvrtc


@functools.cache
def target(arch: int) -> int:
    """The architecture to compile for: this one, or the newest one that runs on it and that the compiler knows."""
    known = _nvrtc().getSupportedArchs()
    fitting = [one for one in known if one // 10 == arch // 10 and one <= arch]
    if not fitting:
        version = ".".join(map(str, _nvrtc().getVersion()))
        raise RuntimeError(
            f"cupy_lora: NVRTC {version} does not compile for sm_{arch}: expected one of "
            f"{', '.join(f'sm_{one}' for one in known)}; a newer CUDA toolkit may"
        )
    return int(max(fitting))


def compile_unit(unit: Unit) -> bytes:
    """Machine code of a unit; RuntimeError with the compiler's log where there is none."""
    source, defines, arch = unit
    nvrtc = _nvrtc()
    program = nvrtc.createProgram(source_text(source), f"{source}-unit.cu", (), ())
    try:
        nvrtc.compileProgram(program, options(unit))
        return bytes(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError as error:
        log = str(nvrtc.getProgramLog(program)).rstrip("\0")
        raise RuntimeError(
            f"cupy_lora: {source}.cu did not compile for sm_{arch} with {dict(defines)}; the compiler said:\n{log}"
        ) from error
    finally:
        nvrtc.destroyProgram(program)


# ---- files --------------------------------------------------------------------------------------
def read(path: Path) -> bytes | None:
    """The machine code in a file; None where there is no such file, or a damaged one."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    code = data[_DIGEST:]
    return code if hashlib.sha256(code).hexdigest().encode() == data[:_DIGEST] else None


def write(path: Path, code: bytes) -> None:
    """Write a file whole: other processes may read it, or write it too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(code).hexdigest().encode() + code)
        Path(name).chmod(0o644)  # mkstemp's own is for the owner alone; a folder of kernels goes into an image
        Path(name).replace(path)
    except OSError:
        Path(name).unlink()
        raise


def prebuilt_folder() -> Path | None:
    """The folder that the environment names; RuntimeError where it holds kernels of other sources, or none."""
    name = _env.CUBINS.value
    if not name:
        return None
    _check_folder(name)
    return Path(name)


@functools.cache
def _check_folder(name: str) -> None:
    where = f"{_env.CUBINS.name}={name}"
    try:
        manifest = json.loads((Path(name) / MANIFEST).read_text(encoding="utf-8"))
        digest = str(manifest["sources"])
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise RuntimeError(
            f"cupy_lora: {where}: expected a folder written by 'python -m cupy_lora warmup --cubins', "
            f"got {type(error).__name__}: {error}"
        ) from None
    if digest != _paths.source_digest():
        raise RuntimeError(
            f"cupy_lora: {where}: expected kernels of this version's sources ({_paths.source_digest()[:12]}), "
            f"got those of {digest[:12]}: write the folder again with 'python -m cupy_lora warmup --cubins'"
        )


def write_manifest(folder: Path) -> None:
    """Say which sources a folder's kernels come from."""
    from . import __version__

    content = {"cupy_lora": __version__, "sources": _paths.source_digest(), "nvrtc": list(_nvrtc().getVersion())}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _check_folder.cache_clear()


def _prebuilt(source: str, defines: tuple[tuple[str, int | str], ...], arch: int) -> bytes | None:
    """A kernel of the folder compiled ahead, for this architecture or an older one of its generation."""
    folder = prebuilt_folder()
    if folder is None:
        return None
    for one in range(arch, arch // 10 * 10 - 1, -1):
        path = folder / file_name((source, defines, one))
        code = read(path)
        if code is not None:
            return code
        if path.exists():
            raise RuntimeError(f"cupy_lora: {path}: expected a whole file, got a damaged one")
    return None


_unwritable = False


def _cached(source: str, defines: tuple[tuple[str, int | str], ...], arch: int) -> bytes:
    """From the cache, or compiled and put there."""
    global _unwritable
    try:
        unit = source, defines, target(arch)
    except RuntimeError as error:
        raise RuntimeError(f"{error} (wanted: {source}.cu for sm_{arch} with {dict(defines)})") from error.__cause__
    path = cache_folder() / file_name(unit, _nvrtc().getVersion())
    code = read(path)
    if code is None:
        code = compile_unit(unit)
        try:
            write(path, code)
        except OSError as error:
            if not _unwritable:
                _unwritable = True
                warnings.warn(f"cupy_lora: compiled kernels cannot be kept in {path.parent}: {error}", stacklevel=2)
    return code


# ---- at most once -------------------------------------------------------------------------------
_lock = threading.Lock()
_found: dict[Unit, Future[bytes]] = {}


def cubin(kernel: Kernel, arch: int) -> bytes:
    """Machine code of the unit that holds this kernel. Threads that ask for one unit at once share one compile."""
    unit = unit_of(kernel, arch)
    with _lock:
        found = _found.get(unit)
        mine = found is None
        if found is None:
            found = _found[unit] = Future()
    if mine:
        try:
            found.set_result(_prebuilt(*unit) or _cached(*unit))
        except BaseException as error:
            with _lock:
                del _found[unit]
            found.set_exception(error)
            raise
    return found.result()


_waiting: collections.deque[tuple[Kernel, int]] = collections.deque()
_started: set[Unit] = set()
_threads = 0
_MOST_THREADS: Final = min(8, os.cpu_count() or 1)


def start(kernels: Sequence[Kernel], arch: int) -> None:
    """Find or compile these beside what the caller does; :func:`cubin` waits for them. Errors are left to it."""
    global _threads
    for kernel in kernels:
        unit = unit_of(kernel, arch)
        with _lock:
            if unit in _started:
                continue
            _started.add(unit)
            _waiting.append((kernel, arch))
            if _threads == _MOST_THREADS:
                continue
            _threads += 1
        threading.Thread(target=_work, name="cupy_lora compile").start()


def _work() -> None:
    global _threads
    while True:
        with _lock:
            # The interpreter waits for this thread at its end: what is not begun by then is not needed.
            if not _waiting or not threading.main_thread().is_alive():
                _threads -= 1
                return
            kernel, arch = _waiting.popleft()
        with contextlib.suppress(Exception):
            cubin(kernel, arch)


def forget(kernel: Kernel, arch: int) -> None:
    """Drop the machine code from memory, once it is loaded."""
    with _lock:
        found = _found.get(unit_of(kernel, arch))
        if found is not None and found.done():
            del _found[unit_of(kernel, arch)]


def build(
    kernels: Sequence[Kernel],
    arch: int,
    *,
    jobs: int | None = None,
    folder: Path | None = None,
    step: Callable[[], None] = lambda: None,
) -> int:
    """Compile what is not compiled yet, in parallel; the number of units.

    Parameters
    ----------
    kernels : sequence of Kernel
    arch : int
        Compute capability, 90 for 9.0; no GPU is needed.
    jobs : int, optional
        Threads: NVRTC works beside the interpreter. Default: one a core.
    folder : Path, optional
        Write the machine code here, for ``CUPY_LORA_CUBINS``.
    step : callable
        Called as each unit is done.
    """
    units = {unit_of(kernel, arch): kernel for kernel in kernels}

    def one(kernel: Kernel) -> None:
        if folder is not None:
            write(folder / file_name(unit_of(kernel, target(arch))), _cached(*unit_of(kernel, arch)))
        else:
            cubin(kernel, arch)
            forget(kernel, arch)

    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        for done in as_completed([pool.submit(one, kernel) for kernel in units.values()]):
            done.result()
            step()
    if folder is not None:
        write_manifest(folder)
    return len(units)
