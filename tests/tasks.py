"""What the tests run in workers: plain functions, ways to hang, ways to die, and objects that resist the journey."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import taskpool
from taskpool._engine.threads import undisturbed

PATIENCE = 30.0


# ---------------------------------------------------------------------------------------------- plain


def identity(value: Any) -> Any:
    """Return the argument."""
    return value


def square(number: int) -> int:
    """Return the square of a number."""
    return number * number


def add(*numbers: int, **named: int) -> int:
    """Return the sum of all arguments."""
    return sum(numbers) + sum(named.values())


def keywords(**named: Any) -> dict[str, Any]:
    """Return the keyword arguments."""
    return named


def pid() -> int:
    """Return the id of the process that runs the task."""
    return os.getpid()


def payload(size: int) -> bytes:
    """Return `size` bytes that depend on their place, so that a wrong or shifted result shows."""
    return (b"0123456789abcdefg" * (size // 17 + 1))[:size]


def note(path: Path, text: object) -> object:
    """Append a line in one atomic write, and return what was noted."""
    with undisturbed():  # a thread that is stopped between open and close would leave the file open
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, f"{text}\n".encode())
        finally:
            os.close(descriptor)
    return text


def note_slowly(path: Path, text: object) -> object:
    """Do as `note` does, in a time that no longer counts as quick: a map then writes each outcome at once."""
    time.sleep(0.002)
    return note(path, text)


def await_file(path: Path) -> None:
    """Wait until a file exists."""
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > deadline:
            raise AssertionError(f"{path} never came")
        time.sleep(0.002)


def hold(started: Path, release: Path, value: Any = None) -> Any:
    """Note this process's id, wait for a file, and return `value`."""
    note(started, os.getpid())
    await_file(release)
    return value


def note_then(path: Path, text: object, call: Callable[..., Any], *args: Any) -> Any:
    """Note a line, then do something else."""
    note(path, text)
    return call(*args)


def spin(seconds: float) -> None:
    """Keep the processor busy."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def spin_and_answer(seconds: float, value: Any) -> Any:
    """Keep busy, and return the value."""
    spin(seconds)
    return value


def spin_and_return(path: Path, tag: object, seconds: float, size: int) -> bytes:
    """Note a tag and the process, keep busy, and return `size` bytes."""
    note(path, f"{tag} {os.getpid()}")
    spin(seconds)
    return payload(size)


def hold_and_return(path: Path, tag: object, release: Path, size: int) -> bytes:
    """Note a tag and the process, wait for a file, and return `size` bytes."""
    note(path, f"{tag} {os.getpid()}")
    await_file(release)
    return payload(size)


def spin_stubbornly(path: Path, tag: object, seconds: float, size: int) -> bytes:
    """Do as `spin_and_return` does, and carry on when interrupted."""
    end = time.perf_counter() + seconds
    note(path, f"{tag} {os.getpid()}")
    while (left := end - time.perf_counter()) > 0:
        try:
            spin(left)
        except BaseException:
            continue
    return payload(size)


def fail(kind: type[BaseException], *args: Any) -> NoReturn:
    """Raise an exception."""
    raise kind(*args)


def fail_at(bad: Any, value: Any) -> Any:
    """Return the value, or raise ValueError if it is the bad one."""
    if value == bad:
        raise ValueError(f"bad item {value}")
    return value


def make(kind: Callable[..., Any], *args: Any) -> Any:
    """Build an object in the worker and return it."""
    return kind(*args)


def fresh_process(_: object = None) -> bool:
    """Return whether this process had not run this function before."""
    global _visited
    fresh, _visited = not _visited, True
    return fresh


_visited = False


def call(item: tuple[Callable[..., Any], Any]) -> Any:
    """Call the first of a tuple with the rest."""
    fn, *args = item
    return fn(*args)


def make_lambda() -> Callable[[int], int]:
    """Return a function without a name."""
    return lambda number: number + 1


def make_closure(step: int) -> Callable[[int], int]:
    """Return a function that no module can look up."""

    def plus(number: int) -> int:
        return number + step

    return plus


def pool_in_a_task() -> list[int]:
    """Use the standard library's pool."""
    import multiprocessing

    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(square, range(3))


