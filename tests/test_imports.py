"""What the package shows and what it costs: lazy imports, bare workers, exact names, errors that travel."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

import taskpool
from taskpool import errors
from tests import states
from tests.helpers import EVERY_HOST, ROOT, TEMPLATE, Backend, on_hosts, run_script
from tests.scripts import run_main

Make = Callable[..., taskpool.Executor]

THIRD_PARTY = {"attr", "attrs", "structlog", "tenacity", "cloudpickle", "rich", "psutil", "numpy"}
NAMES = {
    "CallTimeoutError",
    "Capabilities",
    "CurrentTask",
    "Executor",
    "ForkedExecutorError",
    "InitializerError",
    "MapOptions",
    "NestingError",
    "NotSendableError",
    "Outcome",
    "QueueFullError",
    "RemoteError",
    "RetryPolicy",
    "RunningTask",
    "Shared",
    "Stats",
    "TaskFuture",
    "TaskGroup",
    "TaskPoolError",
    "TaskTimeoutError",
    "UnpickleError",
    "UnsupportedError",
    "View",
    "WorkerCrashedError",
    "current_task",
    "imap",
    "imap_unordered",
    "map",
    "outcomes",
    "retry",
    "share",
    "starmap",
}


def loaded_by(statement: str) -> set[str]:
    """Return the modules that a statement loads into a fresh interpreter."""
    path = f"import sys; sys.path[:] = {sys.path!r}; before = set(sys.modules)"
    done = run_script("", command=("-I", "-c", f"{path}\n{statement}\nprint(*set(sys.modules) - before)"))
    assert done.code == 0, done
    return set(done.out.split())


# ---------------------------------------------------------------------------------------------- what is loaded


@pytest.mark.core
def test_importing_the_package_loads_next_to_nothing() -> None:
    """The face is lazy: what is behind a name is loaded when the name is used."""
    assert loaded_by("import taskpool") == {"taskpool", "__future__"}


def test_a_name_loads_what_it_needs() -> None:
    """Errors come without the engine and without any other distribution."""
    loaded = loaded_by("from taskpool import TaskTimeoutError")
    assert "taskpool.errors" in loaded
    assert not any(name.startswith("taskpool._engine") for name in loaded)
    assert not loaded & THIRD_PARTY
    assert loaded_by("from taskpool import Executor") & {"taskpool._executor"}


PARENT = """
with executor(1) as pool:
    print("made:", *sys.modules)
    pool.submit(abs, -3).result()
    print("ran:", *sys.modules)
"""


def test_a_first_task_loads_what_it_needs(tmp_path: Path) -> None:
    """No other distribution; and what a crash needs is there, since then there may be no descriptor left to load it."""
    made, ran = (set(line.split()) for line in run_main(PARENT, TEMPLATE, tmp_path).out.splitlines())
    assert not {name.partition(".")[0] for name in made | ran} & THIRD_PARTY
    assert "concurrent.futures.process" not in made
    assert {"concurrent.futures.process", "taskpool._broken"} <= ran


def test_errors_of_broken_pools_load_their_base_when_asked_for() -> None:
    """It takes longer to load than all other errors."""
    errors_alone = loaded_by("from taskpool import errors; errors.TaskTimeoutError; assert not hasattr(errors, 'none')")
    assert "concurrent.futures.process" not in errors_alone
    assert "concurrent.futures.process" in loaded_by("from taskpool import errors; errors.WorkerCrashedError")


def test_a_bare_worker_side_is_the_standard_library() -> None:
    """The module that a worker process imports needs no other distribution."""
    loaded = loaded_by("import taskpool._engine.worker")
    assert not {name.partition(".")[0] for name in loaded} & THIRD_PARTY
    strange = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names - {"taskpool"}
    assert not strange


FRESH = [each for each in EVERY_HOST if each.start != "fork"]  # a forked process has all that its parent has
BARE = """
print(executor(1).submit(eval, "' '.join(__import__('sys').modules)").result())
"""


@pytest.mark.core
@pytest.mark.parametrize("backend", FRESH, ids=str)
def test_a_bare_worker_has_the_standard_library_alone(backend: Backend, tmp_path: Path) -> None:
    """A worker that ran a plain task has loaded nothing of another distribution, nor of the parent's side."""
    loaded = set(run_main(BARE, backend, tmp_path).out.split())
    assert "taskpool._engine.worker" in loaded
    assert not {name.partition(".")[0] for name in loaded} & THIRD_PARTY
    assert not loaded & {"taskpool._executor", "taskpool._default", "taskpool._engine.dispatcher", "taskpool._task"}


