"""Nested calls: a task that uses taskpool itself, through a library perhaps, without knowing that it runs in a worker."""

import taskpool


def count_letters(word: str) -> int:
    return len(word)


def count_page(words: list[str]) -> int:
    # In a worker this is an executor of the worker's own, with the CPUs that fall to it.
    return sum(taskpool.map(count_letters, words))


def dig(depth: int) -> int:
    return taskpool.map(dig, [depth + 1])[0]


pages = [["one", "two"], ["three"], ["four", "five", "six"]]
assert taskpool.map(count_page, pages) == [6, 5, 11]

# A recursion without end is refused, before it has filled the machine with processes.
try:
    dig(0)
except taskpool.NestingError as error:
    print(error)
else:
    raise AssertionError("the recursion was not bounded")
