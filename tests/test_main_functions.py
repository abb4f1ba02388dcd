"""What lives in `__main__` works in workers, however the program was started; and where a guard is needed one is told."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.helpers import EVERY_HOST, TEMPLATE, Backend, Ended, lines, on_every_host, run_script

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
        "exec": ("-c", "import sys; exec(open(sys.argv[1]).read(), {'__name__': '__main__'})", str(file)),
        "profiled": ("-m", "cProfile", str(file)),
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


# ---------------------------------------------------------------------------------------------- globals in a worker

# What initializers and tasks do to the globals of the program stays in their worker.
STATEFUL = """
import functools, threading
import taskpool

STATE = None
CACHE = {}
CALLS = 0
LOCK = threading.Lock()
GUARD = threading.RLock()
LOCAL = threading.local()

class Connection:
    opened = 0
    current = None

    def __init__(self, name):
        self.name = name

    @classmethod
    def open(cls, name):
        cls.opened += 1
        cls.current = cls(name)
        return cls.current

def initialize(value):
    global STATE
    STATE = value
    CACHE["initialized"] = value
    Connection.open(value)

def read(number):
    return STATE, CACHE["initialized"], Connection.current.name, number

def remember(number):
    CACHE[number] = True
    return len(CACHE)

def count():
    global CALLS
    CALLS += 1
    return CALLS

def is_first(seen=[]):
    seen.append(1)
    return len(seen) == 1

def counts_itself():
    counts_itself.calls = getattr(counts_itself, "calls", 0) + 1
    return counts_itself.calls

def is_connection(value):
    return isinstance(value, Connection) and isinstance(Connection.current, Connection) and type(value) is Connection

def use_locks(number):
    with LOCK, GUARD:
        LOCAL.number = number
        return LOCAL.number

@functools.cache
def fib(number):
    return number if number < 2 else fib(number - 1) + fib(number - 2)

def call_fib(number):
    return fib(number)

def in_cache():
    return fib.cache_info().currsize

@functools.singledispatch
def kind(value):
    return "any"

@kind.register
def _(value: int):
    return "int"

@kind.register
def _(value: Connection):
    return "connection"

def call_kind(value):
    return kind(value)

def main(**options):
    with taskpool.Executor(1, initializer=initialize, initargs=("ready",), **options) as pool:
        run = lambda function, *args: pool.submit(function, *args).result(30)
        assert run(read, 1) == ("ready", "ready", "ready", 1), run(read, 1)
        assert list(pool.map(read, range(2))) == [("ready", "ready", "ready", number) for number in range(2)]
        assert run(lambda: (STATE, Connection.opened)) == ("ready", 1)
        assert [run(remember, number) for number in range(3)] == [2, 3, 4]
        assert list(pool.map(remember, range(5))) == [4, 4, 4, 5, 6]
        assert [run(count) for _ in range(3)] == [1, 2, 3]
        assert [run(is_first) for _ in range(2)] == [True, False]
        assert [run(counts_itself) for _ in range(2)] == [1, 2]
        assert run(is_connection, Connection(1)) is True
        assert run(Connection.open, "again").name == "again"
        assert type(run(lambda: Connection.current)) is Connection
        assert (STATE, CACHE, CALLS, Connection.opened, Connection.current) == (None, {}, 0, 0, None)
        assert run(use_locks, 5) == 5
        assert run(fib, 20) == run(call_fib, 20) == 6765
        assert run(in_cache) == run(lambda: fib.cache_info().currsize) == 21
        assert fib.cache_info().currsize == 0
        assert run(call_kind, 1) == "int" and run(kind, "") == "any" and run(kind, Connection(1)) == "connection"
    print("all right", flush=True)
"""


@pytest.mark.core
@on_every_host
def test_what_workers_do_to_globals(backend: Backend, tmp_path: Path) -> None:
    """An initializer and all tasks of a worker share one set of the program's globals, on every host."""
    ended = launch("file", f"{STATEFUL}\n\nif __name__ == '__main__':\n    main(**{backend.options})\n", tmp_path)
    assert ended.out == ALL_RIGHT, ended


@pytest.mark.parametrize("how", ["-c", "stdin", "cells", "-m", "exec", "profiled"])
def test_what_workers_do_to_globals_however_it_began(tmp_path: Path, how: str) -> None:
    """It is the same for each way to start a program, and for namespaces that only call themselves `__main__`."""
    ended = launch(how, STATEFUL + "\n\nmain()\n", tmp_path)
    assert ended.out.startswith(ALL_RIGHT), ended