def executor_in_a_task() -> list[int]:
    """Use an executor of ours."""
    import taskpool

    with taskpool.Executor(2) as executor:
        return list(executor.map(square, range(3)))


def is_loaded(module: str) -> bool:
    """Return whether a module is loaded here."""
    return module in sys.modules


def sleep_in_steps(seconds: float) -> None:
    """Sleep in short steps, so that even a soft interruption comes through."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.005)


# ---------------------------------------------------------------------------------------------- attempts


def in_turn(path: Path, *steps: tuple[Any, ...]) -> Any:
    """Note this process, and do what is planned for this attempt: (function, *arguments); the last step stays."""
    note(path, os.getpid())
    number = len(path.read_text().splitlines())
    return call(steps[min(number, len(steps)) - 1])


def sleep_and_fail(seconds: float, kind: type[BaseException]) -> NoReturn:
    """Raise an exception after a while."""
    time.sleep(seconds)
    raise kind


def hold_and_fail(started: Path, release: Path, kind: type[BaseException]) -> NoReturn:
    """Do as `hold` does, and raise."""
    hold(started, release)
    raise kind


def hold_and_die(started: Path, release: Path) -> NoReturn:
    """Do as `hold` does, and kill this process."""
    hold(started, release)
    kill_itself()


def call_behind(gate: Path, *step: Any) -> Any:
    """Wait for a file, then call the first of a tuple with the rest."""
    await_file(gate)
    return call(step)


def current_attempt() -> int:
    """Return which attempt this is, as the task itself is told."""
    task = taskpool.current_task()
    assert task is not None
    return task.attempt


# ---------------------------------------------------------------------------------------------- ways to hang


def sleep_for_ever() -> None:
    """Sleep in the interpreter."""
    time.sleep(100_000)


def spin_for_ever() -> None:
    """Run bytecode without end."""
    while True:
        pass


def swallow_everything() -> None:
    """Catch each exception that comes and carry on."""
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(1000)


def ignore_sigterm() -> None:
    """Ignore the polite signals and each exception."""
    for polite in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(polite, signal.SIG_IGN)
    swallow_everything()


def ignore_all_signals() -> None:
    """Ignore each signal that can be ignored, and each exception."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    swallow_everything()


def block_signals() -> None:
    """Block every signal that can be blocked, and hang."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    swallow_everything()


def hold_the_gil() -> None:
    """Wait in C for a lock that never comes, with the interpreter's lock held."""
    library = ctypes.PyDLL(None)
    mutex = ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def sleep_with_the_gil() -> None:
    """Sleep in C with the interpreter's lock held, again and again."""
    library = ctypes.PyDLL(None)
    while True:
        library.usleep(900_000)


def stop_itself() -> None:
    """Stop this process as a debugger would."""
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(100_000)


def hang_in_finally() -> None:
    """Hang again while the first interruption unwinds."""
    try:
        time.sleep(100_000)
    finally:
        time.sleep(100_000)


def clean_up_slowly(path: Path, seconds: float) -> None:
    """Note the begin, hang, and take a while to note the end when interrupted."""
    note(path, "begun")
    try:
        time.sleep(100_000)
    finally:
        time.sleep(seconds)
        note(path, "cleaned up")


def answer_the_interruption() -> str:
    """Make a result out of the interruption."""
    try:
        time.sleep(100_000)
    except BaseException:
        return "too late"
    return "never"


class HangsAtLoad:
    """Never finishes to unpickle in a worker."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Unpickle by hanging."""
        return sleep_for_ever, ()


class HangsAtDump:
    """Never finishes to pickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Hang."""
        sleep_for_ever()
        return object, ()


class DumpsSlowly:
    """Takes half a second to pickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Take the time."""
        time.sleep(0.5)
        return int, ()


