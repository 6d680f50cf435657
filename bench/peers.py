"""The peers that are timed against this library on the same buffers, each only if its package is installed.

Every peer is checked first (more loosely than this library: most round between their two steps), and only its calls
are timed: what it prepares once per batch or per adapter is made outside. The versions they were written for, and how
to install them, are in NOTES.md.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np

from cupy_lora import _env

from . import bench_metadata
from .bench_attention import Attention, AttentionSet, check_attention
from .bench_lora import Layer
from .bench_metadata import Step
from .bench_norm import EPSILON, Norm, check_norm
from .bench_paged_kv import Append, check_pages
from .harness import BFLOAT16
from .model import Case, Work, say
from .peers_lora import SGLANG_DENSE, lorax, lorax_module, sglang_chunked, sglang_v2, torch_loop, vllm

Builder = Callable[[Case, Any, Work], "Work | None"]  # None: the peer cannot do this case


@dataclasses.dataclass(frozen=True)
class Package:
    """What a peer is installed as, and what is imported of it."""

    distribution: str
    modules: tuple[str, ...]

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.modules[0].partition(".")[0]) is not None


PACKAGES = {
    "torch": Package("torch", ("torch",)),
    "vllm": Package("vllm", ("vllm.lora.ops.triton_ops",)),
    "sglang": Package("sglang", ("sglang.srt.lora.dense.runner", f"{SGLANG_DENSE}.chunked_sgmv_shrink")),
    "flashinfer": Package("flashinfer-python", ("flashinfer",)),
    "liger": Package("liger-kernel", ("liger_kernel.transformers.functional",)),
    "lorax": Package("", ()),  # no package: a checkout
}
# SGLang's own cache of Triton kernels leaves the rank out of its keys: a process may use one rank only.
_SETTINGS = {"sglang": {"SGLANG_USE_CUSTOM_TRITON_KERNEL_CACHE": "0"}}


def available() -> dict[str, bool]:
    """Whether each peer is installed; nothing is imported."""
    return {
        name: bool(os.environ.get(_env.LORAX_CHECKOUT.name)) if name == "lorax" else package.installed
        for name, package in PACKAGES.items()
    }


def _wanted(peers: str) -> set[str]:
    if peers == "none":
        return set()
    installed = available()
    if peers == "auto":
        return {name for name, there in installed.items() if there}
    names = set(filter(None, peers.split(",")))
    for name in sorted(names):
        if not installed.get(name, False):
            known = ", ".join(PACKAGES)
            raise ValueError(f"--peers: expected installed packages among {known}, got {name}")
    return names


def survey(peers: str) -> tuple[dict[str, str], dict[str, str]]:
    """Import the wanted peers: the version of each that works, and for each that does not, why.

    ``peers``: ``auto`` (all that are installed), ``none``, or a comma-separated list of packages; one that was
    named but is not installed is an error.

    Raises
    ------
    ValueError
        If a named peer is unknown or not installed.
    """
    working, broken = {}, {}
    for name in sorted(_wanted(peers)):
        package = PACKAGES[name]
        for key, value in _SETTINGS.get(name, {}).items():
            os.environ.setdefault(key, value)
        try:
            for module in package.modules:
                importlib.import_module(module)
            if name == "lorax":
                lorax_module("models.metadata_kernels")
                working[name] = os.environ[_env.LORAX_CHECKOUT.name].rstrip("/").rpartition("/")[2]
            else:
                working[name] = importlib.metadata.version(package.distribution)
        except Exception as error:  # whatever a foreign package raises at import
            broken[name] = f"{type(error).__name__}: {error}".split("\n", 1)[0][:300]
    return working, broken


def chosen(stem: str, peers: str) -> dict[str, Builder]:
    """The peers of a module (``bench_lora``) to time, by engine name; ``peers`` as in :func:`survey`."""
    packages = _wanted(peers)
    return {engine: builder for engine, (package, builder) in PEERS.get(stem, {}).items() if package in packages}


# -- what peers compile for minutes


def _small(stem: str, engine: str, case: Case) -> Case | None:
    """The least case that makes a peer compile with nvcc what it needs for ``case``; None where it does not."""
    params: Any = None
    if engine.startswith("FlashInfer"):
        if stem == "bench_norm":
            params = Norm(1, 4096, case.params.add)
        elif stem == "bench_paged_kv":
            params = dataclasses.replace(case.params, batch=1, chunk=1, context=1)
        elif engine.endswith("FA3") and not _fa3_can(case.params):
            return None
        elif stem == "bench_attention":
            wide = case.params.group >= TENSOR_CORE_GROUP
            # Decode on tensor cores runs the kernels of prefill.
            new = int(bool(case.params.new) or wide)
            params = Attention((16,), new, case.params.rope, 4 if wide or new else 1, 8, 16, case.params.head_dim)
    elif engine == "SGLang triton_v2" and 512 < case.params.tokens < 16384:
        params = Layer(1024, (16,), "seq 512", 64, (64,))
    return None if params is None else dataclasses.replace(case, params=params, nbytes=1)


Unbuilt = dict[tuple[str, Any], str]


def compile_ahead(work: Iterable[tuple[ModuleType, Case]], peers: str, rig: Any) -> Unbuilt:
    """Make the peers compile what these cases need, several at a time: nvcc takes minutes, and no case waits for it.

    Returns why, for each engine and small case that failed.
    """
    jobs: dict[tuple[str, Any], Callable[[], None]] = {}
    for module, case in work:
        stem = module.__name__.rpartition(".")[2]
        for engine, builder in chosen(stem, peers).items():
            small = _small(stem, engine, case)
            if small is not None:
                jobs.setdefault((engine, small.params), functools.partial(_call_once, module, small, builder, rig))
    if not jobs:
        return {}
    rig.use_torch()
    say(f"compiling {len(jobs)} kernels of peers (kept on disk; minutes where they are new)")
    began, failed = time.monotonic(), {}
    with ThreadPoolExecutor(max_workers=2) as pool:  # each runs a compiler a core, of gigabytes each
        running = {key: pool.submit(job) for key, job in jobs.items()}
        for done, (key, future) in enumerate(running.items(), 1):
            error = future.exception()
            if error is not None:
                failed[key] = f"its kernel did not build: {type(error).__name__}: {error}"
            what = f"{key[0]} {getattr(key[1], 'name', '')}" + (" failed" if error is not None else "")
            say(f"[{done:>3}/{len(jobs)}] {time.monotonic() - began:4.0f} s  {what}")
    rig.release()
    return failed


def _call_once(module: ModuleType, case: Case, builder: Builder, rig: Any) -> None:
    rig.device.use()
    rig.torch.cuda.set_device(rig.device.id)
    other = builder(case, rig, module.build(case, rig, 1))
    if other is not None:
        other.calls[0]()
    rig.torch.cuda.synchronize()


def build(stem: str, engine: str, case: Case, rig: Any, work: Work, unbuilt: Unbuilt) -> Work | None:
    """The peer's work on the same buffers; None where it cannot do this case.

    Raises
    ------
    RuntimeError
        If what it needs did not compile.
    """
    small = _small(stem, engine, case)
    if small is not None and (engine, small.params) in unbuilt:
        raise RuntimeError(unbuilt[engine, small.params])
    return PEERS[stem][engine][1](case, rig, work)


# -- metadata


def _lorax_metadata(case: Case, rig: Any, work: Work) -> Work | None:
    """LoRAX's functions of the same names and parameters, on the same arrays; checked on fresh ones."""
    step: Step = case.params
    rig.use_torch()
    module = lorax_module("models.metadata_kernels")
    module._HAS_TRITON = True
    if not hasattr(module, step.function.split()[0]):
        return None

    def torch_of(value: Any) -> Any:
        return rig.as_torch(value) if hasattr(value, "dtype") and hasattr(value, "shape") else value

    def theirs(one: bench_metadata.Call) -> Callable[[], Any]:
        run: Any = one.run
        function = getattr(module, run.func.__name__)
        keywords = {key: torch_of(value) for key, value in run.keywords.items()}
        return functools.partial(function, *map(torch_of, run.args), **keywords)

    def check() -> float:
        fresh = bench_metadata.BUILDERS[step.function](step, rig)
        returned = theirs(fresh)()
        rig.sync()
        got = [returned.cpu().numpy()] if fresh.results is None else [rig.host(result) for result in fresh.results]
        same = [np.array_equal(result, want) for result, want in zip(got, fresh.want, strict=True)]
        return 0.0 if all(same) else float("inf")

    return Work([theirs(one) for one in work.data], check, capture="torch")


