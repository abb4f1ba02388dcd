"""How fast records of workers reach a handler: taskpool beside the two ways of the logging cookbook, in one run.

    python benchmarks/logs.py             # rates, in turn, five rounds
    python benchmarks/logs.py --quick     # one round
    python benchmarks/logs.py --cost      # what forwarding costs a task that does not log

Each contender has two worker processes that log 50,000 records each, and one handler in the parent that counts.
"""

from __future__ import annotations

import argparse
import logging
import logging.handlers
import multiprocessing
import os
import pickle
import socketserver
import statistics
import struct
import threading
import time

import taskpool

RECORDS = 100_000
WORKERS = 2


class Counter(logging.Handler):
    """Counts records, as a handler that costs little."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.all_there = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        record.getMessage()
        self.count += 1
        if self.count == RECORDS:
            self.all_there.set()


def talk(count: int) -> int:
    log = logging.getLogger("benchmark.talk")
    for number in range(count):
        log.info("record %d of %s", number, "a worker")
    return os.getpid()


def by_taskpool(counter: Counter) -> float:
    with taskpool.Executor(WORKERS) as pool:
        list(pool.map(abs, range(8)))
        began = time.perf_counter()
        for future in [pool.submit(talk, RECORDS // WORKERS) for _ in range(WORKERS)]:
            future.result()
        assert counter.all_there.wait(60), counter.count
        return time.perf_counter() - began


def _talk_to_queue(queue: multiprocessing.Queue, ready: multiprocessing.Barrier) -> None:
    root = logging.getLogger()
    root.handlers[:] = [logging.handlers.QueueHandler(queue)]
    ready.wait()
    talk(RECORDS // WORKERS)


def by_queue(counter: Counter) -> float:
    context = multiprocessing.get_context("fork")
    queue, ready = context.Queue(), context.Barrier(WORKERS + 1)
    workers = [context.Process(target=_talk_to_queue, args=(queue, ready)) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()
    listener = logging.handlers.QueueListener(queue, counter)
    listener.start()
    ready.wait()
    began = time.perf_counter()
    assert counter.all_there.wait(60), counter.count
    seconds = time.perf_counter() - began
    listener.stop()
    for worker in workers:
        worker.join()
    return seconds


class _Stream(socketserver.StreamRequestHandler):
    counter: Counter

    def handle(self) -> None:
        while head := self.rfile.read(4):
            record = logging.makeLogRecord(pickle.loads(self.rfile.read(struct.unpack(">L", head)[0])))
            self.counter.handle(record)


def _talk_to_socket(port: int, ready: multiprocessing.Barrier) -> None:
    handler = logging.handlers.SocketHandler("localhost", port)
    logging.getLogger().handlers[:] = [handler]
    ready.wait()
    talk(RECORDS // WORKERS)
    handler.close()


def by_socket(counter: Counter) -> float:
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(WORKERS + 1)
    _Stream.counter = counter
    with socketserver.ThreadingTCPServer(("localhost", 0), _Stream) as server:
        port = server.server_address[1]
        workers = [context.Process(target=_talk_to_socket, args=(port, ready)) for _ in range(WORKERS)]
        for worker in workers:
            worker.start()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ready.wait()
        began = time.perf_counter()
        assert counter.all_there.wait(60), counter.count
        seconds = time.perf_counter() - began
        for worker in workers:
            worker.join()
        server.shutdown()
    return seconds


CONTENDERS = {"taskpool": by_taskpool, "QueueHandler, mp.Queue": by_queue, "SocketHandler": by_socket}


def rates(rounds: int) -> None:
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    found: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, run in CONTENDERS.items():
            counter = Counter()
            root.handlers[:] = [counter]
            found[name].append(RECORDS / run(counter))
    base = statistics.median(found["QueueHandler, mp.Queue"])
    for name, all_rates in found.items():
        rate = statistics.median(all_rates)
        print(f"{name:24} {rate:10,.0f} records/s   {rate / base:5.2f} x   {[round(r) for r in all_rates]}")


def cost() -> None:
    """Time short tasks with and without forwarding, in turn, best and median: many submits, and round trips."""
    for name, run in {
        "processor time of a task, µs": _processor,
        "a submit and its result, µs": _submits,
        "round trip, µs": _round_trips,
    }.items():
        found: dict[str, list[float]] = {"off": [], "forward": []}
        for turn in range(10):
            for way in sorted(found, reverse=turn % 2 == 0):  # whoever comes first finds another machine
                with taskpool.Executor(1, logs=way) as pool:
                    list(pool.map(abs, range(100)))
                    found[way].append(run(pool))
        print(name, {way: (round(min(times), 2), round(statistics.median(times), 2)) for way, times in found.items()})


def _submits(pool: taskpool.Executor) -> float:
    began = time.perf_counter()
    futures = [pool.submit(abs, number) for number in range(20_000)]
    for future in futures:
        future.result()
    return (time.perf_counter() - began) / 20_000 * 1e6


def _processor(pool: taskpool.Executor) -> float:
    """All that parent and worker compute for a task, which the rest of the machine disturbs least."""
    began = time.process_time() + pool.submit(time.process_time).result()
    for future in [pool.submit(abs, number) for number in range(10_000)]:
        future.result()
    return (time.process_time() + pool.submit(time.process_time).result() - began) / 10_000 * 1e6


def _round_trips(pool: taskpool.Executor) -> float:
    times = []
    for number in range(3_000):
        began = time.perf_counter()
        pool.submit(abs, number).result()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cost", action="store_true")
    arguments = parser.parse_args()
    if arguments.cost:
        cost()
    else:
        rates(1 if arguments.quick else 5)