def note_and_dump_slowly(path: Path, number: int) -> DumpsSlowly:
    """Note a number, return what takes its time to pickle, and after the first take for ever."""
    note(path, number)
    if number:
        sleep_for_ever()
    return DumpsSlowly()


def start_child_and_hang(path: Path) -> None:
    """Start a program, note its id, and hang."""
    note(path, subprocess.Popen(["sleep", "1000"]).pid)
    sleep_for_ever()


def fork_and_hang(path: Path) -> None:
    """Fork a child that resists polite ends, note its id, and hang."""
    note(path, fork_stubborn())
    sleep_for_ever()


def fork_group_and_hang(path: Path) -> None:
    """Fork a child that leaves the process group but not the session, note its id, and hang."""
    note(path, fork_stubborn(os.setpgrp))
    sleep_for_ever()


def fork_tree_and_hang(path: Path) -> None:
    """Fork a child whose own child outlives it, note the orphan's id, and hang."""
    if (child := os.fork()) == 0:
        note(path, fork_stubborn())
        os._exit(0)
    os.waitpid(child, 0)
    sleep_for_ever()


def fork_stubborn(first: Callable[[], Any] = lambda: None) -> int:
    """Fork a child that holds every descriptor it inherited and ignores SIGTERM; return its id."""
    ready, ready_end = os.pipe()
    child = os.fork()
    if child == 0:
        first()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.write(ready_end, b"!")
        try:
            time.sleep(PATIENCE * 4)
        finally:
            os._exit(0)
    os.read(ready, 1)
    os.close(ready)
    os.close(ready_end)
    return child


# ---------------------------------------------------------------------------------------------- ways to die


def kill_itself() -> NoReturn:
    """Die as if the kernel were out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def exit_quietly() -> NoReturn:
    """Leave the process with code 0."""
    os._exit(0)


def exit_with(code: int) -> NoReturn:
    """Leave the process with a code."""
    os._exit(code)


def exit_in_c() -> None:
    """Leave the process from C, with its exit handlers."""
    ctypes.CDLL(None).exit(0)


def segfault() -> None:
    """Read from address 0."""
    faulthandler._sigsegv()  # type: ignore[attr-defined]


def abort() -> NoReturn:
    """Abort, as a failed assertion in C does."""
    os.abort()


def terminate_itself() -> None:
    """Send SIGTERM to this process."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)


def close_everything() -> None:
    """Close each descriptor but the standard ones, as daemonizing libraries do."""
    os.closerange(3, 4096)


def fork_and_die(path: Path) -> None:
    """Leave a child that holds each inherited descriptor, and die."""
    note(path, fork_stubborn())
    kill_itself()


def exec_program() -> None:
    """Replace this process by another program that ends at once."""
    os.execv("/bin/true", ["true"])


def die_at(bad: Any, path: Path, value: Any) -> Any:
    """Note the value and return it; die after the note if it is the bad one."""
    note(path, value)
    if value == bad:
        kill_itself()
    return value


def hang_at(bad: Any, path: Path, value: Any) -> Any:
    """Note the value, slowly, and return it; hang after the note if it is the bad one."""
    note_slowly(path, value)
    if value == bad:
        sleep_for_ever()
    return value


def die_later(seconds: float, size: int) -> bytes:
    """Return `size` bytes from a process that will die in so many seconds, wherever it then is."""
    threading.Thread(target=lambda: (time.sleep(seconds), kill_itself()), daemon=True).start()
    return payload(size)


def die_when(path: Path, value: Any) -> Any:
    """Return the value from a process that will die when a file appears."""
    threading.Thread(target=lambda: (await_file(path), kill_itself()), daemon=True).start()
    return value


def note_and_die_after_return(path: Path, pause: float, life: float, value: Any) -> Any:
    """Note, pause, and return the value from a process that dies `life` seconds after that."""
    note(path, os.getpid())
    time.sleep(pause)
    threading.Thread(target=lambda: (time.sleep(life), kill_itself()), daemon=True).start()
    return value


