"""Lazy maps: endless inputs, results in order or as they come, and a bound on what is in memory."""

import itertools

import taskpool


def is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, int(n**0.5) + 1))


with taskpool.Executor() as pool:
    # The input has no end. It is read a little ahead of what is asked for.
    numbers = itertools.count()
    primes = (n for n, prime in zip(itertools.count(), pool.imap(is_prime, numbers)) if prime)
    first = list(itertools.islice(primes, 10))
    print(first)

    # Results as they come, for when their order does not matter.
    print(sum(pool.imap_unordered(is_prime, range(1000))), "primes below 1000")

    # Several inputs, as in the built-in map; `strict` wants them equally long.
    powers = list(pool.imap(pow, [2, 3, 4], [10, 5, 2], strict=True))

assert first == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]
assert powers == [1024, 243, 16]