# -- RMS norm


def _poison(out: Any) -> None:
    """NaN in bfloat16: what an earlier engine wrote must not pass for the peer's."""
    out.view(np.uint16)[...] = 0x7FC0


def _norm_tensors(case: Case, rig: Any, work: Work) -> list[tuple[Any, Any]] | None:
    if case.params.add:
        return None
    rig.use_torch()
    return [(rig.as_torch(data.input), rig.as_torch(data.weight)) for data in work.data]


def _norm_work(norm: Norm, rig: Any, work: Work, function: Callable[[Any, Any], Any], tensors: list[Any]) -> Work:
    """Calls of a function that returns a new tensor; the last one is kept for the check."""
    kept: list[Any] = [None]

    def call(x: Any, weight: Any) -> None:
        kept[0] = function(x, weight)

    def out() -> Any:
        return rig.xp.from_dlpack(kept[0].detach().view(rig.torch.int16)).view(BFLOAT16)

    calls = [functools.partial(call, *pair) for pair in tensors]
    return Work(calls, lambda: check_norm(norm, rig, work.data[0], calls[0], out, slack=4.0), capture="torch")


def _torch_norm(case: Case, rig: Any, work: Work) -> Work | None:
    tensors = _norm_tensors(case, rig, work)
    if tensors is None:
        return None
    torch, columns = rig.torch, case.params.columns
    function = functools.partial(torch.nn.functional.rms_norm, normalized_shape=(columns,), eps=EPSILON)
    return _norm_work(case.params, rig, work, lambda x, weight: function(x, weight=weight), tensors)


