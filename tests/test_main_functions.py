"""What lives in `__main__` works in workers, however the program was started; and where a guard is needed one is told."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.helpers import EVERY_HOST, Backend, Ended, lines, on_every_host, run_script

# A program whose functions, classes and exceptions are its own. It has no guard unless it gets one.
PROGRAM = """
import collections, dataclasses, enum, functools, os, sys
import taskpool

with open(os.environ["NOTES"], "a") as file:
    file.write(f"{os.getpid()}\\n")

OFFSET = 10

class MainError(Exception):
    def __init__(self, code, reason):
        super().__init__(f"{code}: {reason}")
        self.code = code

class Point:
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __eq__(self, other):
        return type(other) is Point and (other.x, other.y) == (self.x, self.y)

    def moved(self, by):
        return Point(self.x + by, self.y)

class Special(Point):
    def moved(self, by):
        return super().moved(2 * by)

@dataclasses.dataclass
class Record:
    number: int

class Colour(enum.Enum):
    RED = 1

Pair = collections.namedtuple("Pair", "left right")

def doubling(function):
    @functools.wraps(function)
    def doubled(*args):
        return 2 * function(*args)
    return doubled

def shift(number):
    return number + OFFSET

@doubling
def decorated(number):
    return number

def factorial(number):
    return number * factorial(number - 1) if number else 1

def even(number):
    return number == 0 or odd(number - 1)

def odd(number):
    return number != 0 and even(number - 1)

def is_point(value):
    return isinstance(value, Point)

def fail(number):
    raise MainError(number, "odd")

def fail_from_cause():
    try:
        fail(1)
    except MainError as error:
        raise ValueError("second") from error

def same(value):
    return value

def main(**options):
    factor = 5
    with taskpool.Executor(2, **options) as pool:
        run = lambda function, *args: pool.submit(function, *args).result(30)
        assert run(lambda number: number * factor, 2) == 10
        assert run(shift, 1) == 11
        assert run(decorated, 4) == 8
        assert run(factorial, 5) == 120
        assert run(even, 10) is True
        assert run(functools.partial(pow, 2), 3) == 8
        assert run(functools.partial(shift), 3) == 13
        assert list(pool.map(shift, range(3))) == [10, 11, 12]
        assert list(pool.map(lambda a, b: a + b + factor, [1, 2], [3, 4])) == [9, 11]
        assert run(Point, 1, 2) == Point(1, 2)
        assert type(run(Point, 1, 2)) is Point
        assert run(Point(1, 2).moved, 3) == Point(4, 2)
        assert run(Special(1, 2).moved, 3) == Point(7, 2)
        assert run(is_point, Special(1, 2)) is True
        assert run(same, Record(3)) == Record(3)
        assert run(same, Colour.RED) is Colour.RED
        assert run(same, Pair(1, [Point(1, 2)])) == Pair(1, [Point(1, 2)])
        assert run(lambda: [function(2) for function in (shift, lambda number: number + factor)]) == [12, 7]
        assert run(same, shift)(1) == 11
        try:
            run(fail, 3)
        except MainError as error:
            assert error.code == 3
            assert str(error) == "3: odd"
            assert "in fail" in str(error.__cause__)
        else:
            raise AssertionError("no error")
        try:
            run(fail_from_cause)
        except ValueError as error:
            assert type(error.__cause__.__cause__) is MainError, error.__cause__.__cause__
        assert run(os.getpid) != os.getpid()
    print("all right", flush=True)
