"""taskpool beside multiprocessing.Pool and ProcessPoolExecutor: the same workloads, interleaved in one run.

    python benchmarks/first.py [--rounds 5] [--json FILE]

Each workload is run for each library in turn, round after round, so that whatever else the machine does meets all of
them; the table has medians and the ratio to the best peer.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import workloads

import taskpool

WORKERS = 2
ROUND_TRIPS = 2_000
SUBMITS = 20_000
ITEMS = 1_000_000

now = time.perf_counter


class Taskpool:
    """taskpool on its default backend."""

    name = "taskpool"

    def __init__(self) -> None:
        self.pool = taskpool.Executor(WORKERS)
        self.warm_up()

    def warm_up(self) -> None:
        """Have all workers started."""
        list(self.pool.map(workloads.pid, range(100 * WORKERS), chunksize=1))

    def call(self) -> None:
        """Run one task and wait for it."""
        self.pool.submit(workloads.same, 1).result()

    def many(self, count: int) -> None:
        """Submit tasks one by one and wait for all."""
        for future in [self.pool.submit(workloads.same, number) for number in range(count)]:
            future.result()

    def map(self, count: int) -> None:
        """Map with default arguments, into a list, as Pool.map does."""
        taskpool.map(workloads.square, range(count), max_workers=WORKERS)

    def close(self) -> None:
        """End it."""
        self.pool.shutdown()


class Futures(Taskpool):
    """concurrent.futures.ProcessPoolExecutor; its map gets the chunksize that its documentation advises for many items."""

    name = "ProcessPoolExecutor"

    def __init__(self) -> None:
        self.pool: Any = ProcessPoolExecutor(WORKERS)
        self.warm_up()

    def map(self, count: int) -> None:
        """Map in large chunks."""
        for _ in self.pool.map(workloads.square, range(count), chunksize=count // (WORKERS * 4)):
            pass


class Pool:
    """multiprocessing.Pool."""

    name = "multiprocessing.Pool"

    def __init__(self) -> None:
        self.pool = multiprocessing.Pool(WORKERS)
        self.pool.map(workloads.pid, range(100 * WORKERS), chunksize=1)

    def call(self) -> None:
        """Run one task and wait for it."""
        self.pool.apply(workloads.same, (1,))

    def many(self, count: int) -> None:
        """Submit tasks one by one and wait for all."""
        for result in [self.pool.apply_async(workloads.same, (number,)) for number in range(count)]:
            result.get()

    def map(self, count: int) -> None:
        """Map with default arguments."""
        self.pool.map(workloads.square, range(count))

    def close(self) -> None:
        """End it."""
        self.pool.close()
        self.pool.join()


def round_trip(library: Any) -> float:
    """Return the median microseconds of a warm no-op round trip."""
    times = []
    for _ in range(ROUND_TRIPS):
        began = now()
        library.call()
        times.append(now() - began)
    return statistics.median(times) * 1e6


def submits(library: Any) -> float:
    """Return how many no-op tasks a second are submitted one by one and finished."""
    began = now()
    library.many(SUBMITS)
    return SUBMITS / (now() - began)


def items(library: Any) -> float:
    """Return how many items a second a map of `x * x` does."""
    began = now()
    library.map(ITEMS)
    return ITEMS / (now() - began)


WORKLOADS: list[tuple[str, str, Callable[[Any], float], bool]] = [
    ("warm no-op round trip, median", "µs", round_trip, False),
    ("20,000 no-op submits, wait for all", "tasks/s", submits, True),
    ("map of 1,000,000 items x*x, default arguments", "items/s", items, True),
]


def measure(rounds: int) -> list[dict[str, Any]]:
    """Run every workload on every library, interleaved."""
    libraries = [Taskpool(), Pool(), Futures()]
    rows = []
    for title, unit, run, more_is_better in WORKLOADS:
        values: dict[str, list[float]] = {library.name: [] for library in libraries}
        for _ in range(rounds):
            for library in libraries:
                values[library.name].append(run(library))
        rows.append(_row(title, unit, values, more_is_better=more_is_better))
    for library in libraries:
        library.close()
    return rows


def _row(title: str, unit: str, values: dict[str, list[float]], *, more_is_better: bool) -> dict[str, Any]:
    medians = {name: statistics.median(measured) for name, measured in values.items()}
    pool = medians["multiprocessing.Pool"]
    return {
        "workload": title,
        "unit": unit,
        "medians": medians,
        "spread": {name: [min(measured), max(measured)] for name, measured in values.items()},
        "ratio to Pool": medians["taskpool"] / pool,
        "better": "more" if more_is_better else "less",
    }


def import_time(rounds: int) -> dict[str, Any]:
    """Measure `import taskpool` beyond a bare interpreter, as whole processes."""

    def whole(code: str) -> float:
        began = now()
        subprocess.run([sys.executable, "-c", code], check=True)
        return (now() - began) * 1e3

    bare, ours = [], []
    for _ in range(4 * rounds):
        bare.append(whole("pass"))
        ours.append(whole("import taskpool"))
    return {"workload": "import taskpool beyond bare Python", "unit": "ms", "taskpool": _difference(ours, bare)}


def _difference(one: list[float], other: list[float]) -> float:
    return statistics.median(one) - statistics.median(other)


def replacement(rounds: int, mp_context: str | None) -> dict[str, Any]:
    """Measure from a worker's death to the first result of its replacement, beside a bare start by the same method."""
    ours, bare = [], []
    with taskpool.Executor(1, mp_context=mp_context) as pool:
        pool.submit(workloads.pid).result()
        for _ in range(10 * rounds):
            victim = pool.submit(workloads.die)
            victim.exception()
            began = now()
            pool.submit(os.getpid).result()
            ours.append((now() - began) * 1e3)
            if mp_context is not None:
                bare.append(_bare_start(mp_context))
    row = {"workload": f"a worker replaced, {mp_context or 'template process'}", "unit": "ms"}
    row["taskpool"] = statistics.median(ours)
    if bare:
        row["bare start"] = statistics.median(bare)
    return row


def _bare_start(method: str) -> float:
    context = multiprocessing.get_context(method)
    reader, writer = context.Pipe(duplex=False)
    began = now()
    process = context.Process(target=_answer, args=(writer,))
    process.start()
    reader.recv_bytes()
    elapsed = (now() - began) * 1e3
    process.join()
    return elapsed


def _answer(writer: Any) -> None:
    writer.send_bytes(b"here")


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| workload | taskpool | Pool | ProcessPoolExecutor | taskpool / Pool |", "|---|---|---|---|---|"]
    for row in rows:
        if "medians" in row:
            ours, pool, futures = row["medians"].values()
            cells = [f"{value:,.0f} {row['unit']}" for value in (ours, pool, futures)]
            lines.append(f"| {row['workload']} | {' | '.join(cells)} | {row['ratio to Pool']:.2f} |")
        else:
            bare = f"bare start {row['bare start']:.1f} {row['unit']}" if "bare start" in row else ""
            lines.append(f"| {row['workload']} | {row['taskpool']:.1f} {row['unit']} | {bare} | | |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    rows = measure(arguments.rounds)
    rows += [replacement(arguments.rounds, method) for method in (None, "fork", "forkserver", "spawn")]
    rows.append(import_time(arguments.rounds))
    print(
        f"Python {platform.python_version()}, {platform.system()}, {os.cpu_count()} CPUs, {arguments.rounds} rounds\n"
    )
    print(table(rows))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
