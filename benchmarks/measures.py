"""What is measured, each by a function that takes a library and returns figures. Each runs in a process of its own."""

from __future__ import annotations

import functools
import heapq
import itertools
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import libraries
import workloads

Figures = dict[str, float]
now = time.perf_counter

BLOCK = 1 << 20
METHODS = ("fork", "forkserver", "spawn")


def warm(library: Any) -> Any:
    """Return the library with all its workers started."""
    for _ in range(3):
        library.many(workloads.pid, range(8 * library.workers))
    return library


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


# ------------------------------------------------------------------------------------------------ measures


def round_trip(library: Any) -> Figures:
    """A warm no-op and its result, one at a time."""
    warm(library)
    count = 2000 if library.name not in ("joblib", "Dask") else 300
    times = []
    for number in range(count):
        began = now()
        library.call(workloads.same, number)
        times.append((now() - began) * 1e6)
    times.sort()
    return {"p50": statistics.median(times), "p99": times[int(0.99 * count)]}


def submits(library: Any, count: int = 20_000) -> Figures:
    """No-op tasks submitted one by one, until all have their result."""
    if not library.submits:
        raise NotImplementedError
    warm(library)
    count = count if library.peer else count // 10
    began, cpu = now(), _cpu()
    library.many(workloads.same, range(count))
    return {"rate": count / (now() - began), "cpu": (_cpu() - cpu) / count * 1e6}


def quick_map(library: Any, count: int = 1_000_000) -> Figures:
    """A map of `x * x`, into a list."""
    warm(library)
    began = now()
    results = library.map(workloads.square, range(count))
    seconds = now() - began
    assert len(results) == count
    assert results[-1] == (count - 1) ** 2
    return {"rate": count / seconds}


def limited_map(library: Any, count: int = 1_000_000) -> Figures:
    """The same with a limit for each item, beside the run without, in the same process."""
    warm(library)
    plain, limited = [], []
    for _ in range(3):
        for times, run in ((plain, library.map), (limited, library.limited_map)):
            began = now()
            run(workloads.square, range(count))
            times.append(now() - began)
    return {"ratio": statistics.median(limited) / statistics.median(plain)}


def milliseconds(library: Any) -> Figures:
    """4,000 tasks of a millisecond, as a map: which part of the time the workers compute."""
    warm(library)
    began = now()
    library.many(workloads.spin, [1e-3] * 4000)
    return {"efficiency": 4000 * 1e-3 / library.workers / (now() - began)}


def heavy_tail(library: Any) -> Figures:
    """1,000 tasks of 0.2 ms to 0.4 s, the longest last, the worst order: the best time in that order, as a part."""
    warm(library)
    durations = sorted(min(0.4, 2e-4 / (1 - k / 1000) ** 1.1) for k in range(1000))
    began = now()
    library.many(workloads.spin, durations)
    return {"efficiency": _makespan(durations, library.workers) / (now() - began)}


