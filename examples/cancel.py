"""Cancel: also a task that runs already."""

import asyncio
import time
from concurrent.futures import CancelledError

import taskpool

with taskpool.Executor(max_workers=1) as pool:
    running = pool.submit(time.sleep, 60)
    waiting = pool.submit(print, "never printed")
    while not running.running():
        time.sleep(0.01)

    assert waiting.cancel()  # it never starts
    assert running.cancel()  # it is stopped, killed if need be
    try:
        running.result()
    except CancelledError:
        print("both are cancelled")
    else:
        raise AssertionError("the task ran to its end")

    # asyncio reaches the worker too: futures can be awaited.
    async def give_up_after(seconds: float) -> None:
        try:
            await asyncio.wait_for(pool.submit(time.sleep, 60), seconds)
        except TimeoutError:
            print(f"gave up after {seconds} s")

    asyncio.run(give_up_after(0.2))
    assert pool.submit(sum, [1, 2, 3]).result() == 6
