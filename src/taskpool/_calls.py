"""What people call, on an executor and on its views: each call checks what it is given, and starts it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypedDict, TypeVar, Unpack, overload

from taskpool._checks import check_callable, check_count, check_name, check_progress, check_seconds
from taskpool._current import name_of
from taskpool._map import MapBackend, MapJob
from taskpool._options import TaskOptions
from taskpool._task import TaskFuture
from taskpool.errors import QueueFullError

if TYPE_CHECKING:
    from taskpool._executor import Executor
    from taskpool._group import TaskGroup
    from taskpool._outcome import Outcome
    from taskpool._results import MapResults

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
M = TypeVar("M", bound="MapResults")


class MapOptions(TypedDict, total=False):
    """How a map is run."""

    timeout: float | None
    """Seconds from the call within which the last result must be there; None is no limit. When they have passed,
    everything that the map started is stopped."""

    chunksize: int | None
    """How many items a worker gets at a time. None measures how long items take and decides by that. Either way each
    item has its own limit, its own retries and its own outcome."""

    buffersize: int | None
    """How many items may be read ahead of the results that were asked for. None is as many as keep the workers busy; for
    `map` of inputs with a length, all."""

    progress: bool | str
    """Whether to show progress on standard error, or the label under which to show it."""


class ZipOptions(MapOptions, total=False):
    """How a map of several inputs is run, beyond `MapOptions`."""

    strict: bool
    """Whether inputs of different lengths are an error, as in the built-in `zip`."""


class Calls:
    """The calls that an executor and its views share: tasks run with `self._options` on `self._executor`."""

    _executor: Executor
    _options: TaskOptions

    # One task

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> TaskFuture[R]:
        """Have `fn(*args, **kwargs)` run in a worker.

        Args:
            fn: What to call; functions of `__main__`, lambdas and closures work too.
            args: Its arguments.
            kwargs: Its keyword arguments. Options of the task are given by `options`, so none is taken from these.

        Returns:
            The task's future. What cannot be pickled fails the future, with `NotSendableError`.

        Raises:
            TypeError: If `fn` cannot be called.
            RuntimeError: If the executor was shut down.
            ForkedExecutorError: If this process is a fork of the one that made the executor.
            QueueFullError: If `max_pending` tasks are waiting and none was taken within `submit_timeout`.
            InitializerError: If no worker can be made ready.
        """
        executor, options = self._executor, self._options
        check_callable(fn, "fn")
        executor._check_open()
        future: TaskFuture[R] = TaskFuture(executor._backend, options.name or name_of(fn))
        executor._backend.submit(future, executor._backend.carrying(fn), args, kwargs, options)
        return future

    async def run(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Have `fn(*args, **kwargs)` run in a worker, and wait for its result in asyncio.

        Cancelling the awaiting task stops the worker's, and so does closing the event loop. The loop is not blocked,
        also not by `max_pending`; only the pickling of the arguments takes its time in the loop's thread, and on the
        serial backend the task itself.

        Args:
            fn: What to call.
            args: Its arguments.
            kwargs: Its keyword arguments.

        Returns:
            Its result.

        Raises:
            Exception: The task's own exception, or what `submit` raises.
        """
        if self._executor._backend.setup.max_pending is None:
            return await self.submit(fn, *args, **kwargs)
        return await (await self._submit_when_free(fn, *args, **kwargs))

    async def _submit_when_free(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> TaskFuture[R]:
        """Submit once there is a place: in one step and in this thread, so a wait that is cancelled has submitted nothing.

        Raises:
            QueueFullError: If there is none within `submit_timeout`.
        """
        import asyncio

        from taskpool._loops import Visit

        slots, seconds = self._executor._backend._slots, self._options.submit_timeout
        at_once = self.options(submit_timeout=0)
        visit, limit = Visit(stop=lambda: None), asyncio.timeout(seconds)
        future: TaskFuture[R] | None = None
        try:
            async with limit:
                while future is None:
                    if slots.is_full:
                        again = visit.arrived.is_set()
                        visit.arrived.clear()
                        slots.enter(visit, again=again)
                        await visit.arrived.wait()
                    with contextlib.suppress(QueueFullError):  # another one was quicker
                        future = at_once.submit(fn, *args, **kwargs)
        except TimeoutError:
            if limit.expired():
                raise slots.full(seconds) from None
            raise
        finally:
            visit.leave()
            if future is None or future.done():  # the place that was waited for is not taken
                slots.leave(visit)
        assert future is not None
        return future

    # Many items

    def map(self, fn: Callable[..., R], *iterables: Iterable[Any], **how: Unpack[ZipOptions]) -> Iterator[R]:
        """Run `fn` on the items of `iterables`, as the built-in `map` does, and return their results in order.

        If all inputs have a length everything is submitted at once, as the standard library does; an input of unknown
        length is read ahead by `buffersize`, so that it may be endless. `imap` reads ahead by a bound in either case.

        Args:
            fn: What to call with one item of each iterable.
            iterables: The inputs; the shortest one ends the map.
            how: See `MapOptions`.

        Returns:
            An iterator. It raises the first failing item's own exception, or `CallTimeoutError`; both stop what the
            map had started.

        Raises:
            TypeError: If an argument is of a wrong type, there is no iterable, or one cannot be iterated.
            ValueError: If a number is out of range, or with `strict` the lengths are known and differ.
            RuntimeError: If the executor was shut down.
        """
        return self._start(fn, iterables, how, eager=True).values()

    def starmap(
        self, fn: Callable[..., R], iterable: Iterable[Iterable[Any]], **how: Unpack[MapOptions]
    ) -> Iterator[R]:
        """Run `fn(*item)` for each item of `iterable`. Everything else is as in `map`."""
        return self._start(fn, (iterable,), how, star=True, eager=True).values()

    def imap(self, fn: Callable[..., R], *iterables: Iterable[Any], **how: Unpack[ZipOptions]) -> Iterator[R]:
        """Run `fn` on the items of `iterables` as they are asked for, and return the results in order.

        Whatever the inputs are, they are read ahead of the results by `buffersize` at most. Everything else is as in
        `map`.
        """
        return self._start(fn, iterables, how).values()

    def imap_unordered(self, fn: Callable[..., R], *iterables: Iterable[Any], **how: Unpack[ZipOptions]) -> Iterator[R]:
        """Run `fn` on the items of `iterables`, and return the results as they come. Everything else is as in `imap`."""
        return self._start(fn, iterables, how, ordered=False).values()

    @overload
    def outcomes(
        self, fn: Callable[[T], R], iterable: Iterable[T], /, *, ordered: bool = ..., **how: Unpack[MapOptions]
    ) -> Iterator[Outcome[T, R]]: ...

    @overload
    def outcomes(
        self,
        fn: Callable[..., R],
        first: Iterable[Any],
        second: Iterable[Any],
        /,
        *more: Iterable[Any],
        ordered: bool = ...,
        **how: Unpack[ZipOptions],
    ) -> Iterator[Outcome[Any, R]]: ...

    def outcomes(
        self, fn: Callable[..., Any], /, *iterables: Iterable[Any], ordered: bool = False, **how: Unpack[ZipOptions]
    ) -> Iterator[Outcome[Any, Any]]:
        """Run `fn` on the items of `iterables`, and return a record of how each ended. No failure costs another item.

        Args:
            fn: What to call with one item of each iterable.
            iterables: The inputs; the shortest one ends it.
            ordered: Whether the records come in the order of the input; otherwise as items end.
            how: See `MapOptions`.

        Returns:
            An iterator of `Outcome` records. It raises only what concerns the whole call: `CallTimeoutError`, which
            stops what was started, and what the input itself raises.

        Raises:
            TypeError: If an argument is of a wrong type, there is no iterable, or one cannot be iterated.
            ValueError: If a number is out of range, or with `strict` the lengths are known and differ.
            RuntimeError: If the executor was shut down.
        """
        return self._start(fn, iterables, how, ordered=ordered, keeps_items=True).outcomes()

    @overload
    def aoutcomes(
        self,
        fn: Callable[[T], R],
        iterable: Iterable[T] | AsyncIterable[T],
        /,
        *,
        ordered: bool = ...,
        **how: Unpack[MapOptions],
    ) -> AsyncGenerator[Outcome[T, R]]: ...

    @overload
    def aoutcomes(
        self,
        fn: Callable[..., R],
        first: Iterable[Any],
        second: Iterable[Any],
        /,
        *more: Iterable[Any],
        ordered: bool = ...,
        **how: Unpack[ZipOptions],
    ) -> AsyncGenerator[Outcome[Any, R]]: ...

    def aoutcomes(
        self, fn: Callable[..., Any], /, *iterables: Any, ordered: bool = False, **how: Unpack[ZipOptions]
    ) -> AsyncGenerator[Outcome[Any, Any]]:
        """Return the records of `outcomes` as an asynchronous iterator, which never blocks the event loop.

        It begins when its first record is asked for. Closing it, cancelling the task that reads it, and closing the
        loop stop what was started. Arguments and errors are those of `outcomes`, and beyond them:

        - A single input may be asynchronous. One task of the loop reads it, and closes it if it is a generator.
        - Other inputs are read in the loop's thread, a few milliseconds at a time; that may make chunks smaller.
        """
        from taskpool._aresults import AsyncResults

        return self._make(AsyncResults, fn, iterables, how, ordered=ordered, keeps_items=True).aoutcomes()

    def _start(
        self, fn: Callable[..., Any], iterables: tuple[Iterable[Any], ...], how: Mapping[str, Any], **more: Any
    ) -> MapResults:
        """Check what was asked for, and start it."""
        from taskpool._results import MapResults

        results = self._make(MapResults, fn, iterables, how, **more)
        results.start()
        return results

    def _make(
        self,
        kind: type[M],
        fn: Callable[..., Any],
        iterables: tuple[Any, ...],
        how: Mapping[str, Any],
        *,
        star: bool = False,
        eager: bool = False,
        ordered: bool = True,
        keeps_items: bool = False,
    ) -> M:
        """Check what was asked for, and prepare it."""
        from taskpool._results import MapResults

        check_callable(fn, "fn")
        for option in how:
            if option not in ZipOptions.__annotations__ and option not in MapOptions.__annotations__:
                raise TypeError(
                    f"unknown option {option!r}; those of a map are {', '.join(ZipOptions.__annotations__)}"
                )
        seconds = check_seconds(how.get("timeout"), "timeout")
        window = check_count(how.get("buffersize"), "buffersize")
        chunksize = check_count(how.get("chunksize"), "chunksize")
        label = check_progress(how.get("progress", False))
        source = _joined(iterables, strict=bool(how.get("strict", False)), may_be_async=kind is not MapResults)
        self._executor._check_open()
        job = MapJob(
            self._executor._backend.carrying(fn),
            star=star or len(iterables) > 1,
            options=self._options,
            chunksize=chunksize,
        )
        results = kind(
            _Feeder(self._executor),
            job,
            source,
            timeout=seconds,
            buffersize=window,
            eager=eager,
            ordered=ordered,
            keeps_items=keeps_items,
        )
        self._executor._maps.add(results)
        if label is not None:
            results.show_progress(label)
        return results

    # Many tasks with one end

    def group(self, *, timeout: float | None = None, name: str | None = None) -> TaskGroup:
        """Return a group for tasks that shall all have ended at the end of one block, be it `with` or `async with`.

        Args:
            timeout: Seconds from the beginning of the block within which it must end; None is no limit.
            name: The group's name in errors.

        Raises:
            TypeError: If an argument is of a wrong type.
            ValueError: If `timeout` is NaN.
        """
        from taskpool._group import TaskGroup

        executor, seconds = self._executor, check_seconds(timeout, "timeout")
        return TaskGroup(executor._backend, self._options, executor._check_open, timeout=seconds, name=check_name(name))

    # Options

    def options(self, **changes: Any) -> View:
        """Return a view on the same executor, with other options for the tasks that are submitted through it.

        Args:
            changes: `task_timeout` (seconds), `grace` (seconds), `retry`, `name`, `priority`, `submit_timeout`
                (seconds).

        Raises:
            TypeError: If an option is unknown or of a wrong type.
            ValueError: If a value is out of range.
        """
        return View(self._executor, self._options.merge(changes))

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an Executor, or a view on one, cannot be sent to a worker: its own workers belong to this process; inside "
            "a task use taskpool.map, or make another Executor"
        )