def _makespan(durations: list[float], workers: int) -> float:
    """Return how long tasks take in this order if each begins as soon as a worker is free, at no cost."""
    free = [0.0] * workers
    for seconds in durations:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def payload(library: Any, size: int, kind: str) -> Figures:
    """Data there and back in one task: gigabytes a second, both ways together."""
    warm(library)
    data: Any = os.urandom(BLOCK) * (size // BLOCK)
    if kind == "array":
        import numpy as np

        data = np.frombuffer(data, dtype=np.uint8).copy()
    times = []
    for _ in range(max(5, min(15, 200 * BLOCK // size))):
        began = now()
        answer = library.call(workloads.same, data)
        times.append(now() - began)
        assert len(answer) == len(data)
        del answer
    return {"rate": 2 * size / statistics.median(times) / 1e9}


def same_array(library: Any, count: int = 200) -> Figures:
    """One array of 100 MB as the argument of many tasks."""
    import numpy as np

    warm(library)
    array = np.ones(100 * BLOCK, dtype=np.uint8)
    count = count if library.name in ("taskpool", "joblib", "Ray") else count // 10
    began = now()
    library.many(workloads.total, itertools.repeat(array, count))
    return {"rate": count / (now() - began)}


def kept_array(library: Any, count: int = 2000) -> Figures:
    """The same array, given to each worker once, by an initializer, and where that can be by a handle; then tasks."""
    import numpy as np

    array = np.ones(100 * BLOCK, dtype=np.uint8)
    with library.initialized(workloads.keep, array) as pool:
        figures = {"initializer": _rate(pool, workloads.total_of_kept, range(count))}
    if library.name == "taskpool":
        fn = functools.partial(workloads.total_of_shared, library.shared(array))
        figures["shared"] = _rate(library.pool, fn, range(count))
    return figures


def _rate(pool: Any, fn: Callable[[Any], Any], items: range) -> float:
    list(pool.map(fn, items, chunksize=1))  # from here on each worker has the array
    began = now()
    list(pool.map(fn, items, chunksize=1))
    return len(items) / (now() - began)


def hangs(library: Any) -> Figures:
    """200 tasks, each tenth of which hangs in its own way, with a limit of 0.1 s: time beside the ideal."""
    warm(library)
    began = now()
    results = library.limited(workloads.hang_at_every, range(200), 0.1)
    seconds = now() - began
    innocent = sum(result == number for number, result in enumerate(results) if number % 10 != 5)
    return {"ratio": seconds / (20 * 0.1 / library.workers), "lost": 180 - innocent}


def overshoot(library: Any) -> Figures:
    """The same as outcomes of a map: by how much the tasks that hang pass their limit, until all is over with them."""
    warm(library)
    hung = [
        outcome.seconds - 0.1
        for outcome in library.outcomes(workloads.hang_at_every, range(200), 0.1)
        if not outcome.ok
    ]
    return {"p50": statistics.median(hung) * 1e3, "max": max(hung) * 1e3}


def crashes(library: Any) -> Figures:
    """200 no-ops, each twentieth of which kills its worker."""
    warm(library)
    began = now()
    results = library.crashing(workloads.die_at_every, range(200))
    seconds = now() - began
    innocent = sum(result == number for number, result in enumerate(results) if number % 20 != 10)
    return {"seconds": seconds, "lost": 190 - innocent}


def lazy_map(library: Any, count: int = 5_000_000) -> Figures:
    """A long input of unknown length through a map: the rate, and what the parent's memory grows by."""
    warm(library)
    before, most = _resident(), 0.0
    began = now()
    for number, _ in enumerate(library.lazy(workloads.square, iter(range(count)))):
        if number % 100_000 == 0:
            most = max(most, _resident() - before)
    return {"rate": count / (now() - began), "growth": most}


def idle(library: Any) -> Figures:
    """Twenty seconds in which nothing is done: the CPU time of all processes, and the parent's threads."""
    import threading

    warm(library)
    time.sleep(1)
    before, threads = _tree_cpu(), threading.active_count() - 1
    time.sleep(20)
    return {"cpu": (_tree_cpu() - before) * 1e3, "threads": threads}


def _tree_cpu() -> float:
    """Return the CPU seconds of this process and its descendants, by the scheduler's own clock."""
    children: dict[str, list[str]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        children.setdefault(text[text.rindex(")") + 2 :].split()[1], []).append(stat.parent.name)
    total, waiting = 0.0, [str(os.getpid())]
    while waiting:
        pid = waiting.pop()
        waiting += children.get(pid, [])
        for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            total += int(task.read_text().split()[0]) / 1e9
    return total


def growth(library: Any) -> Figures:
    """How the cost of a task grows with how many wait, and what one that waits takes of memory."""
    warm(library)
    counts = (1_000, 10_000, 100_000, 1_000_000) if library.name == "taskpool" else (1_000, 10_000, 100_000)
    costs = []
    for count in counts:
        began = now()
        library.many(workloads.same, range(count))
        costs.append((now() - began) / count)
    release = _hold_workers(library)
    before = _resident()
    futures = [library.pool.submit(workloads.same, number) for number in range(counts[-1])]
    each = (_resident() - before) * 1e6 / len(futures)
    release.unlink()
    for future in futures:
        future.result()
    return {"ratio": max(costs) / min(costs), "memory": each}


def crowds(library: Any) -> Figures:
    """How the cost of a task grows with the number of workers: 20,000 no-op submits with 2, 8, 32 and 128 of them."""
    costs = []
    for workers in (2, 8, 32, 128):
        many = type(library)(workers)
        submits(many)
        costs.append(1 / submits(many)["rate"])
        many.close()
    return {"ratio": max(costs) / min(costs)}


def _hold_workers(library: Any) -> Path:
    import tempfile

    held = Path(tempfile.mkstemp(prefix="held-")[1])
    for _ in range(library.workers):
        library.pool.submit(workloads.wait_for_end_of, str(held))
    return held


def replacement(_: str) -> Figures:
    """A worker is killed; how long until the next task has run in its replacement, by start method."""
    import taskpool

    figures = {}
    for method in (None, *METHODS):
        with taskpool.Executor(1, mp_context=method) as pool:
            figures[method or "default"] = statistics.median(_replace(pool) for _ in range(10))
    return figures


def _replace(pool: Any) -> float:
    pool.submit(workloads.pid).result()
    pool.submit(workloads.die).exception()
    began = now()
    assert pool.submit(abs, -3).result() == 3  # nothing that the new process would have to import
    return (now() - began) * 1e3


def cold(library: str) -> Figures:
    """A whole program: start, one task, end; by start method, for taskpool and the one that it is measured by."""
    methods = (None, *METHODS) if library in ("taskpool", "multiprocessing.Pool") else (None,)
    return {method or "default": _beyond_bare(_program(library, method)) for method in methods}


def _program(library: str, method: str | None) -> str:
    return f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import libraries, workloads
if __name__ == "__main__":
    library = libraries.ALL[{library!r}](method={method!r})
    assert library.call(workloads.same, 3) == 3
    library.close()
"""


def import_time(_: str) -> Figures:
    """`import taskpool`, beyond the bare interpreter."""
    return {"ms": _beyond_bare("import taskpool", 30)}


def _beyond_bare(code: str, count: int = 10) -> float:
    """How much longer a program takes than one that does nothing, in milliseconds; the two run in turn."""
    return statistics.median(_whole(code) - _whole("pass") for _ in range(count))


def _whole(code: str) -> float:
    began = now()
    subprocess.run([sys.executable, "-c", code], check=True)
    return (now() - began) * 1e3


# ------------------------------------------------------------------------------------------------ the list


class Measure(NamedTuple):
    """One row of the table, or several: a measure, its figures, and whom it is run on.

    Attributes:
        key: Its name on the command line.
        title: What the table says.
        run: The function.
        figures: For each figure its unit, and whether more is better.
        only: The libraries that it is run on; none is all.
        quick: Whether `--quick` has it.
        starts: Whether it takes a library's name and starts it itself.
        rounds: How often it is run; several times where single runs differ much and are short.
    """

    key: str
    title: str
    run: Callable[..., Figures]
    figures: dict[str, tuple[str, bool]]
    only: tuple[str, ...] = ()
    quick: bool = False
    starts: bool = False
    rounds: int = 1


OURS = ("taskpool",)
HOSTED = (*OURS, "taskpool futures", "taskpool pool")
CLASSIC = ("multiprocessing.Pool", "ProcessPoolExecutor", "loky", "pebble")
LIMITED = ("taskpool", "pebble", "deadpool")
BY_METHOD = dict.fromkeys(("default", *METHODS), ("ms", False))
LAZY = ("taskpool", "multiprocessing.Pool", "mpire")


def _payload(size: int, kind: str) -> Callable[[Any], Figures]:
    return lambda library: payload(library, size, kind)


ALL: list[Measure] = [
    Measure(
        "round-trip",
        "warm no-op round trip",
        round_trip,
        {"p50": ("µs", False), "p99": ("µs", False)},
        quick=True,
        rounds=3,
    ),
    Measure(
        "submits",
        "20,000 no-op submits, wait for all",
        submits,
        {"rate": ("/s", True), "cpu": ("µs", False)},
        quick=True,
        rounds=3,
    ),
    Measure("map", "map of 1,000,000 items `x*x`", quick_map, {"rate": ("/s", True)}, quick=True, rounds=2),
    Measure("limited-map", "the same with `task_timeout=`, beside it", limited_map, {"ratio": ("x", False)}, only=OURS),
    Measure("milliseconds", "4,000 tasks of 1 ms", milliseconds, {"efficiency": ("", True)}),
    Measure("heavy-tail", "1,000 tasks of 0.2 ms to 0.4 s, worst order", heavy_tail, {"efficiency": ("", True)}),
    *(
        Measure(
            f"{kind}-{size}",
            f"{size} MB of {kind} there and back",
            _payload(size * BLOCK, kind),
            {"rate": ("GB/s", True)},
            (*HOSTED, *CLASSIC, "Ray"),
            quick=size == 10,
        )
        for kind in ("bytes", "array")
        for size in (1, 10, 100)
    ),
    Measure(
        "same-array",
        "one array of 100 MB to 200 tasks",
        same_array,
        {"rate": ("/s", True)},
        (*OURS, *CLASSIC, "joblib", "Ray"),
    ),
    Measure(
        "kept-array",
        "tasks that look at an array of 100 MB that their worker has",
        kept_array,
        {"initializer": ("/s", True), "shared": ("/s", True)},
        only=("taskpool", "multiprocessing.Pool", "ProcessPoolExecutor"),
    ),
    Measure(
        "hangs", "one in ten hangs, limit 0.1 s", hangs, {"ratio": ("x ideal", False), "lost": ("", False)}, LIMITED
    ),
    Measure(
        "overshoot",
        "by how much these pass the limit",
        overshoot,
        {"p50": ("ms", False), "max": ("ms", False)},
        only=OURS,
    ),
    Measure(
        "crashes",
        "a crash in every 20th of 200 no-ops",
        crashes,
        {"seconds": ("s", False), "lost": ("", False)},
        (*LIMITED, "taskpool futures", "taskpool pool"),
        quick=True,
    ),
    Measure("lazy-map", "5,000,000 lazy items", lazy_map, {"rate": ("/s", True), "growth": ("MB", False)}, only=LAZY),
    Measure("idle", "idle for 20 s", idle, {"cpu": ("ms", False), "threads": ("", False)}, (*OURS, *CLASSIC[:3])),
    Measure(
        "growth",
        "up to 1,000,000 waiting tasks beside 1,000 (the others: 100,000)",
        growth,
        {"ratio": ("x", False), "memory": ("B", False)},
        only=("taskpool", "ProcessPoolExecutor", "loky"),
    ),
    Measure("crowds", "up to 128 workers beside 2", crowds, {"ratio": ("x", False)}, only=OURS),
    Measure("cold", "start, one task, end", cold, BY_METHOD, starts=True, quick=True),
    Measure(
        "replacement",
        "a worker replaced after a kill",
        replacement,
        BY_METHOD,
        only=OURS,
        starts=True,
        quick=True,
    ),
    Measure("import", "`import taskpool`", import_time, {"ms": ("ms", False)}, only=OURS, starts=True, quick=True),
]
BY_KEY = {measure.key: measure for measure in ALL}


def run(key: str, library: str) -> Figures | None:
    """Run one measure on one library; None if that cannot do it."""
    measure = BY_KEY[key]
    if measure.starts:
        return measure.run(library)
    try:
        pool = libraries.ALL[library]()
    except ImportError:
        return None
    try:
        return measure.run(pool)
    except NotImplementedError:
        return None
    finally:
        pool.close()