# What changes in the program takes effect in workers that are warm.
CHANGING = """
import taskpool

pool = taskpool.Executor(1)
run = lambda function, *args: pool.submit(function, *args).result(20)

def f(x):
    return helper(x)

try:
    list(pool.map(f, [1], timeout=20))
except NameError as error:
    assert "helper" in str(error)
else:
    raise AssertionError("no error")

def helper(x, *, more=0):
    return x + 1 + more

assert list(pool.map(f, [1])) == [2]

def helper(x, *, more=0, much=(5,)):
    return x + much[0] + more

assert run(f, 1) == 6
helper.__kwdefaults__["much"] = (6,)
assert run(f, 1) == run(lambda: f(1)) == 7
helper.__kwdefaults__ = {"more": 1, "much": (7,)}
assert run(f, 1) == 9
helper.__code__ = (lambda x, **_: -x).__code__
assert run(f, 1) == -1

def g(x=1):
    return x, getattr(g, "note", None)

assert run(g) == (1, None)
g.__defaults__ = (10,)
assert run(g) == (10, None)
g.note = "first"
assert run(g) == (10, "first")
g.note = "second"
assert run(g) == (10, "second")

TABLE = {"g": g}
through_table = lambda: TABLE["g"]()
assert run(through_table) == (10, "second")
g.__defaults__ = (11,)
assert run(through_table) == (11, "second")

VALUES = [1]
summed = lambda: sum(VALUES)
assert run(summed) == 1
VALUES.append(2)
assert run(summed) == 3
VALUES = (4,)
assert run(summed) == 4

def sum(values):
    return "mine"

assert run(summed) == "mine"
del sum
assert run(summed) == 4

class Shape:
    sides = 3
    def describe(self):
        return self.sides, FACTOR

FACTOR = 2
describe = lambda: Shape().describe()
old = Shape()
assert run(describe) == run(old.describe) == (3, 2)
Shape.sides = 4
FACTOR = 3
assert run(describe) == (4, 3)
Shape.describe = lambda self, word="patched": word
assert run(describe) == "patched"
Shape.describe.__defaults__ = ("again",)
assert run(describe) == "again"

class Shape:
    def describe(self):
        return "new"

assert run(describe) == "new"
assert run(Shape().describe) == "new"
assert run(old.describe) == "again"
assert type(run(lambda: Shape())) is Shape
assert type(run(lambda each: each, old)) is type(old) is not Shape

def make(value, shape=None):
    return lambda: (value, shape, FACTOR)

assert [run(make(value)) for value in (1, True, 1.0)] == [(1, None, 3), (True, None, 3), (1.0, None, 3)]
assert type(run(make(True))[0]) is bool
assert type(run(make(1, Shape()))[1]) is Shape
pool.shutdown()
print("all right")
"""


@pytest.mark.core
@pytest.mark.parametrize("how", ["file", "stdin", "cells", "exec"])
def test_what_changes_in_the_program(tmp_path: Path, how: str) -> None:
    """As in a notebook: what is defined later, defined again or changed takes effect, in workers that are warm."""
    ended = launch(how, CHANGING, tmp_path)
    assert ended.out == ALL_RIGHT, ended


CHANGED_SINCE = """
import taskpool

CONFIG = None
POINTS = []

class Point:
    def describe(self):
        return CONFIG

POINTS.append(Point())

def initialize(point):
    global ORIGIN
    ORIGIN = point

def read():
    return CONFIG, isinstance(ORIGIN, Point), isinstance(POINTS[0], Point), ORIGIN.describe()

def describe():
    return "as it was"

if __name__ == "__main__":
    CONFIG = "set"
    def describe():
        return "as it is"
    with taskpool.Executor(1, initializer=initialize, initargs=(Point(),), **OPTIONS) as pool:
        print(pool.submit(read).result(20), pool.submit(describe).result(20))
"""


@on_every_host
def test_a_program_that_changed_since_workers_import_it(backend: Backend, tmp_path: Path) -> None:
    """What workers import of the main module gives way to what it is now; classes stay the ones that they have."""
    ended = launch("file", CHANGED_SINCE.replace("OPTIONS", repr(backend.options)), tmp_path)
    assert ended.out == "('set', True, True, 'set') as it is\n", ended