def _liger_norm(case: Case, rig: Any, work: Work) -> Work | None:
    tensors = _norm_tensors(case, rig, work)
    if tensors is None:
        return None
    from liger_kernel.transformers.functional import liger_rms_norm

    return _norm_work(case.params, rig, work, lambda x, weight: liger_rms_norm(x, weight, EPSILON), tensors)


def _flashinfer_norm(case: Case, rig: Any, work: Work) -> Work:
    import flashinfer

    rig.use_torch()
    calls = []
    for data in work.data:
        x, weight, out = (rig.as_torch(array) for array in (data.input, data.weight, data.out))
        if case.params.add:
            calls.append(functools.partial(flashinfer.norm.fused_add_rmsnorm, x, out, weight, EPSILON))
        else:
            calls.append(functools.partial(flashinfer.norm.rmsnorm, x, weight, EPSILON, out=out))
    data = work.data[0]

    def check() -> float:
        if not case.params.add:
            _poison(data.out)
        return check_norm(case.params, rig, data, calls[0], lambda: data.out, slack=4.0)

    return Work(calls, check, capture="torch")


# -- paged KV


def _flashinfer_append(case: Case, rig: Any, work: Work) -> Work | None:
    append: Append = case.params
    torch = rig.use_torch()
    import flashinfer

    device = rig.as_torch(work.data[0].k).device
    ids = torch.arange(append.tokens, device=device, dtype=torch.int32)
    batch_of, within = ids // append.chunk, ids % append.chunk
    positions = append.context - append.chunk + within
    calls = []
    for data in work.data:
        data.pool.view(np.uint16).fill(0)
        cache = rig.as_torch(data.pool)[:, 0]
        order = torch.as_tensor(data.order.astype(np.int32), device=device)
        _, indptr, last = (rig.as_torch(array) for array in data.arrays)
        tokens = (rig.as_torch(data.k), rig.as_torch(data.v), batch_of, positions)
        pages = (cache, order, indptr, last)
        calls.append(functools.partial(flashinfer.append_paged_kv_cache, *tokens, *pages, kv_layout="HND"))
    return Work(calls, lambda: check_pages(append, rig, work.data[0], calls[0]), capture="torch")


# -- attention

TENSOR_CORE_GROUP = 4  # query heads per KV head from which FlashInfer advises its tensor-core decode


def _fa3_can(attention: Attention) -> bool:
    """It does not rotate; for decode FlashInfer chooses FA2 itself."""
    return bool(attention.new) and not attention.rope


