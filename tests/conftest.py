"""Fixtures of all tests: executors that always end, and an audit that finds what a test left behind."""

from __future__ import annotations

import faulthandler
import signal
import sys
import zlib
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
    config.addinivalue_line("markers", "repeated: the same test on another engine; not part of make core")
    config.addinivalue_line("markers", "slow: sweeps; shortened unless TASKPOOL_TEST_FULL=1")
    config.addinivalue_line("markers", "leaves(reason): this test leaves something behind on purpose")
    config.addinivalue_line(
        "filterwarnings", "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"
    )
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell has background jobs, and their scripts, ignore it
    if sys.platform == "linux":
        processes.adopt_orphans()
        processes.start_standard_helpers()


OTHER_ENGINES = ("futures", "pool", "thread", "serial")
# All hosted backends have one engine. What stands above it is tested on one of them, the engine itself on two, of which
# one alternates from test to test; in a whole run everything on each.
ABOVE_THE_ENGINE = {
    *("test_asyncio", "test_events", "test_group", "test_map", "test_nested", "test_outcomes", "test_retry"),
    *("test_logging", "test_memory", "test_properties", "test_progress", "test_reentrancy"),
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what repeats a test on another engine: one Python in full is enough for that; leave out what a whole run adds."""
    kept, left_out = [], []
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        name = getattr(parameters.get("backend"), "name", "")
        if name in OTHER_ENGINES:
            item.add_marker(pytest.mark.repeated)
        (left_out if _is_more(item, name) and not FULL else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def _is_more(item: pytest.Item, backend: str) -> bool:
    """Whether only a whole run has this test on this backend."""
    turn = zlib.crc32(item.name.partition("[")[0].encode()) % 2
    return backend in ("futures", "pool") and (
        item.path.stem in ABOVE_THE_ENGINE or backend == ("futures", "pool")[turn]
    )


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
