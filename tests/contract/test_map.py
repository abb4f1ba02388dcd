"""Every backend: `map` keeps the standard library's order and errors, and reads its input lazily."""

from __future__ import annotations

import copy
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import pytest

import taskpool
from tests import tasks
from tests.helpers import PATIENCE, Backend, at_most, bounded, lines, on_all, on_hosts, on_pools, run_script, wait_until

pytestmark = pytest.mark.core

Pool = Callable[..., taskpool.Executor]


@on_all
@pytest.mark.parametrize("chunksize", [None, 1, 3, 7, 1000])
def test_results_come_in_the_order_of_the_input(pool: Pool, chunksize: int | None) -> None:
    """Whatever the chunks are."""
    executor = pool()
    assert list(executor.map(tasks.square, range(100), chunksize=chunksize)) == [n * n for n in range(100)]


@on_all
def test_numbers_arrive_as_they_are(pool: Pool) -> None:
    """With their types and their bits, many of them together."""
    numbers: list[Any] = [0, -1, 1 << 40, -(1 << 200), True, False, None, 0.1, -0.0, float("inf"), float("nan"), 1 - 2j]
    results = list(pool(2).map(tasks.identity, numbers * 50))
    assert list(map(repr, results)) == list(map(repr, numbers)) * 50


@on_all
def test_several_iterables_end_with_the_shortest(pool: Pool) -> None:
    """As the builtin `map` does."""
    results = pool().map(tasks.add, range(10), itertools.count(100), [1, 2, 3])
    assert list(results) == [101, 104, 107]


@on_all
@pytest.mark.parametrize("items", [[], (), range(0), iter(())], ids=["list", "tuple", "range", "iterator"])
def test_an_empty_input_gives_nothing(pool: Pool, items: Any) -> None:
    """Without waiting."""
    assert list(pool().map(tasks.square, items)) == []


@on_all
@pytest.mark.parametrize(
    "make",
    [list, tuple, iter, dict.fromkeys, frozenset, lambda numbers: (number for number in numbers), bytes],
    ids=["list", "tuple", "iterator", "dict", "set", "generator", "bytes"],
)
def test_any_iterable_is_an_input(pool: Pool, make: Callable[[range], Any]) -> None:
    """Sliceable or not, sized or not."""
    assert sorted(pool().map(tasks.square, make(range(25)))) == [number * number for number in range(25)]


@on_all
def test_it_is_an_iterator(pool: Pool) -> None:
    """`next` works, and it ends once."""
    results = pool().map(tasks.square, [1, 2])
    assert iter(results) is results
    assert [next(results), next(results), next(results, "end"), next(results, "end")] == [1, 4, "end", "end"]


@on_all
@pytest.mark.parametrize("chunksize", [None, 1, 4, 100])
def test_an_items_error_comes_in_its_place(pool: Pool, chunksize: int | None) -> None:
    """The items before it keep their results, and then the iterator has ended."""
    results = pool().map(tasks.fail_at, itertools.repeat(7), range(20), chunksize=chunksize)
    assert [next(results) for _ in range(7)] == list(range(7))
    with pytest.raises(ValueError, match="bad item 7"):
        next(results)
    assert list(results) == []


@on_pools
def test_a_sized_input_runs_though_nobody_asks(pool: Pool, tmp_path: Path) -> None:
    """`map` of a list is eager, as the standard library's."""
    notes = tmp_path / "notes"
    pool().map(tasks.note, [notes] * 12, list(range(12)))
    wait_until(lambda: len(lines(notes)) == 12)


@on_all
def test_an_endless_input_is_read_ahead_only_so_far(pool: Pool) -> None:
    """`buffersize` bounds how many items are taken before their results are wanted."""
    taken = 0

    def numbers() -> Iterator[int]:
        nonlocal taken
        for number in itertools.count():
            taken += 1
            yield number

    executor = pool()
    results = executor.map(tasks.square, numbers(), buffersize=5)
    for number in range(40):
        assert next(results) == number * number
        assert taken <= number + 1 + 5 + 1
    results.close()  # type: ignore[attr-defined]
    at_close = taken
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1
    assert taken == at_close


