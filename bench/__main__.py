"""Command line: ``python -m bench [FAMILY ...]``, ``sweep``, ``plot``; see ``--help``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import bench_host, precompile, sweep
from . import plot as picture
from .harness import DryRig, GpuRig
from .model import Report, read_report, say
from .runner import FAMILIES, Options, run_families
from .table import summary, text_table

_DESCRIPTION = """Times the library on the GPU: CUDA-graph replay over rotating buffers, medians; against floors that
the same run measures, against the figures of record, and against each peer that is installed."""


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m bench", description=_DESCRIPTION)
    main.add_argument(
        "what",
        nargs="*",
        default=["all"],
        help=f"families ({', '.join(FAMILIES)}), or all; or: sweep (forced LoRA configs), plot REPORT.json "
        "(pictures of an earlier run), table REPORT.json",
    )
    main.add_argument("--quick", action="store_true", help="only the rows that have a figure of record")
    main.add_argument("--cases", default="", metavar="REGEX", help="only cases whose 'family name' matches")
    main.add_argument("--json", type=Path, metavar="FILE", help="write the report here, anew after every case")
    main.add_argument("--plot", type=Path, metavar="FILE", help="write FILE-<family>.png")
    main.add_argument(
        "--peers", default="auto", metavar="auto|none|LIST", help="peers to time (default: all installed)"
    )
    main.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="start no case after this")
    main.add_argument("--case-timeout", type=float, default=90.0, metavar="SECONDS", help="end the run when one hangs")
    main.add_argument("--no-warm", action="store_true", help="leave out the warm times (one set of buffers)")
    main.add_argument("--jobs", type=int, default=0, metavar="N", help="compile ahead of the timing in N processes")
    main.add_argument("--device", type=int, default=0, metavar="N", help="number of the GPU")
    main.add_argument("--dry-run", action="store_true", help="NumPy arrays, small shapes, no timing: checks the wiring")
    main.add_argument("--verbose", action="store_true", help="tracebacks of peers too")
    main.add_argument("--shard", metavar="I/N", help=argparse.SUPPRESS)  # of the compile processes
    group = main.add_argument_group("sweep")
    group.add_argument(
        "--configs",
        action="append",
        default=[],
        metavar="SPEC",
        help="forced configs as FORM:ROWS:CLUSTER:WARPS:STAGES, alternatives with a bar (ring:16:1|2:8:3|4); "
        "repeatable; default: a grid of both forms",
    )
    group.add_argument("--random", type=int, default=0, metavar="N", help="instead of the cases: N random shapes")
    group.add_argument("--seed", type=int, default=1, help="of --random")
    group.add_argument("--replays", type=int, default=6, help="graph replays per config")
    return main


def _options(args: argparse.Namespace) -> Options:
    shard = None
    if args.shard:
        index, _, count = args.shard.partition("/")
        shard = (int(index), int(count))
    return Options(
        quick=args.quick,
        cases=args.cases,
        peers=args.peers,
        budget=args.budget,
        case_timeout=args.case_timeout,
        warm=not args.no_warm,
        shard=shard,
        verbose=args.verbose,
    )


def _show(args: argparse.Namespace) -> int:
    command, *files = args.what
    if len(files) != 1:
        raise ValueError(f"{command}: expected one report file, got {len(files)}")
    path = Path(files[0])
    if command == "plot":
        head, rows = read_report(path)
        for written in picture.plot(head, rows, args.plot or path.with_suffix(".png")):
            say(str(written))
    else:
        content = json.loads(path.read_text())
        if content.get("kind") == "sweep":
            say(sweep.text(content["rows"]))
        else:
            rows = read_report(path)[1]
            say(text_table(rows) + "\n\n" + "\n".join(summary(rows)))
    return 0


def _make_rig(args: argparse.Namespace) -> Any:
    return DryRig() if args.dry_run else GpuRig(args.device).__enter__()


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 0 where every case ran and was right."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(given)
    try:
        return _dispatch(args, given)
    except ValueError as error:
        say(f"python -m bench: {error}", err=True)
        return 2


def _dispatch(args: argparse.Namespace, given: list[str]) -> int:
    first = args.what[0]
    if first in ("plot", "table"):
        return _show(args)
    if first == "first-call":
        from . import bench_host

        say(json.dumps(bench_host.first_call(" ".join(args.what[1:]), args.dry_run)))
        return 0
    if first == "sweep":
        return sweep.run(args, given, _options(args), lambda: _make_rig(args))
    families = list(FAMILIES) if args.what == ["all"] else args.what
    unknown = [name for name in families if name not in FAMILIES]
    if unknown:
        raise ValueError(f"what: expected families among {', '.join(FAMILIES)}, or all, got {', '.join(unknown)}")
    options = _options(args)
    if args.jobs > 1 and options.shard is None and not args.dry_run:
        precompile.run(given, args.jobs)
    rig = _make_rig(args)
    report = Report(args.json, rig.machine(), given)
    if options.shard is None:
        _announce(report, rig, families)
    run_families(families, rig, report, options)
    report.write()
    if options.shard is None:
        say("\n" + text_table(report.rows) + "\n")
        for line in summary(report.rows):
            say(line)
        if args.plot is not None and not args.dry_run:
            try:
                for path in picture.plot(report.head, report.rows, args.plot):
                    say(f"plot: {path}")
            except RuntimeError as error:
                say(str(error), err=True)
                return 1
    named_missing = args.what != ["all"] and any(row.status == "missing" for row in report.rows)
    return 1 if report.bad or named_missing else 0


def _announce(report: Report, rig: Any, families: Sequence[str]) -> None:
    head = report.head
    say(f"machine: {head['machine']}")
    say(f"versions: {head['versions']}; commit {head['commit']}")
    if not rig.dry:
        head["copy_gbps"] = rig.copy_gbps
        head["empty_kernel_us"] = rig.empty_kernel_us
        head["read_gbps"] = 256e6 / rig.read_floor(256_000_000) / 1e3
        say(
            f"copy {rig.copy_gbps:.0f} GB/s (read + write), read {head['read_gbps']:.0f} GB/s, "
            f"empty kernel {rig.empty_kernel_us:.2f} us"
        )
        if bench_host.FAMILY in families:
            head["raw_launch_us"] = bench_host.raw_launch_us(rig)
            say(f"host: a launch of CuPy's own with six arguments takes {head['raw_launch_us']:.2f} us")


if __name__ == "__main__":
    sys.exit(main())
