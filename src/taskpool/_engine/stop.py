"""Stopping processes, and everything that depends on the platform for it.

The ladder, as the dispatcher climbs it for a task that must end:

1. `interrupt`: SIGUSR1. A Python handler in the worker raises inside the task, if the task that is meant still runs.
   Only a request: code may swallow it, C code may never return to the interpreter.
2. `dump_and_die`: SIGUSR2. faulthandler writes every stack from within the signal handler, whether or not the GIL is
   held, then hands the signal on to its default action, which ends the process. So the end of the process is also the
   end of the dump: nobody has to guess how long writing takes. SIGCONT goes along, for a task that was stopped.
3. The end of the process group: the parent closes its end of the life pipe, and the kernel sends SIGKILL to the group
   (`arm_life_pipe`). No process id is involved that could have been reused. `kill_group` is the way without it.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # of `signal`, whose own getsignal looks for an enum: 3 µs
import contextlib
import errno
import fcntl
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

INTERRUPT_SIGNAL = signal.SIGUSR1
STACK_SIGNAL = signal.SIGUSR2
LIVE_SIGNAL = (
    getattr(signal, "SIGRTMIN", 0) and signal.SIGRTMIN + 7
)  # one that nobody uses; asks for stacks, and no more
KILL_SIGNAL = signal.SIGKILL

_HAS_LIFE_SIGNAL = hasattr(fcntl, "F_SETSIG") and hasattr(os, "O_ASYNC")


# In the parent


class ProcessHandle:
    """A process that can be signalled without its id ever meaning another process.

    It holds a pidfd where the system has them (Linux 5.3): readable once the process has ended, also when the process
    is not our child or when a grandchild holds its pipes.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.fd: int | None = None
        self.ended = False
        try:
            self.fd = os.pidfd_open(pid)
        except ProcessLookupError:  # it has ended and was reaped
            self.ended = True
        except (AttributeError, OSError):  # there are none, or no descriptor is left: the host sees its end
            pass

    def send(self, number: int) -> None:
        """Send a signal; a process that has ended gets none."""
        with contextlib.suppress(OSError):
            if not self._send_by_fd(number) and not self.ended:
                os.kill(self.pid, number)

    def _send_by_fd(self, number: int) -> bool:
        """Send a signal by the pidfd; False if there is none, or it takes none, as in some sandboxes."""
        if self.fd is None:
            return False
        try:
            signal.pidfd_send_signal(self.fd, number)
        except ProcessLookupError:  # it has ended
            return True
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """End the process itself, at once."""
        self.send(signal.SIGKILL)

    def kill_group(self) -> None:
        """End the process group that the process leads.

        While the leader is not reaped its id names no other group, so this is called before that.
        """
        if not self.ended or self.fd is not None:
            with contextlib.suppress(OSError):
                os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Close the descriptor."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def ask_for_stacks(process: ProcessHandle) -> bool:
    """Have the worker write all its stacks, and go on; return False where the system has no signal for that."""
    if not LIVE_SIGNAL:
        return False
    process.send(LIVE_SIGNAL)
    return True


def has_taken_signal(pid: int, blocked_before: set[str]) -> bool:
    """Whether a process has nothing more to do for LIVE_SIGNAL: it waits nowhere, and no thread is handling it.

    A thread that handles a signal blocks it for as long.

    Args:
        pid: The process.
        blocked_before: Threads that had it blocked before it was sent, for reasons of their own.
    """
    with contextlib.suppress(OSError):  # it has ended
        return not _has_mask(f"/proc/{pid}/status", "ShdPnd:") and not threads_that_block(pid) - blocked_before
    return True


def threads_that_block(pid: int) -> set[str]:
    """Return the threads of a process that have LIVE_SIGNAL blocked."""
    found = set()
    with contextlib.suppress(OSError):  # it, or one of them, has ended
        for thread in os.listdir(f"/proc/{pid}/task"):
            if _has_mask(f"/proc/{pid}/task/{thread}/status", "SigBlk:"):
                found.add(thread)
    return found


def _has_mask(path: str, field: str) -> bool:
    with open(path) as status:
        mask = next((line for line in status if line.startswith(field)), "x 0").split()[1]
    return bool(int(mask, 16) >> (LIVE_SIGNAL - 1) & 1)


def has_pidfds() -> bool:
    """Whether the system hands out pidfds that take signals. Older kernels and some sandboxes refuse either call."""
    try:
        fd = os.pidfd_open(os.getpid())
    except (AttributeError, OSError) as error:
        return getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE)  # for the moment
    try:
        signal.pidfd_send_signal(fd, 0)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def interrupt(process: ProcessHandle) -> None:
    """Ask the worker to raise inside the task whose id stands in its page."""
    process.send(INTERRUPT_SIGNAL)


def dump_and_die(process: ProcessHandle) -> None:
    """Have the worker write all its stacks and end."""
    process.send(STACK_SIGNAL)
    process.send(signal.SIGCONT)


# How much memory a process took

_WAITID = {"x86_64": 247, "aarch64": 95, "riscv64": 95}  # the system call's number
_MAXRSS_AT = 32  # in struct rusage, behind two timevals


def peak_memory(process: ProcessHandle | None) -> tuple[int | None, int]:
    """Return how much memory, in bytes, a process that has ended took at most, and what it had started and lives.

    Of what has ended before it no more than the largest counts, with the first. That is None where it cannot be asked
    for: of a process that is not a child of this one.
    """
    if process is None or not sys.platform.startswith("linux"):
        return None, 0
    others = sum(_peak_of(pid) for pid in _in_session(process.pid))
    return (None if process.fd is None else peak_of_zombie(os.P_PIDFD, process.fd)), others


