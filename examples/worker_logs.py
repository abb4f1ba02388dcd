"""What workers log and print comes out here, says where it came from, and survives the worker."""

import logging
import os
import signal
import sys

import taskpool

logging.basicConfig(
    level=logging.INFO,
    stream=sys.stdout,
    format="%(levelname)s %(name)s: %(message)s [task %(taskpool_task)s, worker %(taskpool_worker)s]",
)


def resize(name: str) -> str:
    logging.getLogger("images").info("resizing %s", name)
    if name == "bad.png":
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out
    print(f"{name} is smaller now")  # with output="forward" a record, too
    return name


with taskpool.Executor(2, name="press", output="forward") as pool:
    futures = [pool.submit(resize, name) for name in ("a.png", "bad.png")]
    assert futures[0].result() == "a.png"  # its records have been handled by now
    error = futures[1].exception()
    assert error.log == ("INFO images: resizing bad.png",)

with taskpool.Executor(2, output="capture") as pool:
    future = pool.submit(resize, "b.png")
    future.result()
    assert future.output == "b.png is smaller now\n"