@on_pools
def test_a_second_thread_that_asks_gets_the_error_alone(pool: Pool, tmp_path: Path) -> None:
    """Whoever was waiting for a result gets that one and all others."""
    results: Any = pool(1).map(
        tasks.call, [(tasks.await_file, tmp_path / "go"), *[(tasks.identity, n) for n in range(3)]]
    )
    got: list[Any] = []
    waiting = threading.Thread(target=got.extend, args=(results,))
    waiting.start()
    wait_until(lambda: results.groups.gi_running)
    with pytest.raises(ValueError, match="already executing"):
        next(results)
    (tmp_path / "go").touch()
    waiting.join(PATIENCE)
    assert got == [None, 0, 1, 2]


@on_pools
def test_close_while_another_thread_waits_for_a_result(pool: Pool, tmp_path: Path) -> None:
    """That thread waits no longer."""
    results: Any = pool(1).starmap(tasks.hold, [(tmp_path / "started", tmp_path / "release")])
    waiting: Future[Any] = Future()

    def wait_for_it() -> None:
        try:
            waiting.set_result(next(results))
        except BaseException as error:
            waiting.set_exception(error)

    thread = threading.Thread(target=wait_for_it, daemon=True)
    thread.start()
    wait_until(lambda: results.results._job._sleeper is not None and (tmp_path / "started").exists())
    bounded(results.close)
    with pytest.raises(CancelledError):
        waiting.result(PATIENCE)
    (tmp_path / "release").touch()
    thread.join(PATIENCE)
    with pytest.raises(StopIteration):
        next(results)


@on_pools
def test_close_before_the_first_result_ends_a_map(pool: Pool, tmp_path: Path) -> None:
    """What has not started never will."""
    executor = pool(1)
    first = tasks.hold, tmp_path / "started", tmp_path / "go"
    results: Any = executor.map(
        tasks.call, [first, *[(tasks.note, tmp_path / "notes", n) for n in range(5)]], chunksize=1
    )
    wait_until((tmp_path / "started").exists)
    results.close()
    (tmp_path / "go").touch()
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1
    assert list(results) == []
    assert lines(tmp_path / "notes") == []


@on_all
def test_the_results_of_a_map_are_no_copyable_thing(pool: Pool) -> None:
    """As with any generator."""
    results = pool(1).map(tasks.identity, range(3))
    with pytest.raises(TypeError):
        copy.copy(results)
    assert list(results) == [0, 1, 2]


@on_all
def test_an_endless_input_works_by_default(pool: Pool) -> None:
    """Without `buffersize` the read-ahead is bounded as well."""
    taken = 0

    def numbers() -> Iterator[int]:
        nonlocal taken
        for number in itertools.count():
            taken += 1
            yield number

    results = pool().map(tasks.square, numbers())
    assert list(itertools.islice(results, 50)) == [number * number for number in range(50)]
    assert taken < 50 + 20_000
    results.close()  # type: ignore[attr-defined]


@on_all
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_input_that_raises_harms_only_its_map(pool: Pool, kind: type[BaseException]) -> None:
    """Its exception reaches whoever iterates, after the results of the items before it; Ctrl-C and the like at once."""

    def numbers() -> Iterator[int]:
        yield from range(3)
        raise kind("the input is broken")

    executor = pool()
    got: list[int] = []
    with pytest.raises(kind, match="the input is broken"):
        got.extend(executor.map(tasks.square, numbers()))
    assert got == [0, 1, 4][: len(got)]
    assert len(got) == 3 or not issubclass(kind, Exception)
    assert list(executor.map(tasks.square, range(4))) == [0, 1, 4, 9]


@on_pools
def test_its_timeout_bounds_the_call_and_stops_what_it_started(pool: Pool, tmp_path: Path, backend: Backend) -> None:
    """Past `timeout` nothing of the map runs on, and the workers are free."""
    executor = pool(1)
    started = time.monotonic()
    stuck = tasks.sleep_for_ever if backend.hosted else lambda: tasks.await_file(tmp_path / "release")
    results = executor.map(tasks.note_then, itertools.repeat(tmp_path / "notes"), range(5), [stuck] * 5, timeout=0.3)
    with pytest.raises(TimeoutError) as caught:
        list(results)
    assert isinstance(caught.value, taskpool.CallTimeoutError)
    assert 0.25 <= time.monotonic() - started < 3
    if not backend.hosted:
        (tmp_path / "release").touch()
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1
    assert lines(tmp_path / "notes") in ([], ["0"])