def peak_of_zombie(kind: int, number: int) -> int | None:
    """Return how much memory, in bytes, a child of this process that has ended took at most; None if it is no child.

    Python's own `waitid` leaves out what the system tells about that, and `wait4` reaps.
    """
    call = _WAITID.get(os.uname().machine)
    if call is None or sys.maxsize < 1 << 32:
        return None
    import ctypes

    usage = ctypes.create_string_buffer(1024)
    how = os.WEXITED | os.WNOWAIT | os.WNOHANG
    system = ctypes.CDLL(None)
    if system.syscall(call, kind, number, None, how, usage) != 0:
        return None
    return int.from_bytes(usage.raw[_MAXRSS_AT : _MAXRSS_AT + 8], sys.byteorder) * 1024 or None


def _peak_of(pid: int) -> int:
    with contextlib.suppress(OSError, StopIteration, ValueError), open(f"/proc/{pid}/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) * 1024
    return 0


def out_of_memory_kills() -> int | None:
    """Return how many processes the kernel has killed for memory; None if that cannot be read."""
    for path in _counters():
        with contextlib.suppress(OSError, StopIteration, ValueError, IndexError), open(path) as file:
            return int(next(line for line in file if line.startswith("oom_kill ")).split()[1])
    return None


def _counters() -> list[str]:
    """Return the files that may have the count: those of this control group, then that of the system."""
    files = []
    with contextlib.suppress(OSError, ValueError), open("/proc/self/cgroup") as groups:
        for line in groups:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if not controllers:
                files += [f"/sys/fs/cgroup{path}/memory.events", "/sys/fs/cgroup/memory.events"]
            elif "memory" in controllers.split(","):
                files += [f"/sys/fs/cgroup/memory{path}/memory.oom_control", "/sys/fs/cgroup/memory/memory.oom_control"]
    return [*files, "/proc/vmstat"]


def signal_name(exitcode: int | None) -> str | None:
    """Return the name of the signal that an exit code stands for, if it does."""
    if exitcode is None or exitcode >= 0:
        return None
    try:
        return signal.Signals(-exitcode).name
    except ValueError:
        return f"signal {-exitcode}"


# In the worker


def lead_own_group() -> None:
    """Leave the parent's session, so that Ctrl-C is the parent's alone and one kill reaches all that the task starts."""
    with contextlib.suppress(OSError):  # it leads one already
        os.setsid()


def arm_life_pipe(fd: int) -> None:
    """Have the kernel end this process group when the last writing end of the life pipe closes.

    Holds while C code keeps the GIL, while the process is stopped, and whatever ended the parent. Armed only once this
    process leads its group: earlier it would name the parent's.
    """
    if _HAS_LIFE_SIGNAL and os.getpgrp() == os.getpid():
        fcntl.fcntl(fd, fcntl.F_SETOWN, -os.getpid())
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
    else:
        threading.Thread(target=_end_with, args=(fd,), name="taskpool-life", daemon=True).start()
    if _hung_up(fd):  # the parent ended before the pipe was armed
        os._exit(1)


def _hung_up(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLHUP)
    return bool(poll.poll(0))


def _end_with(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.read(fd, 1)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def reset_signals() -> None:
    """Give every signal its default action again and unblock all: handlers of the parent mean the parent.

    SIGINT gets a handler that does nothing, not SIG_IGN, which programs that a task starts would inherit. That of
    SIGCHLD goes even if it is SIG_IGN: whoever has that has no children to wait for.
    """
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, _ignore)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _ignore(_number: int, _frame: FrameType | None) -> None:
    pass


def on_interrupt(handler: Callable[[int, FrameType | None], None]) -> None:
    """Install the handler that raises inside a task, again if a task has replaced it."""
    if _signal.getsignal(INTERRUPT_SIGNAL) is not handler:
        signal.signal(INTERRUPT_SIGNAL, handler)


def clear_timers() -> None:
    """Clear the interval timers that a task left behind; the default action of their signals would end the next one."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.setitimer(signal.ITIMER_PROF, 0)


def write_stacks_to(fd: int) -> None:
    """Have faulthandler write to `fd`: at a crash, and when the parent sends STACK_SIGNAL, which then ends the process."""
    import faulthandler

    faulthandler.enable(fd)
    faulthandler.register(STACK_SIGNAL, fd, all_threads=True, chain=True)
    if LIVE_SIGNAL:
        faulthandler.register(LIVE_SIGNAL, fd, all_threads=True)


def sweep_session(session: int) -> None:
    """Kill what is left of a session whose leader has just ended: what left the group, not the session.

    The leader's id names no other session as long as the leader is not reaped, or anything is left of the session.
    """
    if not sys.platform.startswith("linux"):
        return
    for pid in _in_session(session):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            os.kill(pid, signal.SIGKILL)


def _in_session(session: int) -> Iterator[int]:
    """Yield the processes of a session beside its leader."""
    entries: list[str] = []
    with contextlib.suppress(OSError):  # no descriptor is left to list it with
        entries = os.listdir("/proc")
    for entry in entries:
        if entry.isdigit() and int(entry) != session:
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if os.getsid(int(entry)) == session:
                    yield int(entry)
