"""Fixtures of all tests: executors that always end, and an audit that finds what a test left behind."""

from __future__ import annotations

import faulthandler
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests import processes
from tests.helpers import FULL, PATIENCE, TEMPLATE, Backend, bounded

if TYPE_CHECKING:
    import taskpool


def pytest_configure(config: pytest.Config) -> None:
    """Name the markers, and make orphans visible to the audit."""
    config.addinivalue_line("markers", "core: the part of the suite that runs under every Python found")
    config.addinivalue_line("markers", "unproven: not yet known to pass every time; run by make test-all")
    config.addinivalue_line("markers", "slow: sweeps; shortened unless TASKPOOL_TEST_FULL=1")
    config.addinivalue_line("markers", "leaves(reason): this test leaves something behind on purpose")
    config.addinivalue_line(
        "filterwarnings", "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"
    )
    if sys.platform == "linux":
        processes.adopt_orphans()
        processes.start_standard_helpers()


# Tests in these files have not yet all passed on a quiet machine, each of them many times over. They stand outside
# `make test` until they have; `make test-all` runs them.
UNPROVEN = (
    "contract/test_life.py",
    "contract/test_map.py",
    "stdlib/test_stdlib_contract.py",
    "test_crashes.py",
    "test_default.py",
    "test_exit.py",
    "test_fork.py",
    "test_initializer.py",
    "test_kill_sweep.py",
    "test_limits.py",
    "test_main_functions.py",
    "test_memory.py",
    "test_parent_end.py",
    "test_reentrancy.py",
    "test_timeout_values.py",
    "test_torture_table.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of those files."""
    for item in items:
        if str(item.path).endswith(UNPROVEN):
            item.add_marker(pytest.mark.unproven)


@pytest.fixture
def backend() -> Backend:
    """The backend of a test that is not run over several."""
    return TEMPLATE


@pytest.fixture
def full() -> bool:
    """Whether sweeps run whole."""
    return FULL


@pytest.fixture
def pool(backend: Backend) -> Iterator[Callable[..., taskpool.Executor]]:
    """A maker of executors on the test's backend; each is ended, within a bound, when the test is over."""
    import taskpool

    made: list[taskpool.Executor] = []

    def make(max_workers: int | None = 2, **options: Any) -> taskpool.Executor:
        executor = taskpool.Executor(max_workers, **{**backend.options, **options})
        made.append(executor)
        return executor

    yield make
    for executor in made:
        bounded(lambda executor=executor: executor.terminate(timeout=5), PATIENCE)
    made.clear()  # so that the audit does not see what their initargs hold


@pytest.fixture
def one(pool: Callable[..., taskpool.Executor]) -> taskpool.Executor:
    """An executor with a single worker."""
    return pool(1)


@pytest.fixture
def shared() -> Iterator[None]:
    """End the executors behind `taskpool.map` when the test is over, so that the next test starts afresh."""
    from taskpool import _default

    yield
    for executor in list(_default._executors.values()):
        bounded(lambda executor=executor: executor.terminate(timeout=5), PATIENCE)
    _default._executors.clear()


@pytest.fixture(autouse=True)
def audit(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a process, a zombie, a thread, a descriptor or a shared-memory name."""
    before = processes.census()
    yield
    if request.node.get_closest_marker("leaves"):
        return
    left = processes.leaks(before)
    processes.end_descendants(before)
    assert not left, "left behind:\n" + "\n".join(left)


@pytest.fixture(autouse=True, scope="session")
def _stacks_on_demand() -> Iterator[None]:
    """Let `kill -QUIT` show where a run stands."""
    faulthandler.register(signal.SIGQUIT, all_threads=True)
    yield
    faulthandler.unregister(signal.SIGQUIT)
