"""``python -m benchmarks``: time and memory against the peers, answers compared first."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import encode, idle, memory, peers, public, pursuit, report, rules, step, theory
from benchmarks.cases import DEFAULT_SIZES, Shape
from benchmarks.checks import WrongAnswer
from benchmarks.measure import Row, Settings

SUITES: dict[str, Callable[[Shape, Settings], list[Row]]] = {
    "encode": encode.run,
    "step": step.run,
    "rules": rules.run,
    "pursuit": pursuit.run,
    "public": public.run,
    "memory": memory.run,
    "theory": theory.run,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the suites; 1 if two contenders disagree, 2 if the machine is too busy for results to be kept."""
    options = _parser().parse_args(arguments)
    unknown = sorted(set(options.suites) - set(SUITES))
    if unknown:
        _parser().error(f"unknown suite {unknown[0]!r}; choose from {', '.join(SUITES)}")
    settings = Settings(options.repeats, options.threads, options.batch)
    torch.set_num_threads(settings.threads)
    peers.limit_threads(settings.threads)
    _warm_up()
    busy = idle.wait(options.wait if options.json else 0.0)
    if busy is not None and busy > idle.QUIET:
        print(f"Other processes keep {busy:.1f} cores busy: figures of now are not worth keeping.", file=sys.stderr)
        if options.json:
            print(f"Nothing is written to {options.json}. Stop them, or wait longer with --wait.", file=sys.stderr)
            return 2
    found = report.machine(settings) | {"cores_busy_before": busy}
    print(report.describe(found))
    everything: list[Row] = []
    for suite in options.suites or SUITES:
        rows: list[Row] = []
        for shape in options.sizes or [Shape.parse(size) for size in DEFAULT_SIZES[suite]]:
            print(f"{suite}: {shape} …", file=sys.stderr, flush=True)
            try:
                rows += SUITES[suite](shape, settings)
            except WrongAnswer as error:
                print(f"{suite}, {shape}: wrong answer, nothing is timed. {error}", file=sys.stderr)
                return 1
        report.show(suite, rows)
        everything += rows
        if options.json:
            report.save(options.json, everything, found, settings)
    return 0


def _warm_up() -> None:
    """Have everybody's lazy imports and thread pools in place: they are nobody's memory or time."""
    tiny = Shape(8, 16, 2, 2)
    for suite in (encode, step):
        suite.run(tiny, Settings(repeats=1, batch=8))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"any of {', '.join(SUITES)}; default all")
    parser.add_argument("--sizes", type=_sizes, help="d_in x d_sae x degree x k, such as 512x4096x7x64,576x4608x7x32")
    parser.add_argument("--repeats", type=_positive, default=5, help="turns of each contender (5)")
    parser.add_argument("--threads", type=_positive, default=torch.get_num_threads(), help="default: as PyTorch")
    parser.add_argument("--batch", type=_positive, default=1024, help="samples per batch (1024)")
    parser.add_argument("--wait", type=_positive, default=120, help="with --json: seconds to wait for quiet (120)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write FILE, and the tables as Markdown beside it")
    return parser


def _sizes(text: str) -> list[Shape]:
    try:
        return [Shape.parse(size) for size in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number from 1 on, not {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