EACH_FIRST = """
import importlib
for name in args:
    child = os.fork()
    if child == 0:
        for other in [each for each in sys.modules if each.partition(".")[0] == "taskpool"]:
            del sys.modules[other]
        importlib.import_module(name)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(name)
"""


def test_a_module_of_each_floor_can_be_imported_first(tmp_path: Path) -> None:
    """No module needs another to have been imported before it."""
    names = [name for _, name, _ in pkgutil.walk_packages(taskpool.__path__, "taskpool.")]
    assert len(names) > 8
    ended = run_main(EACH_FIRST, TEMPLATE, tmp_path, *names)
    assert (ended.code, ended.out) == (0, ""), ended


# ---------------------------------------------------------------------------------------------- names


@pytest.mark.core
def test_all_is_exact() -> None:
    """`__all__` and `dir` name what there is."""
    assert set(taskpool.__all__) - {"__version__"} == NAMES
    assert len(set(taskpool.__all__)) == len(taskpool.__all__)
    assert set(taskpool.__all__) <= set(dir(taskpool))
    assert all(getattr(taskpool, name) is not None for name in taskpool.__all__)
    ours = {
        name for name, value in vars(taskpool).items() if str(getattr(value, "__module__", "")).startswith("taskpool")
    }
    assert {name for name in ours if not name.startswith("_")} <= set(taskpool.__all__)


def test_unknown_names() -> None:
    """A name that does not exist is an AttributeError that names it, and an ImportError in an import."""
    with pytest.raises(AttributeError, match="no_such_name"):
        taskpool.no_such_name  # noqa: B018
    with pytest.raises(ImportError, match="no_such_name"):
        from taskpool import no_such_name  # noqa: F401
    assert not hasattr(taskpool, "__wrapped__")


def test_star_import() -> None:
    """`from taskpool import *` brings the public names."""
    space: dict[str, Any] = {}
    exec("from taskpool import *", space)
    assert set(space) - {"__builtins__"} == set(taskpool.__all__)


def public() -> dict[str, Any]:
    """Return each public object: the names of the package, and their public methods and properties."""
    found: dict[str, Any] = {}
    for name in NAMES:
        found[name] = value = getattr(taskpool, name)
        if inspect.isclass(value):
            found |= {f"{name}.{member}": vars(value)[member] for member in vars(value) if not member.startswith("_")}
    return found


@pytest.mark.parametrize("name", sorted(public()))
def test_docstrings(name: str) -> None:
    """Everything public says what it is; the fields of a record are explained by the record."""
    value = public()[name]
    if inspect.ismemberdescriptor(value) or not hasattr(value, "__doc__") or isinstance(value, str | int | float):
        owner, _, field = name.partition(".")
        assert field in (getattr(taskpool, owner).__doc__ or "")
        return
    text = inspect.getdoc(value) or ""
    assert text.strip(), name
    assert text.splitlines()[0].rstrip().endswith((".", ":")), text.splitlines()[0]


def test_it_is_what_it_says() -> None:
    """The classes are those of the standard library as well, and know where they are found."""
    assert issubclass(taskpool.Executor, Executor)
    assert issubclass(taskpool.TaskFuture, Future)
    for name in NAMES:
        value = getattr(taskpool, name)
        module = importlib.import_module(value.__module__)
        assert getattr(module, value.__name__) is value
        assert not value.__module__.startswith("taskpool._engine"), "that is no place to look for it"


