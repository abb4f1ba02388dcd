"""What the machine allows: the same work without any library, measured in the same run."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import statistics
import threading
import time
from concurrent.futures import Future
from typing import Any

import numpy as np

now = time.perf_counter
BLOCK = 1 << 20


def ping_pong(count: int = 3000) -> dict[str, float]:
    """A pickled call there and its pickled result back, over two pipes, one at a time."""
    there_r, there_w = os.pipe()
    back_r, back_w = os.pipe()
    pid = os.fork()
    if not pid:
        while data := os.read(there_r, 65536):
            if data == b"end":
                os._exit(0)
            function, args = pickle.loads(data)
            os.write(back_w, pickle.dumps(function(*args)))
    times = []
    for number in range(count):
        began = now()
        os.write(there_w, pickle.dumps((abs, (number,))))
        pickle.loads(os.read(back_r, 65536))
        times.append((now() - began) * 1e6)
    os.write(there_w, b"end")
    os.waitpid(pid, 0)
    for fd in (there_r, there_w, back_r, back_w):
        os.close(fd)
    return {"p50": statistics.median(times)}


def batched(count: int = 20_000, batch: int = 128) -> dict[str, float]:
    """The cheapest engine that still has a future for each task: batches through two pipes, one thread that reads."""
    there_r, there_w = os.pipe()
    back_r, back_w = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(there_w)
        with os.fdopen(there_r, "rb") as tasks, os.fdopen(back_w, "wb") as results:
            try:
                while True:
                    results.write(pickle.dumps([function(*args) for function, args in pickle.load(tasks)]))
                    results.flush()
            except EOFError:
                os._exit(0)
    futures: list[Future[int]] = []

    def receive() -> None:
        with os.fdopen(back_r, "rb") as results:
            done = 0
            while done < count:
                for value in pickle.load(results):
                    futures[done].set_result(value)
                    done += 1

    os.close(back_w)
    began = now()
    reader = threading.Thread(target=receive)
    with os.fdopen(there_w, "wb") as tasks:
        for start in range(0, count, batch):
            calls = [(abs, (number,)) for number in range(start, min(start + batch, count))]
            futures += [Future() for _ in calls]
            tasks.write(pickle.dumps(calls))
            tasks.flush()
            if not start:
                reader.start()
        for future in futures:
            future.result()
    rate = count / (now() - began)
    reader.join()
    os.close(there_r)
    os.waitpid(pid, 0)
    return {"rate": rate}


def memory_copy(size: int = 100 * BLOCK) -> dict[str, float]:
    """Copy an array into memory that has been touched before."""
    source, target = np.ones(size, dtype=np.uint8), np.zeros(size, dtype=np.uint8)
    times = []
    for _ in range(9):
        began = now()
        target[:] = source
        times.append(now() - began)
    return {"rate": size / statistics.median(times) / 1e9}


def bare_start(method: str) -> dict[str, float]:
    """Start a process of multiprocessing, hear of it, and end it."""
    context = multiprocessing.get_context(method)
    times = []
    for _ in range(7):
        reader, writer = context.Pipe(duplex=False)
        began = now()
        process = context.Process(target=_answer, args=(writer,))
        process.start()
        reader.recv_bytes()
        times.append((now() - began) * 1e3)
        process.join()
    return {"ms": statistics.median(times[1:])}


def _answer(writer: Any) -> None:
    writer.send_bytes(b"here")


def all_limits() -> dict[str, dict[str, float]]:
    """Measure them all."""
    limits = {"raw ping-pong": ping_pong(), "batched pipe writes": batched(), "memory copy": memory_copy()}
    for method in ("fork", "forkserver", "spawn"):
        limits[f"bare start, {method}"] = bare_start(method)
    return limits
