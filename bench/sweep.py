"""``python -m bench sweep``: times forced LoRA configs against the one that the library chooses."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import bench_lora, precompile
from .bench_lora import SEQUENCE, Layer, LayerSet
from .harness import launches_of
from .model import Case, Report, geometric_mean, progress, say, watchdog

FIELDS = ("form", "rows", "cluster", "warps", "stages")
CHOSEN = "chosen"
# Both forms over what an H200 fits; a config that does not suit a case raises and is left out of its row.
DEFAULT = ("direct:8:1|2|4|8|16:4|8|16", "ring:16|32|64:1|2|4|8|16:8:3|4")
WITHIN = 1.10


@dataclass(frozen=True)
class Spec:
    """One forced config, by field name."""

    values: tuple[tuple[str, str | int], ...]

    @property
    def name(self) -> str:
        parts = dict(self.values)
        base = ":".join(str(parts.pop(field)) for field in FIELDS if field in parts)
        return ",".join([base, *(f"{key}={value}" for key, value in parts.items())])

    def config(self) -> Any:
        """The library's own object.

        Raises
        ------
        ValueError
            For a field that it does not have, or values that it refuses.
        """
        from cupy_lora.dispatch import LoraConfig

        known = {field.name for field in dataclasses.fields(LoraConfig)}
        unknown = [key for key, _ in self.values if key not in known]
        if unknown:
            raise ValueError(f"--configs: expected fields of LoraConfig ({', '.join(sorted(known))}), got {unknown}")
        return LoraConfig(**dict(self.values))


def _value(text: str) -> str | int:
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def parse_specs(texts: Sequence[str]) -> list[Spec]:
    """``direct:8:2|4:8:1`` and more fields as ``,name=1|2``; the product of the alternatives, each once.

    Raises
    ------
    ValueError
        For more than the five positional fields, an empty alternative, or a field without a value.
    """
    specs: dict[Spec, None] = {}
    for text in texts:
        positional, *named = text.split(",")
        fields = positional.split(":")
        if len(fields) > len(FIELDS):
            raise ValueError(f"--configs: expected {':'.join(FIELDS).upper()}, got {text!r}")
        pairs = list(zip(FIELDS, fields, strict=False))
        for item in named:
            key, equals, value = item.partition("=")
            if not equals:
                raise ValueError(f"--configs: expected name=value after the comma, got {item!r}")
            pairs.append((key, value))
        choices = []
        for key, value in pairs:
            alternatives = value.split("|")
            if not all(alternatives):
                raise ValueError(f"--configs: expected a value for {key}, got {text!r}")
            choices.append([(key, _value(alternative)) for alternative in alternatives])
        specs.update({Spec(tuple(combination)): None for combination in itertools.product(*choices)})
    return list(specs)


def random_layers(count: int, seed: int) -> list[Layer]:
    """Shapes that nobody tuned: widths, ranks, batch sizes and patterns drawn at random."""
    draw = np.random.default_rng(seed)
    layers: dict[Layer, None] = {}
    while len(layers) < count:
        in_features, out_features = (int(width) * 128 for width in draw.integers(4, 120, 2))
        rank = int(draw.choice((4, 8, 12, 16, 24, 32, 48, 64, 96, 128)))
        if draw.random() < 0.3:
            tokens = int(2 ** draw.uniform(7, 13))
            layer = Layer(tokens, (rank,), f"seq {min(SEQUENCE, tokens)}", in_features, (out_features,))
        else:
            tokens = int(2 ** draw.uniform(0, 8.5))
            kinds = ["distinct", "one", "zipf", *(f"uniform {n}" for n in (2, 4, 8, 16, 32) if n < tokens)]
            layer = Layer(tokens, (rank,), str(draw.choice(kinds)), in_features, (out_features,))
        if bench_lora.layer_bytes(layer) < 400e6:
            layers[layer] = None
    return list(layers)


def chosen_cases(args: argparse.Namespace) -> list[Case]:
    """The layers to sweep: of the case list, or random ones."""
    if args.random:
        return [bench_lora.layer_case(layer) for layer in random_layers(args.random, args.seed)]
    kept = [case for case in bench_lora.cases() if case.quick or not args.quick]
    pattern = re.compile(args.cases) if args.cases else None
    return [case for case in kept if pattern is None or pattern.search(f"lora {case.name}")]


def run(args: argparse.Namespace, given: list[str], options: Any, make_rig: Callable[[], Any]) -> int:
    """The command; 0 where every case ran and every config that ran gave the same bits."""
    if args.what != ["sweep"]:
        raise ValueError(f"sweep: expected no further words, got {args.what[1:]}")
    specs: list[Spec | None] = [None, *parse_specs(args.configs or DEFAULT)]
    try:
        from cupy_lora.dispatch import LoraConfig  # noqa: F401
    except ImportError as error:
        raise ValueError(f"sweep: expected forced configs (dispatch.LoraConfig), got {error}") from error
    cases = chosen_cases(args)
    if args.jobs > 1 and options.shard is None and not args.dry_run:
        precompile.run(given, args.jobs)
    rig = make_rig()
    if options.shard is not None:
        _compile(cases, specs, rig, options)
        return 0
    report = Report(None, rig.machine(), given)
    rows: list[dict[str, Any]] = []
    bad = 0
    with progress(len(cases)) as step:
        for number, case in enumerate(cases, 1):
            if report.elapsed > options.budget:
                say(f"the budget is spent: {len(cases) - number + 1} cases left out")
                break
            try:
                with watchdog(options.case_timeout, case.name):
                    found = sweep_case(case, specs, rig, args.replays)
            except Exception as error:
                say(f"{case.name}: {traceback.format_exc()}", err=True)
                found = [{"case": case.name, "config": CHOSEN, "status": "failed", "note": str(error)[:300]}]
            rows += found
            bad += sum(row["status"] in ("failed", "wrong") for row in found)
            step(f"{report.elapsed:4.0f} s  {brief(found)}")
            if args.json is not None:
                _write(args, report, rows)
            if _lost(rig):
                say("stopping: the device is lost", err=True)
                break
            rig.release()
    if args.json is not None:
        _write(args, report, rows)
    say("\n" + text(rows))
    return 1 if bad else 0


def _write(args: argparse.Namespace, report: Report, rows: list[dict[str, Any]]) -> None:
    content = {**report.as_dict(), "kind": "sweep", "rows": rows}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(content, indent=1) + "\n")


def _lost(rig: Any) -> bool:
    try:
        rig.sync()
    except Exception:
        return True
    return False


def _forced(spec: Spec | None) -> Any:
    return None if spec is None else spec.config()


def _compile(cases: list[Case], specs: list[Spec | None], rig: Any, options: Any) -> None:
    index, count = options.shard
    for c, case in enumerate(cases):
        mine = [spec for s, spec in enumerate(specs) if (c * len(specs) + s) % count == index]
        if not mine:
            continue
        rig.reseed()
        data = bench_lora.build_set(case.params, rig, bench_lora.build_batch(case.params, rig))
        for spec in mine:
            try:
                with watchdog(options.case_timeout, case.name):
                    bench_lora.layer_calls([data], _forced(spec))[0]()
                    rig.sync()
            except Exception:
                if _lost(rig):
                    return  # the timing process meets the same config and reports it
        rig.release()


def sweep_case(case: Case, specs: list[Spec | None], rig: Any, replays: int) -> list[dict[str, Any]]:
    """Every config over the same buffers: checked against the chosen one's bits, then timed cold."""
    if rig.dry:
        case = bench_lora.shrunk(case)
    rig.reseed()
    work = bench_lora.build(case, rig, rig.sets_for(case.nbytes))
    data: list[LayerSet] = work.data
    floor = rig.read_floor(case.nbytes, len(work.calls))
    error = work.check()
    start = rig.host(data[0].y)
    bits: np.ndarray | None = None
    rows = []
    for spec in specs:
        row: dict[str, Any] = {"case": case.name, "config": CHOSEN if spec is None else spec.name, "status": "ok"}
        row.update(floor_us=floor, target_us=case.target_us(floor))
        rows.append(row)
        if spec is None:
            row["error"] = error
            if not error <= 1.0:
                row["status"] = "wrong"
        try:
            calls = bench_lora.layer_calls(data, _forced(spec))
            row["launch"] = launches_of(calls[0])
            got = _result(rig, data[0], start, calls[0])
            if bits is None:
                bits = got
            elif not np.array_equal(bits, got):
                row["status"], row["note"] = "wrong", f"{int((bits != got).sum())} outputs differ from the chosen's"
                continue
            timing = rig.time(calls, max(floor or 0.0, 2.0) * 1.3, replays=replays)
        except ValueError as refused:  # the library says that the config does not suit the shape
            row["status"], row["note"] = ("failed" if spec is None else "refused"), str(refused)[:200]
            continue
        except Exception as failed:
            row["status"], row["note"] = "failed", f"{type(failed).__name__}: {failed}".split("\n", 1)[0][:200]
            if _lost(rig):
                raise
            continue
        if timing is not None:
            row.update(median_us=timing.median, p10_us=timing.p10, p90_us=timing.p90)
    return rows