def _flashinfer(backend: str, case: Case, rig: Any, work: Work) -> Work | None:
    """FlashInfer's paged wrappers, one planned for each set: the plan waits for the device and is made outside."""
    attention: Attention = case.params
    tensor_cores = attention.group >= TENSOR_CORE_GROUP
    if backend == "fa3" and not _fa3_can(attention):
        return None
    torch = rig.use_torch()
    import flashinfer

    device = rig.as_torch(work.data[0].q).device
    space = torch.zeros(256 << 20, dtype=torch.uint8, device=device)
    mode = "ROPE_LLAMA" if attention.rope else "NONE"
    heads = (attention.heads * attention.group, attention.heads, attention.head_dim, attention.page)
    types = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16, "pos_encoding_mode": mode}
    calls = []
    for data in work.data:
        order = torch.as_tensor(data.order.astype(np.int32), device=device)
        _, indptr, last = (rig.as_torch(array) for array in data.tables)
        if attention.new:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(space, "HND", backend=backend)
            wrapper.plan(rig.as_torch(data.indptr), indptr, order, last, *heads, causal=True, **types)
        else:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                space, "HND", use_tensor_cores=tensor_cores, backend=backend
            )
            wrapper.plan(indptr, order, last, *heads, **types)
        cache = rig.as_torch(data.pool)[:, 0]
        calls.append(functools.partial(wrapper.run, rig.as_torch(data.q), cache, out=rig.as_torch(data.out)))
    return Work(calls, lambda: _fresh_attention(attention, rig, work, calls[0]), capture="torch", data=space)


def _fresh_attention(attention: Attention, rig: Any, work: Work, call: Callable[[], Any]) -> float:
    _poison(work.data[0].out)
    return check_attention(attention, rig, work.data[0], call, slack=4.0)


def _torch_sdpa(case: Case, rig: Any, work: Work) -> Work | None:
    """torch's attention of whole prompts on contiguous keys and values, gathered outside."""
    attention: Attention = case.params
    if attention.rope or attention.new != max(attention.lengths) or attention.new % attention.page:
        return None
    torch = rig.use_torch()
    batch = len(attention.lengths)

    def call(q: Any, k: Any, v: Any, out: Any) -> None:
        out.copy_(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))

    def of_heads(rows: Any) -> Any:
        return rows.view(batch, attention.new, -1, attention.head_dim).transpose(1, 2)

    calls = []
    for data in work.data:
        calls.append(
            functools.partial(call, *_contiguous(attention, rig, data, of_heads), of_heads(rig.as_torch(data.out)))
        )
    return Work(calls, lambda: _fresh_attention(attention, rig, work, calls[0]), capture="torch")


def _contiguous(
    attention: Attention, rig: Any, data: AttentionSet, of_heads: Callable[[Any], Any]
) -> tuple[Any, Any, Any]:
    pool = rig.as_torch(data.pool)
    pages = pool[rig.torch.as_tensor(data.order, device=pool.device), 0]  # (pages, 2, heads, page, dim)
    batch = len(attention.lengths)
    pages = pages.view(batch, -1, 2, attention.heads, attention.page, attention.head_dim).permute(2, 0, 3, 1, 4, 5)
    k, v = pages.reshape(2, batch, attention.heads, attention.new, attention.head_dim)
    return of_heads(rig.as_torch(data.q)).contiguous(), k.contiguous(), v.contiguous()


PEERS: dict[str, dict[str, tuple[str, Builder]]] = {
    "bench_lora": {
        "torch loop": ("torch", torch_loop),
        "vLLM": ("vllm", vllm),
        "SGLang csgmv": ("sglang", sglang_chunked),
        "SGLang triton_v2": ("sglang", sglang_v2),
        "LoRAX Triton": ("lorax", lorax),
    },
    "bench_norm": {
        "torch rms_norm": ("torch", _torch_norm),
        "FlashInfer": ("flashinfer", _flashinfer_norm),
        "Liger": ("liger", _liger_norm),
    },
    "bench_paged_kv": {"FlashInfer": ("flashinfer", _flashinfer_append)},
    "bench_metadata": {"LoRAX": ("lorax", _lorax_metadata)},
    "bench_attention": {
        "FlashInfer FA2": ("flashinfer", functools.partial(_flashinfer, "fa2")),
        "FlashInfer FA3": ("flashinfer", functools.partial(_flashinfer, "fa3")),
        "torch SDPA, contiguous KV": ("torch", _torch_sdpa),
    },
}