UNSENDABLE = """
import concurrent.futures, threading
import taskpool

def generate():
    yield 1

connection = generate()
future = concurrent.futures.Future()
thread = threading.Thread()
own = generate()

def use():
    return next(connection)

def wait():
    return future.result(1)

def join():
    thread.join()

def name_only(really):
    return connection.send(None) if really else 5

class Job:
    def submit(self):
        return pool.submit(self.run)
    def run(self):
        return 6

def open_own():
    global own
    own = "opened"

def use_own():
    return own

with taskpool.Executor(1, initializer=open_own) as pool:
    for function, name, kind in [(use, "connection", "generator"), (wait, "future", "Future"), (join, "thread", "Thread")]:
        try:
            pool.submit(function).result(20)
        except taskpool.NotSendableError as error:
            text = str(error)
            assert f"function '{function.__name__}' uses the global '{name}' (of type {kind})" in text, text
            assert "cannot pickle" in text and "initializer" in text, text
        else:
            raise AssertionError(function)
    print(pool.submit(name_only, False).result(20), pool.submit(Job().run).result(20), pool.submit(use_own).result(20))
"""


@pytest.mark.core
def test_globals_that_cannot_be_sent(tmp_path: Path) -> None:
    """A function that uses one fails and names it; one that only names it runs; an initializer can make another."""
    ended = launch("file", UNSENDABLE, tmp_path)
    assert ended.out == "5 6 opened\n", ended


HOMEWARD = """
import taskpool

SCALE = 2

class Counter:
    total = 0

    def add(self):
        Counter.total += 1
        return self

    def scaled(self):
        return SCALE

class Failure(Exception):
    def scaled(self):
        return SCALE

def fail():
    raise Failure

def function():
    return SCALE

def local_class():
    class Local:
        def scaled(self):
            return SCALE
    return Local

with taskpool.Executor(1) as pool:
    run = lambda function, *args: pool.submit(function, *args).result(20)
    scaled, Local = Counter.scaled, local_class()
    counter, local, made = run(Counter().add), run(lambda: Local()), run(lambda: (lambda: SCALE))
    assert run(lambda: (function, Counter, [Failure])) == (function, Counter, [Failure])
    assert type(counter) is Counter and type(local) is Local
    assert Counter.total == 0 and Counter.scaled is scaled, "the class here is as it was"
    try:
        run(fail)
    except Failure as error:
        failure = error
    SCALE = 3
    assert [each.scaled() for each in (counter, local, failure)] == [3, 3, 3] and made() == function() == 3
    worker_made = run(local_class)
    assert worker_made().scaled() == 3
print("all right")
"""


@pytest.mark.parametrize("how", ["file", "cells", "exec"])
def test_what_comes_home(tmp_path: Path, how: str) -> None:
    """Results and errors are of the program's own classes, which stay as they are; functions see its globals."""
    ended = launch(how, HOMEWARD, tmp_path)
    assert ended.out == ALL_RIGHT, ended


NESTED = """
import taskpool

BASE = 100

class Point:
    def __init__(self, x):
        self.x = x

class Odd(Exception):
    pass

def fail():
    raise Odd("inner")

def inner(x):
    return Point(x + BASE)

def outer(x):
    with taskpool.Executor(1) as pool:
        point = pool.submit(inner, x).result(20)
        assert type(point) is Point
        try:
            pool.submit(fail).result(20)
        except Odd as error:
            return point, str(error)

if __name__ == "__main__":
    with taskpool.Executor(1, **OPTIONS) as pool:
        point, text = pool.submit(outer, 1).result(20)
        print(type(point) is Point, point.x, text)
"""


@pytest.mark.parametrize("backend", [TEMPLATE, Backend("process", "spawn"), Backend("futures", "fork")], ids=str)
def test_executors_in_tasks(backend: Backend, tmp_path: Path) -> None:
    """A task's own executor sends the program's functions on, and the program's objects come back all the way."""
    ended = launch("file", NESTED.replace("OPTIONS", repr(backend.options)), tmp_path)
    assert ended.out == "True 101 inner\n", ended