"""
ALL_RIGHT = "all right\n"
FROM_STDIN = (
    "import os, sys; os.dup2(os.open(sys.argv[1], os.O_RDONLY), 0); os.execv(sys.executable, [sys.executable, '-'])"
)
CELLS = "import sys\nfor number, cell in enumerate(open(sys.argv[1]).read().split('\\n\\n\\n')):\n    exec(compile(cell, f'<cell {number}>', 'single' if cell.count(chr(10)) == 0 else 'exec'), globals())"


def launch(how: str, source: str, folder: Path) -> Ended:
    """Run a program in one of the ways in which Python runs programs."""
    file = folder / "source.py"
    file.write_text(source)
    commands = {
        "file": (str(file),),
        "-c": ("-c", source),
        "-i -c": ("-i", "-c", source),
        "stdin": ("-c", FROM_STDIN, str(file)),
        "cells": ("-c", CELLS, str(file)),
        "-m": ("-m", "source"),
        "folder": (str(folder),),
    }
    (folder / "__main__.py").write_text(source)
    env = {"NOTES": str(folder / "notes")}
    if how == "-m":
        env["PYTHONPATH"] = path_with(folder)
    return run_script("", command=commands[how], env=env)


def path_with(folder: Path) -> str:
    """Return the search path of this process with a folder in front."""
    return os.pathsep.join([str(folder), str(Path(__file__).parent.parent), *filter(None, sys.path)])


@pytest.mark.core
@pytest.mark.parametrize("how", ["file", "-c", "-i -c", "stdin", "cells", "-m", "folder"])
def test_programs_without_a_guard(tmp_path: Path, how: str) -> None:
    """On the default backend everything works without a guard, and the program itself runs once."""
    ended = launch(how, PROGRAM + "\n\nmain()\n", tmp_path)
    assert ended.out == ALL_RIGHT, ended
    assert ended.code == 0, ended
    assert len(lines(tmp_path / "notes")) == 1, "a worker ran the program"


@pytest.mark.core
@on_every_host
def test_programs_with_a_guard(backend: Backend, tmp_path: Path) -> None:
    """With a guard everything works on every host."""
    ended = launch("file", f"{PROGRAM}\n\nif __name__ == '__main__':\n    main(**{backend.options})\n", tmp_path)
    assert ended.out == ALL_RIGHT, ended
    assert ended.code == 0, ended


UNGUARDED_STARTS = [each for each in EVERY_HOST if each.start in ("spawn", "forkserver")]


@pytest.mark.parametrize("backend", UNGUARDED_STARTS, ids=str)
def test_programs_from_the_command_line(backend: Backend, tmp_path: Path) -> None:
    """A program that no worker could import needs no guard under any start method, and its functions work."""
    ended = launch("-c", f"{PROGRAM}\n\nmain(**{backend.options})\n", tmp_path)
    assert ended.out == ALL_RIGHT, ended
    assert ended.code == 0, ended


@pytest.mark.parametrize("backend", UNGUARDED_STARTS, ids=str)
def test_programs_from_standard_input(backend: Backend, tmp_path: Path) -> None:
    """Where multiprocessing takes "<stdin>" for a file that workers can import, the error comes soon."""
    ended = launch("stdin", f"{PROGRAM}\n\nmain(**{backend.options})\n", tmp_path)
    assert ended.out == ALL_RIGHT or "\ntaskpool.errors.InitializerError" in ended.err, ended
    assert ended.seconds < 10, ended


DEFAULT_MAP = """
try:
    taskpool.map(fail, [3])
except MainError as error:
    print(error.code, taskpool.map(lambda number: number + OFFSET, [1, 2]), taskpool.map(Point, [1], [2]) == [Point(1, 2)])
"""


@pytest.mark.core
@pytest.mark.parametrize("how", ["file", "-c", "stdin", "cells"])
def test_the_shared_executor(tmp_path: Path, how: str) -> None:
    """`taskpool.map` at the top of a program without a guard does what it says."""
    ended = launch(how, PROGRAM + "\n\n" + DEFAULT_MAP, tmp_path)
    assert ended.out == "3 [11, 12] True\n", ended
    assert ended.code == 0, ended
    assert len(lines(tmp_path / "notes")) == 1, "a worker ran the program"


REDEFINED = """
import taskpool

def answer():
    return 1

