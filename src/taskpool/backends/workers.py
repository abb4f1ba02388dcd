"""The hosted backends: taskpool's own workers, in processes that one of three engines starts."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from taskpool import _nesting
from taskpool._engine import functions, sharing, stop, wire
from taskpool._engine.crew import Settings
from taskpool._engine.dispatcher import Dispatcher
from taskpool._engine.units import make_call, make_pieces
from taskpool._map import MapJob
from taskpool._options import TaskOptions
from taskpool._task import TaskFuture
from taskpool.backends.base import Backend, Setup, refuse
from taskpool.errors import NestingError, NotSendableError, UnsupportedError

if TYPE_CHECKING:
    from taskpool._engine.hosts.base import Host
    from taskpool._records import Capabilities, RunningTask, Stats


class WorkersBackend(Backend):
    """Runs tasks in worker processes.

    Args:
        name: "process", "futures" or "pool".
        setup: The executor's settings.
    """

    def __init__(self, name: str, setup: Setup) -> None:
        super().__init__(name, setup)
        _check_platform(name)
        _check_depth()
        uses_template = name == "process" and setup.mp_context is None and _has_template()
        self._uses_template = uses_template
        if not uses_template:
            refuse(name, preload=setup.preload)
        host, initializer = _make_host(name, setup, uses_template=uses_template)
        with sharing.carried as handles:
            pickled = _pickle_setup(setup, initializer or functions.Globals(setup.initializer))
        settings = Settings(
            name=setup.name,
            max_workers=setup.max_workers,
            setup=pickled,
            has_initializer=setup.initializer is not None,
            start_timeout=setup.start_timeout,
            max_tasks=setup.max_tasks_per_child,
            idle_timeout=setup.idle_timeout,
            listeners=setup.listeners,
            sink=setup.sink,
            log_timeout=setup.log_timeout,
            output=setup.output,
        )
        self._dispatcher = Dispatcher(host, settings, super().left_queue, self.failures.report_all)
        self._has_listeners = bool(setup.listeners)
        self._keeps = handles  # of the initializer's arguments
        self._note_sent(handles)

    @property
    def capabilities(self) -> Capabilities:
        """What it can do beyond running tasks."""
        from taskpool._records import Capabilities

        return Capabilities(
            kill=True,
            isolation=True,
            processes=True,
            start_methods=True,
            preload=self._uses_template,
            recycling=True,
            logs=True,
            output=True,
        )

    def submit(
        self, future: TaskFuture[Any], fn: Callable[..., Any], args: Any, kwargs: Any, options: TaskOptions
    ) -> None:
        """Pickle the call here, in the caller's thread, and hand it to a worker or the queue."""
        dispatcher = self._dispatcher
        if dispatcher.broken is not None:
            raise dispatcher.broken()
        dispatcher.start()
        dispatcher.look_at_levels()
        call = make_call(future, fn, args, kwargs, options, blocks=dispatcher.blocks)
        if call is None:
            return
        if call.keeps:
            self._note_sent(call.keeps)
        try:
            self._slots.take(future, options.submit_timeout, self.is_own_thread)
            if self._has_listeners:
                dispatcher.teller.queued(future)
            dispatcher.submit(call)
        except BaseException:  # a signal handler's, anywhere in there
            self._slots.free(future)
            raise

    def submit_items(self, job: MapJob, first: int, items: Sequence[Any]) -> None:
        """Pickle items of a map here and queue them."""
        dispatcher = self._dispatcher
        if dispatcher.broken is not None:
            raise dispatcher.broken()
        dispatcher.start()
        dispatcher.look_at_levels()
        pieces = make_pieces(job, first, items, dispatcher.blocks)
        for piece in pieces:
            self._note_sent(piece.keeps)
        dispatcher.teller.queued_items(pieces)
        dispatcher.submit_pieces(pieces)

    def _note_sent(self, handles: Sequence[sharing.Handle]) -> None:
        """Let handles on shared values know that workers have them from now on."""
        for handle in handles:
            handle.sent_by(self._dispatcher)

    def cancel_job(self, job: MapJob, *, stop: bool) -> None:
        """Drop or stop what is left of a map. In a forked child there is nothing to do, and nobody to tell."""
        if self.pid != os.getpid():
            return
        if stop:
            self._dispatcher.stop(job)
        else:
            self._dispatcher.drop(job)

    # What futures ask for

    def left_queue(self, future: TaskFuture[Any]) -> None:
        """Free the place of a task that was cancelled while it waited, and have the engine forget it."""
        super().left_queue(future)
        self._dispatcher.cancelled()

    def stop(self, future: TaskFuture[Any]) -> None:
        """Have a running task stopped."""
        self._dispatcher.stop(future)

    def is_running(self, future: TaskFuture[Any]) -> bool:
        """Whether the task has started."""
        return self._dispatcher.is_running(future)

    def stack(self, future: TaskFuture[Any]) -> str | None:
        """Ask its worker."""
        return self._dispatcher.stack(future)

    def stacks(self) -> list[RunningTask]:
        """Ask every worker that runs something."""
        from taskpool._records import RunningTask

        return [
            RunningTask(
                task=running.unit.name,
                id=running.unit.id_of(running.item),
                attempt=running.unit.attempt,
                worker=worker.name,
                pid=worker.pid or 0,
                seconds=max(0.0, time.monotonic() - running.started),
                stack=stack,
            )
            for worker, running, stack in self._dispatcher.stacks()
        ]

    def collect(self, future: TaskFuture[Any], timeout: float | None) -> None:
        """Take the outcome at the worker's own pipe, if the task was handed to it directly."""
        self.check_process()
        self._dispatcher.collect(future, timeout)

    def run_callbacks(self, run: Callable[[], None]) -> None:
        """Run callbacks on the callback thread."""
        self._dispatcher.callbacks.run(run)

    def log_soon(self, call: Callable[[], None]) -> None:
        """Have something logged by the thread that handles the workers' records; here, once that has ended."""
        if self.is_here():
            self._dispatcher.log_soon(call)

    # The end

    def close(self, *, cancel: bool) -> None:
        """Finish what was accepted, then end."""
        self._dispatcher.close(cancel=cancel)

    def terminate(self, kill_at: float) -> None:
        """Stop everything."""
        self._dispatcher.terminate(kill_at)

    def join(self, timeout: float | None) -> bool:
        """Wait for the end of dispatcher, workers and callbacks."""
        return self._dispatcher.join(timeout)

    def is_own_thread(self) -> bool:
        """Whether this is the dispatcher's or the callback thread."""
        return self._dispatcher.is_own_thread()

    def stats(self) -> Stats:
        """Count workers and tasks."""
        from taskpool._records import Stats

        serving, queued = self._dispatcher.snapshot()
        counts = self._dispatcher.counts
        finished, failed = self._dispatcher.taken()
        return Stats(
            workers=len(serving),
            idle=serving.count(False),
            queued=queued,
            running=serving.count(True),
            finished=counts.finished + finished,
            failed=counts.failed + failed,
            timed_out=counts.timed_out,
            cancelled=counts.cancelled,
            crashed=counts.crashed,
            started=counts.started,
            replaced=counts.replaced,
            retried=counts.retried,
            rerun=counts.rerun,
        )