def _result(rig: Any, data: LayerSet, start: np.ndarray, call: Any) -> np.ndarray:
    """The bits of y after one call from ``start``."""
    bits = data.y.view(np.uint16)
    bits[...] = rig.array(start.view(np.uint16))
    call()
    rig.sync()
    return rig.host(data.y).view(np.uint16)


def _timed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted((row for row in rows if row.get("median_us")), key=lambda row: row["median_us"])


def brief(rows: list[dict[str, Any]]) -> str:
    """One line for one case: the chosen config beside the best."""
    timed = _timed(rows)
    if not timed:
        return f"{rows[0]['case']}: {rows[0]['status']} {rows[0].get('note', '')}".rstrip()
    best = timed[0]
    chosen = next((row for row in timed if row["config"] == CHOSEN), None)
    line = f"{best['case']}: best {best['config']} {best['median_us']:.2f} us"
    if best["target_us"]:
        line += f" ({best['median_us'] / best['target_us']:.2f} x target)"
    if chosen is not None:
        line += f", chosen {chosen['median_us']:.2f} ({chosen['median_us'] / best['median_us']:.2f} x best)"
        line += f" [{chosen['launch']}]" if chosen.get("launch") else ""
    return line


def text(rows: list[dict[str, Any]], most: int = 6) -> str:
    """Per case the best configs, then how the choice rule did over all cases."""
    lines = []
    ratios = []
    for name in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == name]
        timed = _timed(mine)
        lines.append(brief(mine))
        for row in timed[:most]:
            lines.append(f"    {row['median_us']:8.2f}  {row['p10_us']:8.2f}  {row['p90_us']:8.2f}  {row['config']}")
        for row in mine:
            if row["status"] in ("failed", "wrong"):
                lines.append(f"    {row['status']:>8}  {row['config']}: {row.get('note', '')}")
        chosen = next((row for row in timed if row["config"] == CHOSEN), None)
        if chosen is not None:
            ratios.append(chosen["median_us"] / timed[0]["median_us"])
    if ratios:
        good = sum(ratio <= WITHIN for ratio in ratios)
        lines.append(
            f"the rule: within {WITHIN - 1:.0%} of the best on {good} of {len(ratios)} cases, "
            f"geometric mean {geometric_mean(ratios):.3f} x best, worst {max(ratios):.2f}"
        )
    return "\n".join(lines)