with taskpool.Executor(1) as pool:
    print(pool.submit(answer).result(20))
    def answer():
        return 2
    print(pool.submit(answer).result(20))
    FACTOR = 3
    def answer():
        return FACTOR
    print(pool.submit(answer).result(20))
    FACTOR = 4
    print(pool.submit(answer).result(20))
"""


def test_functions_that_are_defined_again(tmp_path: Path) -> None:
    """As in a notebook: a worker that is warm runs the function as it is now."""
    ended = launch("file", REDEFINED, tmp_path)
    assert ended.out.split() == ["1", "2", "3", "4"], ended


SIBLING = """
import pathlib, sys
pathlib.Path(__file__).with_name("a_sibling.py").write_text("class Odd(Exception): pass\\ndef fail(): raise Odd('as itself')\\n")
import a_sibling
import taskpool

with taskpool.Executor(1) as pool:
    try:
        pool.submit(a_sibling.fail).result(20)
    except a_sibling.Odd as error:
        print(error)
"""


def test_modules_beside_the_program(tmp_path: Path) -> None:
    """Workers find the modules that lie beside the program."""
    assert launch("file", SIBLING, tmp_path).out == "as itself\n"


FILTERS = """
import warnings
import taskpool

class MainWarning(UserWarning):
    pass

warnings.filterwarnings("ignore", category=MainWarning)
warnings.filterwarnings("error", "mind", category=DeprecationWarning)

def warn():
    warnings.warn("of main", MainWarning)
    try:
        warnings.warn("mind the gap", DeprecationWarning)
    except DeprecationWarning:
        return "raised"

with taskpool.Executor(1) as pool:
    print(pool.submit(warn).result(20))
"""


def test_warning_filters_that_name_main(tmp_path: Path) -> None:
    """Warning filters reach the workers; one that no worker could understand costs nothing."""
    ended = launch("file", FILTERS, tmp_path)
    assert (ended.code, ended.out) == (0, "raised\n"), ended


# ---------------------------------------------------------------------------------------------- without a guard

NO_GUARD = """
import os, sys
import taskpool

with open(os.environ["NOTES"], "a") as file:
    file.write(f"{os.getpid()}\\n")

pool = taskpool.Executor(2, **OPTIONS, start_timeout=10)
print(pool.submit(abs, -1).result(20))
"""


@pytest.mark.core
@pytest.mark.parametrize("backend", UNGUARDED_STARTS, ids=str)
def test_a_missing_guard_is_named(backend: Backend, tmp_path: Path) -> None:
    """Where workers import the program and it has no guard, the error says so, soon, and nothing starts without end."""
    ended = launch("file", NO_GUARD.replace("OPTIONS", repr(backend.options)), tmp_path)
    assert ended.code == 1, ended
    (error,) = [line for line in ended.err.splitlines() if line.startswith("taskpool.errors.")]
    assert 'if __name__ == "__main__"' in error, ended.err
    assert ended.seconds < 10, ended
    # Three starts that fail are enough; a Pool makes two at a time, and again before it is ended.
    assert len(lines(tmp_path / "notes")) <= 1 + 3 * 3, "the program ran again and again"


def test_a_missing_guard_in_the_shared_map(tmp_path: Path) -> None:
    """A program that a worker of multiprocessing imports may call `taskpool.map` at its top: that does no harm."""
    source = (
        "import os, multiprocessing, taskpool\n"
        "print(taskpool.map(abs, [-1]), flush=True)\n"
        "if __name__ == '__main__':\n"
        "    process = multiprocessing.get_context('spawn').Process(target=print, args=('child',))\n"
        "    process.start()\n"
        "    process.join(20)\n"
        "    print(process.exitcode)\n"
    )
    ended = launch("file", source, tmp_path)
    assert ended.out.splitlines()[-1] == "0", ended
    assert ended.out.splitlines()[:1] == ["[1]"], ended