def _has_template() -> bool:
    return sys.platform.startswith("linux") and stop.has_pidfds()


def _check_platform(name: str) -> None:
    if sys.platform == "win32":
        raise UnsupportedError(
            f'backend={name!r} needs a POSIX system; backend="thread" and backend="serial" run on Windows'
        )


def _check_depth() -> None:
    if _nesting.depth >= _nesting.MAX_DEPTH:
        raise NestingError(
            f"this process is a worker {_nesting.depth} levels below the main program, and workers of its own would be "
            "too deep: each level starts processes of its own. Here call the function itself, or use "
            'backend="thread" or backend="serial"; higher up split the work into more items instead'
        )


def _make_host(name: str, setup: Setup, *, uses_template: bool) -> tuple[Host, tuple[Any, Any] | None]:
    """Return the host, and the initializer if it goes over the channel instead of with the process."""
    arguments = (setup.initializer, setup.initargs)
    if uses_template:
        from taskpool._engine.hosts.template import TemplateHost

        return TemplateHost(setup.preload), None if setup.initializer is None else arguments
    from taskpool._engine.hosts.processes import ProcessHost, make_context

    context = make_context(setup.mp_context or (None if name != "process" else "spawn"))
    _check_not_bootstrapping(context)
    if name == "process":
        return ProcessHost(context, *arguments), None
    if name == "futures":
        from taskpool._engine.hosts.futures import FuturesHost

        return FuturesHost(context, *arguments), None
    from taskpool._engine.hosts.pool import PoolHost

    return PoolHost(context, setup.max_workers, *arguments), None


def _check_not_bootstrapping(context: Any) -> None:
    from multiprocessing.process import current_process

    if getattr(current_process(), "_inheriting", False):
        raise RuntimeError(
            "this process is a worker that is still importing the main module, and there an executor is made again: "
            f"under mp_context={context.get_start_method()!r} put what starts work behind "
            '`if __name__ == "__main__":` (the default backend needs no guard)'
        )


def _pickle_setup(setup: Setup, initializer: tuple[Any, Any] | functions.Globals) -> wire.Pickled:
    place = _nesting.Place(setup.max_workers)
    does = setup.sink is not None, bool(setup.listeners)  # forward logs, tell what begins
    try:
        return wire.frozen(wire.dumps_for_worker((setup.name, does, place, initializer)))
    except Exception as cause:
        raise NotSendableError(
            f"the initializer or its initargs cannot be pickled: {type(cause).__name__}: {cause}; locks and queues of "
            'multiprocessing pass to workers by inheritance only: use mp_context="forkserver", "spawn" or "fork"'
        ) from cause