def die_in_mid_write(size: int) -> bytes:
    """Return `size` bytes, and die when half of them have been written."""
    _before_each_write(lambda written: kill_itself() if written > size // 2 else None)
    return payload(size)


def write_slowly(size: int, seconds: float) -> bytes:
    """Return `size` bytes in so many seconds, with a pause before each 32 KiB."""
    pause = seconds / (size / (1 << 15))
    _before_each_write(lambda _: time.sleep(pause))
    return payload(size)


def _before_each_write(act: Callable[[int], object]) -> None:
    """Have this process write in pieces of 32 KiB, and call `act` with the bytes written so far before each."""
    real, written = os.write, 0

    def write(descriptor: int, data: Any, *_: Any) -> int:
        nonlocal written
        act(written)
        whole = b"".join(data) if isinstance(data, list | tuple) else data
        done = real(descriptor, memoryview(whole).cast("B")[: 1 << 15])
        written += done
        return done

    _replace_everywhere({os.write: write, os.writev: write})


def lose_the_outcome(path: Path) -> None:
    """Note this process, and return where nothing that is written arrives any more."""
    note(path, os.getpid())
    _replace_everywhere({os.write: lambda _descriptor, data: len(data)})


def _replace_everywhere(functions: dict[Callable[..., Any], Callable[..., Any]]) -> None:
    for module in list(sys.modules.values()):
        for old, new in functions.items():
            if vars(module).get(old.__name__) is old:
                setattr(module, old.__name__, new)


def die_slowly_at(bad: Any, path: Path, value: Any) -> Any:
    """Do as `die_at` does, in a time that no longer counts as quick: a map then writes each outcome at once."""
    time.sleep(0.002)
    return die_at(bad, path, value)


def pid_after(seconds: float) -> int:
    """Return the id of the process that ran the task, after a while, so that other workers get a share."""
    time.sleep(seconds)
    return os.getpid()


def kill_others(pids: list[int]) -> str:
    """Kill each of the processes but this one, and then, perhaps, be killed."""
    for other in pids:
        if other != os.getpid():
            try:
                os.kill(other, signal.SIGKILL)
            except ProcessLookupError:
                continue
    return "survived"


def fork_and_return(path: Path) -> str:
    """Fork, and return in both processes."""
    if child := os.fork():
        note(path, child)
        return "parent"
    return "child"


def exit_thread_left_behind() -> str:
    """Return while a thread that never ends keeps running; it is not a daemon."""
    threading.Thread(target=sleep_for_ever, daemon=False).start()
    return "done"


def leave_an_alarm(seconds: float) -> str:
    """Return with a timer armed that would kill the process."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    return "done"


def leave_a_mess() -> str:
    """Return with signal handlers and mask changed."""
    for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM):
        signal.signal(each, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})
    return "done"


# ---------------------------------------------------------------------------------------------- exceptions


class TwoArguments(Exception):
    """Cannot be rebuilt from its `args`: two required arguments, one of them in the text."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


class KeywordOnly(Exception):
    """Cannot be rebuilt from its `args`: a required keyword."""

    def __init__(self, *, reason: str) -> None:
        super().__init__()
        self.reason = reason


class Slotted(Exception):
    """Keeps its state in a slot."""

    __slots__ = ("detail",)

    def __init__(self, detail: str) -> None:
        super().__init__(detail, len(detail))
        self.detail = detail


class Falsy(Exception):
    """Is false."""

    def __bool__(self) -> bool:
        """Say no."""
        return False


class Empty(Exception):
    """Has no length."""

    def __len__(self) -> int:
        """Say nothing."""
        return 0


class CarriesLock(Exception):
    """Cannot be pickled: it carries a lock."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


class RaisesAtDump(Exception):
    """Raises when it is pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Refuse."""
        raise RuntimeError("I stay here")


class RaisesAtLoad(Exception):
    """Raises when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Unpickle by raising."""
        return fail, (RuntimeError, "I never arrive")


class NoText(Exception):
    """Has neither text nor representation."""

    def __str__(self) -> str:
        """Refuse."""
        raise RuntimeError("no text")

    __repr__ = __str__


class ExitsAtText(Exception):
    """Ends the thread that asks for its text."""

    def __str__(self) -> str:
        """Leave."""
        raise SystemExit("no text")

    __repr__ = __str__


def fail_with_odd_notes() -> NoReturn:
    """Raise an exception to which no note can be added."""
    error = ValueError("odd notes")
    error.__notes__ = ("a tuple",)  # type: ignore[assignment]
    raise error


class UnpicklableNoText(NoText):
    """Cannot be pickled and cannot be shown."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Refuse."""
        raise RuntimeError("I stay here")


class DiesAtDump(Exception):
    """Kills its process when it is pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Die."""
        kill_itself()


def fail_with_keyword() -> NoReturn:
    """Raise an exception that takes a keyword."""
    raise KeywordOnly(reason="why")


def fail_locally() -> NoReturn:
    """Raise an exception of a class that no module names."""

    class Local(Exception):
        pass

    raise Local("from a function")


def fail_with_cause() -> NoReturn:
    """Raise from a cause that itself came from a cause."""
    try:
        try:
            raise KeyError("first")
        except KeyError as first:
            raise TwoArguments(2, "second") from first
    except TwoArguments as second:
        raise ValueError("third") from second


def fail_with_context(suppress: bool) -> NoReturn:
    """Raise while another exception is handled."""
    try:
        raise KeyError("first")
    except KeyError:
        if suppress:
            raise ValueError("second") from None
        raise ValueError("second")  # noqa: B904 - the implicit context is what is tested


def fail_with_notes() -> NoReturn:
    """Raise an exception with notes."""
    error = ValueError("noted")
    error.add_note("first note")
    error.add_note("second note")
    raise error


def fail_in_a_circle() -> NoReturn:
    """Raise an exception that is its own remote cause."""
    first, second = ValueError("first"), KeyError("second")
    first.__cause__, second.__cause__ = second, first
    raise first


def fail_with_group() -> NoReturn:
    """Raise a group of exceptions that has a group in it."""
    raise ExceptionGroup("outer", [TwoArguments(1, "a"), ExceptionGroup("inner", [ValueError("b"), KeyError("c")])])


def fail_with_base_group() -> NoReturn:
    """Raise a group that holds a KeyboardInterrupt."""
    raise BaseExceptionGroup("outer", [KeyboardInterrupt("stop"), ValueError("b")])


def fail_with_huge_text() -> NoReturn:
    """Raise an exception of several megabytes."""
    raise ValueError("x" * 5_000_000)


# ---------------------------------------------------------------------------------------------- objects


class Plain:
    """An object that can be referenced weakly, and compared."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        """Compare by value."""
        return isinstance(other, Plain) and other.value == self.value

    __hash__ = None  # type: ignore[assignment]


class BadRepr:
    """Cannot be pickled, and its representation recurses."""

    def __repr__(self) -> str:
        """Recurse without end."""
        return repr(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Refuse."""
        raise TypeError("I stay here")


class FailsAtLoad:
    """Pickles, and raises when it is unpickled."""

    def __init__(self, kind: type[BaseException] = ValueError) -> None:
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        """Unpickle by raising."""
        return fail, (self.kind, "I never arrive")


class FailsAtDump:
    """Raises when it is pickled."""

    def __init__(self, kind: type[BaseException] = ValueError) -> None:
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        """Refuse."""
        raise self.kind("I stay here")


class PicklesOnce:
    """Stands for None, and pickles once; after that it does something else."""

    def __init__(self, then: Callable[..., Any], *args: Any) -> None:
        self.then: Callable[[], Any] | None = None
        self.next: Callable[[], Any] = lambda: then(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle."""
        if self.then is not None:
            self.then()
        self.then = self.next
        return make, (type(None),)


class DiesAtLoad:
    """Kills the process that unpickles it, unless that is the one that made it."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Unpickle by dying."""
        return die_unless_in, (os.getpid(),)


def die_unless_in(home: int) -> str:
    """Die unless this is the process `home`."""
    if os.getpid() != home:
        kill_itself()
    return "at home"


class KillsAtDump:
    """Kills the process that pickles it, unless that is the one that made it."""

    def __init__(self, home: int | None = None) -> None:
        self.home = home or os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        """Die away from home."""
        die_unless_in(self.home)
        return KillsAtDump, (self.home,)


def die_at_dump() -> KillsAtDump:
    """Return an object that kills this worker when it is pickled."""
    return KillsAtDump(home=1)


class LoadsWhen:
    """Finishes to unpickle when a file appears."""

    def __init__(self, started: Path, release: Path) -> None:
        self.started = started
        self.release = release

    def __reduce__(self) -> tuple[Any, ...]:
        """Unpickle by waiting."""
        return hold, (self.started, self.release, "late")


class ExitsAtDel:
    """Ends the process in which it is collected, unless that is the one that made it."""

    def __init__(self) -> None:
        self.home = os.getpid()

    def __del__(self) -> None:
        """Leave."""
        if os.getpid() != self.home:
            os._exit(7)


class ExitsAtDelAwayFrom(ExitsAtDel):
    """Ends the process in which it is collected, unless that is the given one."""

    def __init__(self, home: int) -> None:
        self.home = home


def drop_what_raises_at_del() -> str:
    """Drop an object that raises as it is dropped."""
    RaisesAtDel()
    return "dropped"


def make_hostile_dump() -> FailsAtDump:
    """Return an object that raises SystemExit when it is pickled."""
    return FailsAtDump(SystemExit)


class RaisesAtDel:
    """Raises where it is collected."""

    def __del__(self) -> None:
        """Raise what nobody can catch."""
        raise SystemExit("from __del__")


def padded(size: int, kind: Callable[..., Any], *args: Any) -> tuple[Any, bytes]:
    """Return what `kind(*args)` makes together with so many bytes."""
    return kind(*args), payload(size)


def deep(levels: int = 50_000) -> list[Any]:
    """Return a list in a list in a list."""
    nested: list[Any] = []
    for _ in range(levels):
        nested = [nested]
    return nested


def generator() -> Any:
    """Return what can never be pickled."""
    return (number for number in range(3))


# ---------------------------------------------------------------------------------------------- references

_watched: list[weakref.ref[Any]] = []


def watch(value: Any) -> None:
    """Remember an argument weakly."""
    _watched[:] = [weakref.ref(value)]


def watch_result() -> Plain:
    """Return an object that is remembered weakly."""
    value = Plain(1)
    watch(value)
    return value


def watch_and_fail(value: Any) -> NoReturn:
    """Remember an argument weakly, and raise with it in a local variable."""
    watch(value)
    local = value
    raise ValueError(f"with {type(local).__name__}")


def watched_is_gone() -> bool:
    """Return whether the remembered object has been freed without the collector's help."""
    return bool(_watched) and _watched[0]() is None


# ---------------------------------------------------------------------------------------------- items of `call`


def fail_locally_with(text: str) -> NoReturn:
    """Raise a ValueError."""
    raise ValueError(text)


def raise_two(number: int) -> NoReturn:
    """Raise what takes two arguments."""
    raise TwoArguments(number, "odd")


def spin_long(seconds: float) -> None:
    """Compute for a while, in steps between which a thread can be interrupted."""
    spin(seconds)


def sleep_for_ever_about(_: object) -> None:
    """Sleep for ever, whatever for."""
    sleep_for_ever()


def sleep_briefly_for_ever() -> None:
    """Sleep for ever in small steps, between which a thread can be interrupted."""
    sleep_in_steps(1e6)


# ---------------------------------------------------------------------------------------------- a task about itself


def describe_itself(_: object = None) -> tuple[str, str, int, float | None, bool]:
    """Return what the task knows of itself."""
    task = taskpool.current_task()
    assert task is not None
    return task.name, task.id, task.attempt, task.remaining(), task.cancelled


def in_thread(call: Callable[[], Any]) -> Any:
    """Return what a call in another thread returns."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


def note_whether_stopped(started: Path, path: Path) -> None:
    """Note whether the task is asked to end: before that, and while it cleans up."""
    task = taskpool.current_task()
    assert task is not None
    note(path, task.cancelled)
    started.touch()
    try:
        sleep_in_steps(1e6)
    finally:
        note(path, task.cancelled)


def report(done: Any, total: Any) -> None:
    """Report how far the task is."""
    task = taskpool.current_task()
    assert task is not None
    task.report(done, total)


def report_and_hold(release: Path) -> str:
    """Report, and end once the file exists."""
    report(1, 4)
    await_file(release)
    return "done"


# ---------------------------------------------------------------------------------------------- more odd exceptions


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    """Refuses every change."""

    text: str


class Refusing(Exception):
    """Refuses changes in a way of its own."""

    def __setattr__(self, name: str, value: object) -> NoReturn:
        """Refuse."""
        raise TypeError(f"{name} stays as it is")


class OddText(str):
    """Text that does not pickle."""

    __slots__ = ()

    def __reduce__(self) -> NoReturn:
        """Refuse."""
        raise ValueError("I stay here")


class HasOddText(Exception):
    """Its text does not pickle."""

    def __str__(self) -> str:
        """Return odd text."""
        return OddText("odd")


class _Nameless(type):
    def __getattribute__(cls, name: str) -> Any:
        if name in ("__qualname__", "__name__", "__module__"):
            raise ValueError("no name")
        return super().__getattribute__(name)


class Nameless(Exception, metaclass=_Nameless):
    """Its class has no name."""


def fail_oddly(name: str) -> NoReturn:
    """Raise an exception that is hard to describe."""
    raise {"text": HasOddText, "name": Nameless}[name]


class HangsOrDiesAtDump:
    """Hangs or dies when it is pickled away from home."""

    def __init__(self, home: int, *, hangs: bool) -> None:
        self.home = home
        self.hangs = hangs

    def __reduce__(self) -> tuple[Any, ...]:
        """Do so."""
        if os.getpid() != self.home:
            sleep_for_ever() if self.hangs else kill_itself()
        return HangsOrDiesAtDump, (self.home,)


def return_or_harm_at(bad: int, home: int, hangs: bool, number: int) -> Any:
    """Return the number, or what harms its process when it is pickled."""
    return HangsOrDiesAtDump(home, hangs=hangs) if number == bad else number


class CountsDown(list[Any]):
    """A list that iterates backwards."""

    def __iter__(self) -> Any:
        """Iterate backwards."""
        return reversed(self)


def set_alarm_at(bad: int, number: int) -> int:
    """Set an alarm that would end this process soon, or take longer than that."""
    if number == bad:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        spin(0.001)
    elif number == bad + 1:
        time.sleep(0.2)
    return number


def report_and_return(value: Any) -> Any:
    """Report, and return the value."""
    report(1, 2)
    return value


# ---------------------------------------------------------------------------------------------- large data

_held: list[Any] = []  # what tasks of this process keep


def total(value: Any) -> float:
    """Return the sum of an array."""
    return float(value.sum())


def filled(size: int, number: float) -> Any:
    """Return an array of so many bytes, full of one number."""
    import numpy as np

    return np.full(size // 8, number)


def keep(value: Any) -> int:
    """Keep the argument in a global, and return how many there are."""
    _held.append(value)
    return len(_held)


def kept_totals() -> list[float]:
    """Return the sums of the arrays that this process keeps."""
    return [total(value) for value in _held]


def look_in_a_child(value: Any, release: Path, path: Path) -> int:
    """Start a child that looks at the argument when a file exists, long after this task, and notes the sum."""
    child = os.fork()
    if not child:
        await_file(release)
        note(path, total(value))
        os._exit(0)
    return child


def refuse_blocks() -> None:
    """From now on this process cannot open the blocks of others, as if it were another user's."""
    from taskpool._engine import memory

    def refuse(*_: object) -> NoReturn:
        raise memory.BlockError("not allowed")

    memory.open_file = refuse


def before_each_write_to_a_block(act: Callable[[int], object], most: int) -> None:
    """From now on this process writes so many bytes at once into blocks, and calls `act` with how many it has written."""
    from taskpool._engine import memory

    note_written = memory.Lent._note

    def noting(lent: Any, size: int) -> None:
        act(lent._words[lent._written])
        note_written(lent, size)

    memory.WRITE, memory.Lent._note = most, noting  # type: ignore[method-assign]


def die_in_a_block(size: int) -> Any:
    """Return an array, and die when half of it lies in the parent's block."""
    before_each_write_to_a_block(lambda _: kill_itself(), size // 2)
    return filled(size, 13.0)


def write_slowly_to_a_block(size: int, pause: float) -> Any:
    """Return an array that takes ten pauses to be stored."""
    before_each_write_to_a_block(lambda _: time.sleep(pause), size // 10)
    return filled(size, 5.0)


def count_copies() -> None:
    """From now on note each argument that is copied since somebody still has it at the end of the task."""
    from taskpool._engine import memory

    own = memory._own

    def owning(mapped: Any) -> None:
        _held.append(mapped)
        own(mapped)

    memory._own = owning


def count_held() -> int:
    """Return how many things this process keeps."""
    return len(_held)


class Scales:
    """A function that has large data with it."""

    def __init__(self, size: int) -> None:
        self.data = filled(size, 2.0)

    def __call__(self, number: int) -> float:
        """Use it."""
        return number * float(self.data[number])


def shared_total(shared: Any, number: float = 0.0) -> float:
    """Return the sum of a shared array, and a number."""
    return total(shared.value) + number


def sum_of_inner(shared: Any) -> float:
    """Return the sum of the arrays that are shared inside a shared list."""
    return sum(map(shared_total, shared.value))


def count_shared() -> int:
    """Return how many shared values this process keeps."""
    from taskpool import _share

    return len(_share._kept)


def count_mapped() -> int:
    """Return how many large blocks this process has mapped."""
    mapped = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:" in line
    ]
    return sum(int(end, 16) - int(begin, 16) >= 1 << 20 for begin, end in mapped)


def try_to_change(shared: Any) -> str:
    """Write to a shared array, and return the error."""
    try:
        shared.value[0] = 7.0
    except ValueError as error:
        return str(error)
    return "changed"


def keep_shared(shared: Any) -> None:
    """Be an initializer that keeps a shared value."""
    _held.append(shared)


def kept_shared_total() -> float:
    """Return the sum of what the initializer keeps."""
    return shared_total(_held[-1])


def shared_total_below(shared: Any, counts: bool = False) -> list[Any]:
    """Give a shared value to workers of this worker's own; return the sums, and how many they keep afterwards."""
    with taskpool.Executor(2) as pool:
        return [*pool.map(shared_total, [shared] * 3), pool.submit(count_shared).result(PATIENCE) if counts else None]


class SharesItself:
    """Shares its data whenever it is pickled."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __reduce__(self) -> tuple[Any, ...]:
        return SharesItself, (taskpool.share(self.data),)


def totals_of(*values: SharesItself) -> float:
    """Return the sum of what they share."""
    return sum(shared_total(value.data) for value in values)


def first_of(shared: list[Any]) -> float:
    """Return the sum of the only shared array in a list."""
    return shared_total(shared[0])


def replace_square() -> None:
    """Put another function in the place of `square`, in this process."""
    globals()["square"] = _replaced


def _replaced(_number: int) -> str:
    return "replaced"
