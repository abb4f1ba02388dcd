"""`taskpool.Executor` passes the tests that CPython has for `ProcessPoolExecutor`.

One test here is one test of CPython, in a process of its own: there it may hang, crash or leak. What is left out stands
in `skips.py`, each with its reason. The rest is counted, so that tests which are no longer found are missed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import processes
from tests.stdlib.cpython import FAILED, PASSED, SKIPPED, Case
from tests.stdlib.skips import why_skipped

if TYPE_CHECKING:
    from collections.abc import Iterator

OURS = "taskpool:Executor"
EXECUTOR = os.environ.get("TASKPOOL_STDLIB_EXECUTOR", OURS)
"""`concurrent.futures:ProcessPoolExecutor` puts this harness itself to the test: nothing is left out then."""

RAN = {
    (3, 11): {"fork": 42, "forkserver": 43, "spawn": 43, "default": 43},
    (3, 13): {"fork": 45, "forkserver": 46, "spawn": 46, "default": 46},
}
"""How many tests run at the least, from that version of Python on: patch releases add some, and take none away."""

DEADLINE = 45.0
PATIENCE = 2.0
"""How long a process may outlive the case that started it."""

JOBS = 4
"""How many cases run at a time: most of their time is sleep."""

MARK = "TASKPOOL_STDLIB_CASE"
"""The variable by which the processes of a case are known, whatever parent, group or session they have."""

CHILD = "import sys; sys.path.insert(0, sys.argv[1]); from tests.stdlib import cpython; cpython.main(*sys.argv[2:])"
"""Not a script, which each worker that spawn starts would load again as its `__main__`."""

VERDICTS = {PASSED: "passed", FAILED: "failed", SKIPPED: "skipped"}


def command(*arguments: str) -> list[str]:
    """Return the command line of a process that loads CPython's tests."""
    root = Path(__file__).parents[2]
    return [sys.executable, "-X", "faulthandler", "-c", CHILD, str(root), EXECUTOR, *arguments]


def collect() -> list[Case]:
    """Find the tests that this interpreter has."""
    listing = json.loads(subprocess.check_output(command("list"), timeout=DEADLINE))
    if "absent" in listing:
        pytest.skip(listing["absent"], allow_module_level=True)
    return [Case(**case) for case in listing["cases"] if EXECUTOR == OURS or case["method"] != "default"]


def left_out(case: Case) -> str | None:
    """Return our reason not to run a case."""
    return why_skipped(case.name, case.method) if EXECUTOR == OURS else None


# ---------------------------------------------------------------------------------------------- running


def run(case: Case) -> tuple[str, str]:
    """Run a case within the deadline, and see that no process outlives it: return the verdict, and what was written."""
    mark = f"{os.getpid()} {case.method} {case.name}"
    # Output goes to a file: a pipe would not end before the last process that a test may have left behind.
    with tempfile.TemporaryDirectory() as scratch, Path(scratch, "output").open("w+b") as output:
        child = subprocess.Popen(
            command("run", case.method, case.target),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=scratch,
            env=os.environ | {MARK: mark},
            start_new_session=True,
        )
        try:
            code = child.wait(DEADLINE)
            verdict = VERDICTS.get(code, f"died with exit code {code}")
        except subprocess.TimeoutExpired:
            verdict = f"hung for {DEADLINE:.0f} s"
            abort(child)
        if left := end_marked(mark):
            verdict += f", and left behind: {left}"
        output.seek(0)
        return verdict, output.read().decode(errors="replace")


def abort(child: subprocess.Popen[bytes]) -> None:
    """End a process: on SIGABRT `faulthandler` writes where each of its threads was, GIL held or not."""
    child.send_signal(signal.SIGABRT)
    try:
        child.wait(5)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def end_marked(mark: str) -> list[processes.Process]:
    """Wait a moment for the marked processes to end, then end and return those that do not."""
    deadline = time.monotonic() + PATIENCE
    while (left := processes.marked(MARK, mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    return left


class Runs:
    """Cases that run a few at a time, ahead of the tests that ask what became of them."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._threads = ThreadPoolExecutor(JOBS)
        self._runs: dict[Case, Future[tuple[str, str]]] = {}

    def start(self, case: Case) -> Future[tuple[str, str]]:
        """Run a case, unless it has been started before."""
        if case not in self._runs:
            self._runs[case] = self._threads.submit(run, case)
        return self._runs[case]

    def close(self) -> None:
        """Wait for those that run, and forget the others."""
        self._threads.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[Runs]:
    """All cases that this session is going to ask for, started in its order: so each has its whole deadline."""
    runs = Runs()
    for item in request.session.items:
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        if isinstance(case, Case) and not left_out(case):
            runs.start(case)
    yield runs
    runs.close()


@pytest.fixture(autouse=True)
def audit() -> None:
    """Take the place of the audit between tests, which would end the cases that run ahead: see `end_marked`."""


# ---------------------------------------------------------------------------------------------- tests

CASES = collect()


def parameter(case: Case) -> object:
    """Return a case as pytest's parameter, skipped if it is left out."""
    reason = left_out(case)
    marks = [pytest.mark.skip(reason=reason)] if reason else []
    return pytest.param(case, id=f"{case.method}-{case.name}", marks=marks)


@pytest.mark.parametrize("case", [parameter(case) for case in CASES])
def test_of_cpython(case: Case, runs: Runs) -> None:
    """The executor does what this test of CPython demands."""
    verdict, output = runs.start(case).result()
    if verdict == "skipped":
        pytest.skip(f"by CPython: {output.splitlines()[-1]}")
    if verdict != "passed":
        pytest.fail(f"{verdict}\n{output}", pytrace=False)


@pytest.mark.timeout(600)
@pytest.mark.skipif(EXECUTOR != OURS, reason="the counts are those of taskpool")
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn", "default"])
def test_how_many_ran(method: str, runs: Runs) -> None:
    """No test of CPython got lost, whether it passes or not."""
    started = [runs.start(case) for case in CASES if case.method == method and not left_out(case)]
    ran = sum(run.result()[0] != "skipped" for run in started)
    known = max(version for version in RAN if version <= sys.version_info[:2])
    assert ran >= RAN[known][method]