@on_pools
def test_the_timeout_counts_from_the_call(pool: Pool, tmp_path: Path) -> None:
    """Not from the moment somebody iterates."""
    results = pool(1).map(tasks.hold, [tmp_path / "started"], [tmp_path / "release"], timeout=0.2)
    wait_until((tmp_path / "started").exists)
    ended = time.monotonic() + 0.3
    wait_until(lambda: time.monotonic() > ended)
    with at_most(1.5), pytest.raises(TimeoutError):
        next(results)
    (tmp_path / "release").touch()


@on_all
@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"chunksize": 0}, ValueError),
        ({"chunksize": -1}, ValueError),
        ({"chunksize": "2"}, TypeError),
        ({"chunksize": 1.5}, TypeError),
        ({"buffersize": 0}, ValueError),
        ({"buffersize": "2"}, TypeError),
        ({"timeout": float("nan")}, ValueError),
        ({"timeout": "1"}, TypeError),
        ({"timeout": True}, TypeError),
        ({"no_such_option": 1}, TypeError),
    ],
    ids=str,
)
def test_bad_options_are_refused_at_the_call(pool: Pool, options: dict[str, Any], kind: type[Exception]) -> None:
    """Not at the first `next`, and the message names the option."""
    with pytest.raises(kind, match=next(iter(options))):
        pool().map(tasks.square, [1], **options)


@on_all
def test_an_input_that_is_not_iterable_is_refused(pool: Pool) -> None:
    """At the call, and the pool goes on."""
    executor = pool()
    with pytest.raises(TypeError):
        executor.map(tasks.square, 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        list(executor.map(tasks.square))
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1


@on_hosts
def test_one_unsendable_item_costs_one_item(pool: Pool, tmp_path: Path) -> None:
    """Also in the middle of a chunk: those before it come, those behind it run."""
    notes = tmp_path / "notes"
    items = [0, 1, 2, tasks.FailsAtDump(), 4, 5]
    results = pool(1).map(tasks.note, [notes] * 6, items, chunksize=6)
    wait_until(lambda: lines(notes) == ["0", "1", "2", "4", "5"])
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(taskpool.NotSendableError, match="item 3"):
        next(results)


@on_hosts
def test_one_unsendable_result_costs_one_item(pool: Pool) -> None:
    """Its neighbours in the chunk keep their results."""
    results = pool(1).map(tasks.make, [int, int, tasks.FailsAtDump, int], chunksize=4)
    assert [next(results), next(results)] == [0, 0]
    with pytest.raises(taskpool.NotSendableError, match="result"):
        next(results)


@on_pools
def test_closing_a_map_cancels_the_rest(pool: Pool, tmp_path: Path) -> None:
    """An iterator that is closed, or thrown away, leaves no queued items behind."""
    notes = tmp_path / "notes"
    executor = pool(1)
    results = executor.map(
        tasks.note_then, itertools.repeat(notes), range(1000), itertools.repeat(tasks.spin), [0.005] * 1000
    )
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert executor.submit(tasks.identity, 1).result(PATIENCE) == 1
    assert len(lines(notes)) < 1000
    assert executor.stats().queued == 0


@on_all
def test_two_maps_at_once_do_not_mix(pool: Pool) -> None:
    """Each gets its own results, in its own order."""
    executor = pool()
    first, second = executor.map(tasks.square, range(50)), executor.map(tasks.identity, range(50))
    assert list(zip(first, second, strict=True)) == [(number * number, number) for number in range(50)]


@pytest.mark.parametrize("name", ["process", "futures", "pool", "thread", "serial"])
def test_the_module_level_map(name: str) -> None:
    """It needs no executor; it is bounded and gives a list."""
    ended = run_script(
        f"""
import taskpool
from tests import tasks
if __name__ == "__main__":
    print(taskpool.map(tasks.square, range(5), timeout=20, backend={name!r}, max_workers=2))
    print(taskpool.map(tasks.add, [1, 2], [10, 20], chunksize=1, backend={name!r}))
"""
    )
    assert ended.code == 0, ended.err
    assert ended.out.splitlines() == ["[0, 1, 4, 9, 16]", "[11, 22]"]
