"""Crashes and hangs explain themselves."""

import ctypes
import logging
import time

import taskpool


def crash(address: int, note: str) -> None:
    logging.getLogger("crash").warning("%s: reading at %d", note, address)
    ctypes.string_at(address)


def hang() -> None:
    time.sleep(60)


logging.getLogger().addHandler(logging.NullHandler())  # else the warning is shown, as any other

with taskpool.Executor(1) as pool:
    error = pool.submit(crash, 0, "no such place").exception()
    print(error)
    assert error.call == "crash(0, 'no such place')"
    assert error.signal == "SIGSEGV"
    assert "in crash" in error.stack
    assert error.log == ("WARNING crash: no such place: reading at 0",)

    future = pool.options(task_timeout=2).submit(hang)
    while (stack := future.stack()) is None or "in hang" not in stack:
        time.sleep(0.01)  # it has not begun
    for running in pool.stacks():  # what else runs, and for how long
        print(running.task, running.worker, f"{running.seconds:.1f} s")
    assert "in hang" in future.exception().stack  # and where it was at its limit
