"""CPython's own executor tests, run against another executor.

`python -m test test_concurrent_futures` is the measure of what a `concurrent.futures.Executor` over processes does. An
import hook loads those tests under their own names, puts the executor under test wherever they name
`ProcessPoolExecutor`, and changes nothing else. The names must stay, since what a test sends to a worker is pickled by
reference: a worker that starts afresh finds it in CPython's own copy, which needs no hook.

What is below runs in child processes only, never in pytest's: `list` prints the cases, `run` runs one of them.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import multiprocessing
import pkgutil
import resource
import sys
import unittest
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from concurrent.futures import Executor
    from types import CodeType, ModuleType

SUITE = "test.test_concurrent_futures"
"""A module in CPython 3.11, a package from 3.12 on."""

PASSED, FAILED, SKIPPED = 100, 101, 102
"""The exit codes of `run`. A process that ends with any other, `0` included, never reached its verdict."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One test of CPython under one start method.

    Attributes:
        name: The class that defines the test, and the test: the same under all start methods and in all versions.
        method: The start method; `default` stands for an executor without `mp_context`.
        target: The name by which unittest loads it.
    """

    name: str
    method: str
    target: str


# ---------------------------------------------------------------------------------------------- loading


@dataclasses.dataclass
class Rewriter(ast.NodeTransformer):
    """Names the executor under test where the code, or a script that the code runs, names the standard library's."""

    module: str

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """`futures.ProcessPoolExecutor`."""
        return self._rename(node, node.attr)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """`ProcessPoolExecutor`."""
        return self._rename(node, node.id)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        """A script."""
        if isinstance(node.value, str):
            line = "from {} import {{executor_type}}"
            node.value = node.value.replace(line.format("concurrent.futures"), line.format(self.module))
        return node

    def _rename(self, node: ast.expr, name: str) -> ast.AST:
        if name != "ProcessPoolExecutor":
            return self.generic_visit(node)
        return ast.copy_location(ast.Name("__executor__", ast.Load()), node)


class RewritingLoader(importlib.machinery.SourceFileLoader):
    """Compiles the rewritten source, past the bytecode cache."""

    finder: RewritingFinder

    def get_code(self, fullname: str) -> CodeType:
        """Compile a module anew."""
        source = self.get_source(fullname)
        assert source is not None
        tree = Rewriter(self.finder.module).visit(ast.parse(source))
        return compile(tree, self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        """Run it, with the executor under test among its globals."""
        vars(module)["__executor__"] = self.finder.executor
        super().exec_module(module)


@dataclasses.dataclass
class RewritingFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of the suite where they are, and has them loaded by `RewritingLoader`."""

    module: str
    executor: type[Executor]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Leave all other modules to the usual finders."""
        if fullname != SUITE and not fullname.startswith(f"{SUITE}."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = RewritingLoader(fullname, spec.origin)
            spec.loader.finder = self
        return spec


# ---------------------------------------------------------------------------------------------- without a start method


def without_context(executor: type[Executor]) -> type[Executor]:
    """Return the executor as it is if nobody names a start method. Scripts know it by the same name."""

    class Contextless(executor):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("mp_context", None)
            super().__init__(*args, **options)

    Contextless.__name__ = executor.__name__
    return Contextless


def hide_start_method(case: type[unittest.TestCase]) -> None:
    """Make a case of spawn one without a start method: the suite asks `hasattr(self, "ctx")`, as it does for threads.

    Its class is changed in place, since methods of it travel to workers by its name. Tests that want a manager or a
    queue still find a context to take it from.
    """
    mixin: Any = next(base for base in case.__mro__ if "ctx" in vars(base))
    mixin.get_context = staticmethod(functools.partial(multiprocessing.get_context, mixin.ctx))
    del mixin.ctx


# ---------------------------------------------------------------------------------------------- listing


def modules() -> Iterator[ModuleType]:
    """Import whatever may define tests."""
    suite = importlib.import_module(SUITE)
    yield suite
    for module in pkgutil.iter_modules(getattr(suite, "__path__", ())):
        if module.name.startswith("test_"):
            try:
                yield importlib.import_module(f"{SUITE}.{module.name}")
            except unittest.SkipTest:  # as that of the interpreter pool does where there is none
                continue


def cases() -> Iterator[Case]:
    """Find the tests of executors over processes; those of threads, interpreters and bare futures stay out."""
    owners = (owner for module in modules() for owner in vars(module).values() if isinstance(owner, type))
    for owner in owners:
        if not issubclass(owner, unittest.TestCase):
            continue
        for test in unittest.defaultTestLoader.getTestCaseNames(owner):
            definer = next(base for base in owner.__mro__ if test in vars(base))
            # One class of the suite goes through the start methods itself, and names a test after each.
            method = getattr(owner, "ctx", test.removeprefix("test_"))
            case = Case(f"{definer.__name__}.{test}", method, f"{owner.__module__}.{owner.__name__}.{test}")
            if method in multiprocessing.get_all_start_methods():
                yield case
            if getattr(owner, "ctx", None) == "spawn":
                yield dataclasses.replace(case, method="default")


def listing() -> dict[str, Any]:
    """Return what there is to run, or why there is nothing."""
    if importlib.util.find_spec("test") is None or importlib.util.find_spec(SUITE) is None:
        version = ".".join(map(str, sys.version_info[:3]))
        return {"absent": f"Python {version} was installed without its own tests: {sys.executable} has no {SUITE}"}
    return {"cases": [dataclasses.asdict(case) for case in cases()]}


# ---------------------------------------------------------------------------------------------- running


def collect_before_counting() -> None:
    """Free what only a cycle holds before a test counts threads: up to 3.11 it also counts those that have ended."""
    helper: Any = importlib.import_module("test.support.threading_helper")
    count = helper.threading_cleanup

    def collect_and_count(*before: Any) -> None:
        gc.collect()
        count(*before)

    helper.threading_cleanup = collect_and_count


def run(method: str, target: str) -> int:
    """Run one test. It fails also if it leaves a thread or a zombie, as under `regrtest --fail-env-changed`."""
    collect_before_counting()
    suite = unittest.defaultTestLoader.loadTestsFromName(target)
    if method == "default":
        hide_start_method(type(next(iter(suite))))  # type: ignore[arg-type]
    result = unittest.TextTestRunner().run(suite)
    if not result.wasSuccessful():
        return FAILED
    if result.skipped:
        sys.stderr.write(result.skipped[0][1])
        return SKIPPED
    if importlib.import_module("test.support").environment_altered:
        sys.stderr.write("The test passed, but left something behind: see the warnings.")
        return FAILED
    return PASSED if result.testsRun == 1 else FAILED


def main(executor: str, command: str, method: str = "", target: str = "") -> None:
    """Obey one command; `executor` is the one under test, as `module:class`."""
    module, _, name = executor.partition(":")
    tested = getattr(importlib.import_module(module), name)
    sys.meta_path.insert(0, RewritingFinder(module, without_context(tested) if method == "default" else tested))
    if command == "list":
        json.dump(listing(), sys.stdout)
    else:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # many tests crash a worker
        sys.exit(run(method, target))
