"""Calls and results of plain values go another way than pickles; nobody must be able to tell."""

from __future__ import annotations

import math
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest

import taskpool
from taskpool._engine import plain, wire
from tests import tasks
from tests.helpers import at_most, on_hosts, outcome

Pool = Callable[..., taskpool.Executor]

VALUES = [
    0,
    -1,
    1 << 70,
    -0.0,
    math.inf,
    1.5,
    2j,
    True,
    False,
    None,
    "",
    "a" * 2000,
    "\udc80",
    b"",
    b"\x80\x05",
    b"\0" * 2000,
]
NUMBERS = [value for value in VALUES if not isinstance(value, (str, bytes))]


class Text(str):
    """A string that is more than one."""

    __slots__ = ()


class Number(int):
    """An integer that is more than one."""


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:12])
def test_a_plain_call_comes_back(value: object) -> None:
    """By value, type and sign."""
    stream = plain.dumps_call(tasks.identity, (value, value), {}, None)
    assert stream is not None
    assert plain.is_call(stream)
    function, args, kwargs, name = plain.loads_call(stream)
    assert (function, kwargs, name) == (tasks.identity, {}, None)
    assert [(type(each), repr(each)) for each in args] == [(type(value), repr(value))] * 2


@pytest.mark.parametrize(
    "value", [Text("a"), Number(1), (1,), [], bytearray(b"a"), memoryview(b"a"), "a" * 4000, object()]
)
def test_what_is_more_than_plain_is_pickled(value: object) -> None:
    """Also what marshal would write, but not as what it is, and what is long."""
    assert plain.dumps_call(tasks.identity, (value,), {}, None) is None


def test_a_function_that_is_not_where_its_name_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left to pickle, which has its own words for that."""
    assert plain.dumps_call(lambda: None, (), {}, None) is None
    assert plain.dumps_call(len, (), {}, None) is None
    assert plain.dumps_call(tasks.identity, (), {"a": 1}, None) is None
    assert plain.dumps_call(tasks.identity, (), {}, Text("name")) is None
    function = tasks.identity
    monkeypatch.setattr(tasks, "identity", tasks.square)
    assert plain.dumps_call(function, (1,), {}, None) is None
    monkeypatch.setattr(function, "__module__", None)
    assert plain.dumps_call(function, (1,), {}, None) is None


def test_no_pickle_looks_like_a_plain_call() -> None:
    """Whatever is pickled, and nothing at all."""
    assert not plain.is_call(b"")
    for value in VALUES:
        assert not plain.is_call(wire.dumps_call(tasks.identity, (value,), {}, None).stream)


def test_a_module_that_the_worker_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is imported there; one that cannot be is the error."""
    module = types.ModuleType("nowhere_else")
    exec("def function(number): return number", vars(module))
    monkeypatch.setitem(sys.modules, "nowhere_else", module)
    stream = plain.dumps_call(module.function, (1,), {}, None)
    assert stream is not None
    monkeypatch.delitem(sys.modules, "nowhere_else")
    with pytest.raises(ModuleNotFoundError, match="nowhere_else"):
        plain.loads_call(stream)
    (tmp_path / "nowhere_else.py").write_text("def function(number): return 7")
    monkeypatch.syspath_prepend(tmp_path)
    function, args, _, _ = plain.loads_call(stream)
    assert function(*args) == 7
    monkeypatch.delitem(sys.modules, "nowhere_else")


@on_hosts
def test_plain_values_through_a_worker(pool: Pool) -> None:
    """There and back, alone and among others; a worker calls what its own module has now, as with a pickle."""
    executor = pool(1)
    for value in VALUES:
        back = outcome(executor.submit(tasks.identity, value))
        assert (type(back), repr(back)) == (type(value), repr(value))
    for value in (Text("a"), Number(3), [1, "a"], {"a": None}):
        back = outcome(executor.submit(tasks.identity, value))
        assert (type(back), back) == (type(value), value)
    futures = [executor.submit(tasks.identity, value) for value in NUMBERS * 20]
    assert [repr(outcome(future)) for future in futures] == [repr(value) for value in NUMBERS * 20]
    assert outcome(executor.submit(tasks.replace_square)) is None
    assert outcome(executor.submit(tasks.square, 3)) == "replaced"


@on_hosts
def test_outcomes_of_a_worker_that_nobody_listens_to(pool: Pool, tmp_path: Path) -> None:
    """Behind many short tasks comes a long one; what was done before it is known soon all the same."""
    executor = pool(1)
    for future in [executor.submit(time.sleep, 1e-3) for _ in range(60)]:
        assert outcome(future) is None
    short = [executor.submit(time.sleep, 1e-3) for _ in range(9)]
    long = executor.submit(tasks.await_file, tmp_path / "release")
    with at_most(5, "the short ones"):
        assert [outcome(future) for future in short] == [None] * 9
    assert not long.done()
    (tmp_path / "release").touch()
    outcome(long)
