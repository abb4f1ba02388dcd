"""asyncio: await tasks in worker processes. What ends a wait stops the task; the loop is never blocked."""

import asyncio
import time
from collections.abc import AsyncIterator

import taskpool


def parse(text: str) -> int:
    return int(text)


async def lines() -> AsyncIterator[str]:
    for text in ("1", "2", "three", "4"):
        await asyncio.sleep(0.01)  # as they come, from a socket say
        yield text


async def main() -> None:
    async with taskpool.Executor(max_workers=2) as pool:
        # One task, and many at once.
        assert await pool.run(parse, "7") == 7
        assert await asyncio.gather(*(pool.run(parse, str(n)) for n in range(100))) == list(range(100))

        # A record for each item, as they end. Inputs may be asynchronous, and endless.
        total = 0
        async for outcome in pool.aoutcomes(parse, lines()):
            if outcome.ok:
                total += outcome.value
            else:
                print(outcome.item, outcome.error, sep=": ")
        assert total == 1 + 2 + 4

        # A timeout or a cancellation stops the task in its worker, too.
        try:
            async with asyncio.timeout(0.3):
                await pool.run(time.sleep, 60)
        except TimeoutError:
            print("gave up, and the worker is free")
        else:
            raise AssertionError("the wait was not bounded")
        assert await pool.run(parse, "8") == 8


asyncio.run(main())
