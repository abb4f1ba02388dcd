"""taskpool beside its peers: the same workloads, interleaved in one run, each in a process of its own.

    python benchmarks/bench.py [--quick] [--rounds N] [--only KEY ...] [--libraries NAME ...] [--output FOLDER]

Each workload is run on each library in turn, round after round (A B C A B C), so that whatever else the machine does
meets all of them. The tables have medians, and ratios to the best peer. FOLDER gets them, results.json and a picture for
each workload.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import libraries
import limits
import measures
import report

HERE = Path(__file__).parent
LONGEST = 120  # seconds that one measurement may take


def measure_once(key: str, library: str) -> dict[str, float] | str | None:
    """Run one measurement in a process of its own; return its figures, None if there are none, or what went wrong."""
    command = [sys.executable, "-W", "ignore", __file__, "--one", key, library]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, check=False)
    except subprocess.TimeoutExpired:
        return "hung"
    if ended.returncode:
        return (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1][:100]
    return json.loads(ended.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def measure_all(chosen: list[measures.Measure], names: list[str], rounds: int | None) -> dict[str, Any]:
    """Run every measure on every library, interleaved; return {measure: {library: {figure: [values]}}}."""
    results: dict[str, Any] = {measure.key: {} for measure in chosen}
    failed: set[tuple[str, str]] = set()
    for turn in range(rounds or max(measure.rounds for measure in chosen)):
        for measure in chosen:
            for name in names if turn < (rounds or measure.rounds) else ():
                if (measure.only and name not in measure.only) or (measure.key, name) in failed:
                    continue
                if turn and not libraries.ALL[name].peer:  # for scale; it starts slowly
                    continue
                figures = measure_once(measure.key, name)
                print(f"round {turn + 1}: {measure.key} {name} {figures}", file=sys.stderr, flush=True)
                if isinstance(figures, dict):
                    _add(results[measure.key], name, figures)
                else:
                    failed.add((measure.key, name))
                    if figures is not None:
                        results[measure.key][name] = figures
    return results


def _add(known: dict[str, Any], name: str, figures: dict[str, float]) -> None:
    values = known.setdefault(name, {})
    for figure, value in figures.items():
        values.setdefault(figure, []).append(value)


def machine() -> dict[str, Any]:
    """Say what was measured on, and with which versions."""
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "unknown CPU"
    )
    packages = {library.package for library in libraries.ALL.values() if library.package}
    return {
        "cpu": model,
        "cpus": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {package: found for package in sorted(packages) if (found := _version(package))},
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the workloads that say most, once, on the main peers")
    parser.add_argument("--rounds", type=int, default=None, help="for every workload, in place of its own number")
    parser.add_argument("--only", nargs="+", choices=sorted(measures.BY_KEY), help="these workloads")
    parser.add_argument("--libraries", nargs="+", choices=list(libraries.ALL), help="these libraries")
    parser.add_argument("--output", type=Path, default=HERE.parent / ".cache" / "bench")
    parser.add_argument("--one", nargs=2, metavar=("KEY", "LIBRARY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measures.run(*arguments.one)))
        return
    began = time.monotonic()
    chosen = [
        m for m in measures.ALL if (m.key in arguments.only if arguments.only else m.quick or not arguments.quick)
    ]
    names = arguments.libraries or (report.MAIN if arguments.quick else list(libraries.ALL))
    results = measure_all(chosen, names, arguments.rounds or (1 if arguments.quick else None))
    found = {"machine": machine(), "limits": limits.all_limits(), "results": results}
    report.write(found, arguments.output)
    print((arguments.output / "summary.inc").read_text())
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