def test_errors_say_where_they_are() -> None:
    """A traceback names an error as one can import it."""
    for name in errors.__all__:
        error = getattr(errors, name)
        assert error.__module__ in ("taskpool", "taskpool.errors")
        assert getattr(taskpool, name) is error
        assert error.__qualname__ == name


def test_the_version() -> None:
    """There is one, and it is that of the project."""
    text = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{taskpool.__version__}"' in text


def test_it_is_typed() -> None:
    """The marker for type checkers is there."""
    assert (Path(taskpool.__file__).parent / "py.typed").exists()


# ---------------------------------------------------------------------------------------------- errors

BASES = {
    errors.TaskTimeoutError: TimeoutError,
    errors.CallTimeoutError: TimeoutError,
    errors.WorkerCrashedError: BrokenProcessPool,
    errors.InitializerError: BrokenProcessPool,
    errors.NotSendableError: (TypeError, pickle.PicklingError),
    errors.UnpickleError: (errors.NotSendableError, BrokenProcessPool),
    errors.RemoteError: Exception,
    errors.QueueFullError: Exception,
    errors.ForkedExecutorError: RuntimeError,
    errors.NestingError: RuntimeError,
    errors.UnsupportedError: NotImplementedError,
}
ERRORS = [
    errors.TaskPoolError("text"),
    errors.TaskTimeoutError("text", seconds=1.5, stack="stack", task="name", pid=7),
    errors.CallTimeoutError("text", seconds=2.5, finished=3),
    errors.WorkerCrashedError("text", exitcode=-9, signal="SIGKILL", pid=7, stack="stack", task="name"),
    errors.InitializerError("text"),
    errors.NotSendableError("text"),
    errors.UnpickleError("text"),
    errors.RemoteError("text", type_name="module.Kind", traceback="trace"),
    errors.QueueFullError("text"),
    errors.ForkedExecutorError("text"),
    errors.NestingError("text"),
    errors.UnsupportedError("text"),
]


def test_the_tree_of_errors() -> None:
    """Each error is a TaskPoolError and the standard class that code written for the standard library catches."""
    for error, bases in BASES.items():
        assert issubclass(error, errors.TaskPoolError)
        for base in bases if isinstance(bases, tuple) else (bases,):
            assert issubclass(error, base), (error, base)
    assert issubclass(errors.WorkerCrashedError, BrokenExecutor)
    assert not issubclass(errors.TaskTimeoutError, CancelledError)
    assert {type(error) for error in ERRORS} == {getattr(errors, name) for name in errors.__all__}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("copier", ["pickle", "copy", "deepcopy", *range(pickle.HIGHEST_PROTOCOL + 1)], ids=str)
def test_errors_travel(error: Exception, copier: str | int) -> None:
    """An error that is pickled or copied keeps its type, its text, its attributes and its notes."""
    error.add_note("a note")
    if copier in ("copy", "deepcopy"):
        back = getattr(copy, str(copier))(error)
    else:
        back = pickle.loads(pickle.dumps(error, None if copier == "pickle" else int(copier)))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert back.args == error.args
    assert vars(back) == vars(error)


@on_hosts
def test_errors_travel_through_a_task(pool: Make) -> None:
    """A task that uses taskpool itself may raise its errors."""
    executor = pool(1)
    for error in ERRORS:
        caught = executor.submit(states.raise_it, error).exception(20)
        assert type(caught) is type(error)
        assert str(caught) == str(error)
        assert {**vars(caught), "__notes__": None} == {**vars(error), "__notes__": None}


def test_every_error_is_drawn_in_the_tree() -> None:
    """The picture at the head of the module is complete."""
    assert errors.__doc__ is not None
    assert all(name in errors.__doc__ for name in errors.__all__)


def test_importing_is_quick() -> None:
    """`import taskpool` costs little beyond a bare interpreter."""
    times = {code: min(_seconds(code) for _ in range(5)) for code in ("pass", "import taskpool")}
    assert times["import taskpool"] - times["pass"] < 0.015, times


def _seconds(code: str) -> float:
    program = f"import time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r}); {program}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    return float(done.stdout)
