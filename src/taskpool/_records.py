"""Records about an executor: what its backend can do, and what it does. Loaded by those who ask."""

from __future__ import annotations

import attrs


@attrs.frozen
class Capabilities:
    """What a backend can do beyond running tasks.

    Attributes:
        kill: A task that does not yield is stopped by the end of its process.
        isolation: A task that crashes takes nothing else with it.
        processes: Tasks run in processes of their own; what crosses is pickled.
        start_methods: `mp_context=` chooses how processes start.
        preload: `preload=` names modules that workers share.
        recycling: `max_tasks_per_child=` replaces workers.
        logs: `logs=` sends records elsewhere than to the program's own handlers.
        output: `output=` takes what tasks print.
    """

    kill: bool
    isolation: bool
    processes: bool
    start_methods: bool
    preload: bool
    recycling: bool
    logs: bool
    output: bool


@attrs.frozen
class RunningTask:
    """A task that runs, as `Executor.stacks` found it.

    Attributes:
        task: Its name.
        id: What tells it apart.
        attempt: Which attempt it makes, from 1.
        worker: The name of the worker.
        pid: Its process.
        seconds: How long it has been running.
        stack: Where it is, and where the other threads of its process are; None if that could not be read in time.
    """

    task: str
    id: str
    attempt: int
    worker: str
    pid: int
    seconds: float
    stack: str | None


@attrs.frozen
class Stats:
    """What an executor is doing and has done.

    Attributes:
        workers: Workers that are ready for tasks or run one.
        idle: ... of these, the ones that run nothing.
        queued: Tasks, or pieces of maps, that wait for a worker.
        running: Workers that run something.
        finished: Tasks that ended with a result; items of maps count each.
        failed: ... with an exception of their own, or because they could not be sent.
        timed_out: ... by passing their limit.
        cancelled: ... by being cancelled.
        crashed: ... by the death of their worker.
        started: Workers that were started.
        replaced: Workers that ended before their time, by a crash or by being stopped.
        retried: Attempts that failed and were followed by another one.
        rerun: Items of maps that ran twice, since their worker died before their results, of less than a millisecond's
            work, were written.
    """

    workers: int = 0
    idle: int = 0
    queued: int = 0
    running: int = 0
    finished: int = 0
    failed: int = 0
    timed_out: int = 0
    cancelled: int = 0
    crashed: int = 0
    started: int = 0
    replaced: int = 0
    retried: int = 0
    rerun: int = 0
