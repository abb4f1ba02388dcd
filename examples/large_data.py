"""Large data: an argument as it is, and a value that many tasks use."""

from functools import partial

import taskpool
from taskpool import Shared


def reversed_copy(data: bytearray) -> bytearray:
    """A task may change its argument: what it gets is its own."""
    data.reverse()
    return data


def count(words: Shared[dict[str, int]], letter: str) -> int:
    """A shared value is looked at, not changed."""
    return sum(number for word, number in words.value.items() if word.startswith(letter))


def main() -> None:
    with taskpool.Executor(2) as pool:
        data = bytearray(range(256)) * 4096  # 1 MB
        answer = pool.submit(reversed_copy, data).result()
        print("sent and received 1 MB:", answer == data[::-1])

        words = taskpool.share({f"{letter}{number}": number for letter in "abc" for number in range(100_000)})
        print("words by letter:", list(pool.map(partial(count, words), "abc")))


if __name__ == "__main__":
    main()