CLASSES = """
import abc, dataclasses, enum, functools, threading, typing
import taskpool

class Base:
    registry = {}

    def __init_subclass__(cls):
        Base.registry[cls.__name__] = cls

class Sub(Base):
    lock = threading.Lock()

    @property
    def number(self):
        return NUMBER

    @functools.cached_property
    def cached(self):
        return NUMBER

    @functools.lru_cache
    def memo(self):
        return NUMBER

    @staticmethod
    def static():
        return NUMBER

    class Inner:
        outer = None

Sub.Inner.outer = Sub
NUMBER = 7

class Abstract(abc.ABC):
    @abc.abstractmethod
    def number(self): ...

class Concrete(Abstract):
    __slots__ = ("value",)

    def number(self):
        return NUMBER

@dataclasses.dataclass(frozen=True)
class Record:
    number: "int"
    others: list = dataclasses.field(default_factory=list)

class Colour(enum.Enum):
    RED = 1

    def number(self):
        return NUMBER

def everything():
    sub = Sub()
    with sub.lock:
        numbers = sub.number, sub.cached, sub.memo(), sub.static(), Concrete().number(), Colour.RED.number()
    assert Base.registry == {"Sub": Sub} and Sub.Inner.outer is Sub and isinstance(Concrete(), Abstract)
    assert typing.get_type_hints(Record)["number"] is int
    return numbers, Record(1), Colour.RED, Sub.Inner

with taskpool.Executor(1) as pool:
    for _ in range(2):
        numbers, record, colour, inner = pool.submit(everything).result(20)
        assert numbers == (7,) * 6 and record == Record(1) and colour is Colour.RED and inner is Sub.Inner
    assert pool.submit(Sub.static).result(20) == pool.submit(Sub().memo).result(20) == 7
print("all right")
"""


def test_classes_of_many_kinds(tmp_path: Path) -> None:
    """Classes that know each other, in circles too, hold locks, or are made by a library work as in the program."""
    ended = launch("file", CLASSES, tmp_path)
    assert ended.out == ALL_RIGHT, ended


KEPT = """
import enum, logging, re
from taskpool._engine import functions

FACTOR, PATTERN, LOG, VALUES = 3, re.compile("a"), logging.getLogger("x"), [1]

class Point:
    size = 1
    def moved(self):
        return FACTOR

class Colour(enum.Enum):
    RED = 1

def helper(x, *, y=1):
    return x * FACTOR, PATTERN, LOG, Colour.RED

def steady():
    return helper(1), Point(), later(), VALUES

def kept():
    return functions.by_value(steady)

def make(value):
    return lambda: value

first = kept()
assert kept() is first
assert functions.by_value(make(1)) is functions.by_value(make(1)) is not functions.by_value(make(True))
assert functions.by_value(make([1])) is None
changes = [
    "FACTOR = 4",
    "later = len",
    "helper.__defaults__ = (1,)",
    "helper.__kwdefaults__['y'] = 2",
    "helper.note = 1",
    "helper.__code__ = helper.__code__.replace(co_name='other')",
    "Point.size = 2",
    "Point.moved.__defaults__ = (Point(),)",
    "Point.more = 1",
    "VALUES.append(2)",
    "PATTERN = re.compile('b')",
    "del FACTOR",
    "steady.__defaults__ = ()",
    "def steady(): return helper(1)",
]
for change in changes:
    exec(change)
    again = kept()
    assert again is not first, change
    assert kept() is again, change
    first = again
print("all right")
"""


def test_a_pickle_is_kept_as_long_as_it_holds(tmp_path: Path) -> None:
    """Submitting the same function again pickles nothing, and anything that changes it is noticed."""
    ended = launch("file", KEPT, tmp_path)
    assert ended.out == ALL_RIGHT, ended


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

BESIDE_LARGE = """
import operator, pickle
import taskpool

class Point:
    def __init__(self, x):
        self.x = x

class Known:
    name = "__main__ __main__"  # mentions that belong to the function

TABLE = list(range(150_000))  # pickled, as large as what is not searched for names

def takes(point, beside):
    return point.x + len(beside)

def uses_table(point, *beside):
    return point.x + TABLE[1] * len(Known.name.split()) - 1

if __name__ == "__main__":
    for call in (
        (takes, Point(1), TABLE),
        (uses_table, Point(1)),
        (uses_table, Point(1), pickle.PickleBuffer(bytes(100_000))),
        (uses_table, Point(1), bytes(300_000)),
        (operator.length_hint, [TABLE, bytes(300_000), TABLE, Point(1)]),
    ):
        with taskpool.Executor(1) as pool:  # a worker that does not know the class yet
            print(pool.submit(*call).result(20))
"""


def test_instances_of_the_program_beside_large_things() -> None:
    """Their classes arrive with them, whatever the pickle's parts are."""
    ended = run_script(BESIDE_LARGE)
    assert ended.out.split() == ["150001", "2", "2", "2", "4"], ended


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
