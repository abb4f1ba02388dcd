"""Programs for tests that need an interpreter of their own: the body of a `main`, with the usual beginning."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.helpers import Backend, Ended, run_script

_PROGRAM = """
import atexit, gc, os, pathlib, signal, sys, threading, time
import taskpool
from tests import states, tasks

def executor(workers=2, **options):
    return taskpool.Executor(workers, backend=sys.argv[1], mp_context=sys.argv[2] or None, **options)

path = pathlib.Path(sys.argv[3])
release = path.with_name("release")

def main(*args):
{body}

if __name__ == "__main__":
    main(*sys.argv[4:])
"""


def run_main(
    body: str, backend: Backend, folder: Path, *args: str, timeout: float = 20, send: signal.Signals | None = None
) -> Ended:
    """Run a program and see that all it started ends with it.

    Args:
        body: The body of its `main(*args)`. `executor(workers, **options)` makes an executor on the backend; `path`
            and `release` are the files "notes" and "release" in `folder`.
        backend: Where its tasks run.
        folder: Where it may write.
        args: The arguments of `main`.
        timeout: How long it may run.
        send: A signal to send once it prints "ready", and again at "again". SIGINT goes to the whole process group,
            as from a terminal.
    """
    indented = "\n".join(f"    {line}" for line in body.strip().splitlines())
    return run_script(
        _PROGRAM.format(body=indented),
        args=(backend.name, backend.start or "", str(folder / "notes"), *args),
        signals=(("ready", send), ("again", send)) if send else (),
        group=send == signal.SIGINT,
        timeout=timeout,
    )
