"""First steps: run functions in worker processes."""

import math
import os

import taskpool


def cube(n: int) -> int:
    return n**3


# One call over many items, on a shared pool.
cubes = taskpool.map(cube, range(10))
print(cubes)

# A pool of your own is a concurrent.futures.Executor.
with taskpool.Executor(max_workers=2) as pool:
    future = pool.submit(math.factorial, 20)
    print(future.result())

    # Results come in order. Lambdas need no preparation.
    doubled = list(pool.map(lambda n: 2 * n, range(5)))
    print(doubled)

    elsewhere = pool.submit(os.getpid).result()

assert cubes == [0, 1, 8, 27, 64, 125, 216, 343, 512, 729]
assert doubled == [0, 2, 4, 6, 8]
assert elsewhere != os.getpid()
