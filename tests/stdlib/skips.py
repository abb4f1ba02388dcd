"""The tests of CPython that are left out, each with its reason."""

from __future__ import annotations

_PROCESSES = "looks into `_processes`, the standard library's table of its workers"
_MANAGER = "joins `_executor_manager_thread`, the standard library's own thread"
_BROKEN = "waits for `_broken`, a private attribute"
_RUNS_BROKEN = "runs FailingInitializerMixin.test_initializer, whose failure keeps a queue that it expects to be freed"
_FORCED = "calls or replaces `_force_shutdown`, a private method"
_RAW_EXIT = "wants a task's SystemExit raised raw in the parent, where it would end the program: it arrives wrapped"

SKIPS = {
    "ExecutorDeadlockTest.test_exit_during_func_exec_on_worker": _RAW_EXIT,
    "ExecutorDeadlockTest.test_exit_during_result_pickle_on_worker": _RAW_EXIT,
    "ExecutorDeadlockTest.test_shutdown_deadlock_pickle": _MANAGER,
    "FailingInitializerMixin.test_initializer": _BROKEN,
    "FailingInitializerResourcesTest.test_forkserver": _RUNS_BROKEN,
    "FailingInitializerResourcesTest.test_spawn": _RUNS_BROKEN,
    "ProcessPoolExecutorTest.test_broken_process_pool_traceback": _PROCESSES,
    "ProcessPoolExecutorTest.test_failed_worker_replacement_breaks_pool": _MANAGER,
    "ProcessPoolExecutorTest.test_force_shutdown_during_max_tasks_worker_exit": _MANAGER,
    "ProcessPoolExecutorTest.test_force_shutdown_workers": _PROCESSES,
    "ProcessPoolExecutorTest.test_force_shutdown_workers_invalid_op": _FORCED,
    "ProcessPoolExecutorTest.test_force_shutdown_workers_stops_pool": _PROCESSES,
    "ProcessPoolExecutorTest.test_gc_during_max_tasks_worker_exit_gh152967": _MANAGER,
    "ProcessPoolExecutorTest.test_idle_process_reuse_multiple": _PROCESSES,
    "ProcessPoolExecutorTest.test_idle_process_reuse_one": _PROCESSES,
    "ProcessPoolExecutorTest.test_kill_workers": _FORCED,
    "ProcessPoolExecutorTest.test_killed_child": f"{_PROCESSES}, and wants the pool broken by the death of one of them",
    "ProcessPoolExecutorTest.test_max_tasks_per_child": _PROCESSES,
    "ProcessPoolExecutorTest.test_max_tasks_per_child[fork]": "wants it refused under fork, where it works here",
    "ProcessPoolExecutorTest.test_max_tasks_per_child_defaults_to_spawn_context": "looks into `_mp_context`",
    "ProcessPoolExecutorTest.test_python_finalization_error": "fails the start of a thread that is not needed",
    "ProcessPoolExecutorTest.test_saturation": _PROCESSES,
    "ProcessPoolExecutorTest.test_shutdown_no_wait_max_tasks_gh119592": _MANAGER,
    "ProcessPoolExecutorTest.test_terminate_workers": _FORCED,
    "ProcessPoolShutdownTest.test_context_manager_shutdown": _PROCESSES,
    "ProcessPoolShutdownTest.test_del_shutdown": _MANAGER,
    "ProcessPoolShutdownTest.test_processes_terminate": _PROCESSES,
    "ProcessPoolShutdownTest.test_shutdown_gh_132969_case_1": _MANAGER,
    "ProcessPoolShutdownTest.test_shutdown_gh_132969_case_2": _MANAGER,
    "ProcessPoolShutdownTest.test_shutdown_no_wait": _MANAGER,
}
"""By the class that defines the test and the test; `[method]` behind it limits a line to one start method."""


def why_skipped(name: str, method: str) -> str | None:
    """The reason to leave a test out, if there is one."""
    return SKIPS.get(f"{name}[{method}]") or SKIPS.get(name)
