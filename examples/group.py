"""Groups: tasks that end together, at the latest where their block ends."""

import asyncio
import time

import taskpool


def fetch(page: int) -> str:
    if page == 3:
        raise LookupError(f"there is no page {page}")
    return f"page {page}"


with taskpool.Executor(max_workers=2) as pool:
    # Leaving the block waits for all.
    with pool.group() as group:
        first, second = group.submit(fetch, 1), group.submit(fetch, 2)
    assert (first.result(), second.result()) == ("page 1", "page 2")

    # The first failure stops the others, and comes out of the block in an ExceptionGroup.
    began = time.monotonic()
    try:
        with pool.group() as group:
            slow = group.submit(time.sleep, 60)
            group.submit(fetch, 3)
    except* LookupError as failures:
        print(failures.exceptions)
    else:
        raise AssertionError("the group did not fail")
    assert slow.cancelled()
    assert time.monotonic() - began < 30

    # `timeout=` bounds the whole block.
    try:
        with pool.group(timeout=0.5, name="patience") as group:
            group.submit(time.sleep, 60)
    except* taskpool.CallTimeoutError as failures:
        print(failures.exceptions[0])
    else:
        raise AssertionError("the group was not bounded")

    # In asyncio the loop goes on meanwhile, and a failure interrupts what the block awaits.
    async def main() -> None:
        try:
            async with pool.group() as group:
                group.submit(fetch, 3)
                await asyncio.sleep(60)
        except* LookupError:
            print("interrupted")

    asyncio.run(main())
    assert time.monotonic() - began < 30