class View(Calls):
    """Calls on an executor with options of their own; made by `options`, on an executor or on another view."""

    def __init__(self, executor: Executor, options: TaskOptions) -> None:
        self._executor = executor
        self._options = options

    def __repr__(self) -> str:
        return f"<view on {self._executor!r} with {self._options}>"


class _Feeder(MapBackend):
    """What a map gets of its executor: as long as somebody iterates, the executor must not be dropped."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.workers = executor._backend.workers

    def check_process(self) -> None:
        self._executor._backend.check_process()

    def is_here(self) -> bool:
        return self._executor._backend.is_here()

    def submit_items(self, job: MapJob, first: int, items: Any) -> None:
        self._executor._check_open()
        self._executor._backend.submit_items(job, first, items)

    def waiting(self, job: MapJob | None = None) -> contextlib.AbstractContextManager[None]:
        return self._executor._backend.waiting(job)

    def cancel_job(self, job: MapJob, *, stop: bool) -> None:
        self._executor._backend.cancel_job(job, stop=stop)


def _joined(iterables: tuple[Any, ...], *, strict: bool, may_be_async: bool) -> Any:
    """Return what a map of several inputs reads, with a length if all have one.

    Raises:
        TypeError: If there is none, or an asynchronous one where it cannot be read.
        ValueError: If they must be of the same length, and are known not to be.
    """
    if not iterables:
        raise TypeError("a map needs at least one iterable")
    if len(iterables) == 1 and may_be_async:
        return iterables[0]
    if any(isinstance(iterable, AsyncIterable) and not isinstance(iterable, Iterable) for iterable in iterables):
        raise TypeError("an asynchronous input is read by `aoutcomes`, and by that only where it is the single one")
    if len(iterables) == 1:
        return iterables[0]
    if not all(hasattr(iterable, "__len__") for iterable in iterables):
        return zip(*iterables, strict=strict)
    lengths = [len(iterable) for iterable in iterables]
    if strict and len(set(lengths)) > 1:
        raise ValueError(f"strict=True needs iterables of the same length, not of {', '.join(map(str, lengths))}")
    return _SizedZip(iterables, min(lengths))


class _SizedZip:
    """Several inputs whose lengths are known: so is that of what they make together."""

    def __init__(self, iterables: tuple[Any, ...], length: int) -> None:
        self._iterables = iterables
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return zip(*self._iterables, strict=False)
