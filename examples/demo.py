"""Parse every file of Python's standard library in parallel, with three tasks among them that go wrong."""

import ast
import os
import signal
import sys
import sysconfig
import time
from collections import Counter
from concurrent.futures import as_completed
from pathlib import Path

import structlog
from rich.console import Console
from rich.progress import track

import taskpool


class OddError(Exception):
    """Pickle alone cannot rebuild it: `__init__` wants two arguments."""

    def __init__(self, where, why):
        super().__init__(f"{where}: {why}")


def parse(path):
    if path == "hangs":
        time.sleep(3600)
    if path == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if path == "raises":
        raise OddError(path, "an odd exception")
    began = time.perf_counter()
    tree = ast.parse(path.read_bytes())
    definitions = sum(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.walk(tree))
    if definitions > 400:
        structlog.get_logger().info("a large module", file=path.name, definitions=definitions)
    return path, definitions, time.perf_counter() - began, os.getpid()


def watch(futures):
    """Yield futures as they finish, with a live bar on a terminal and a plain line now and then elsewhere."""
    if sys.stderr.isatty():
        yield from track(as_completed(futures), "parsing", len(futures), console=Console(stderr=True))
        return
    for count, future in enumerate(as_completed(futures), 1):
        if count % 250 == 0 or count == len(futures):
            print(f"{count} of {len(futures)} files", file=sys.stderr, flush=True)
        yield future


library = Path(sysconfig.get_path("stdlib"))
paths = [path for path in library.rglob("*.py") if "site-packages" not in path.parts]
paths[50:50] = ["hangs", "dies", "raises"]

with taskpool.Executor(task_timeout=10) as pool:
    short = pool.options(task_timeout=1)  # the files that are known to be bad need not have the whole ten seconds
    futures = {(short if isinstance(path, str) else pool).submit(parse, path): path for path in paths}
    finished = list(watch(futures))

parsed = [future.result() for future in finished if future.exception() is None]
failed = {futures[future]: future.exception() for future in finished if future.exception() is not None}
bad_source = {path: error for path, error in failed.items() if isinstance(error, SyntaxError)}
slowest = sorted(parsed, key=lambda row: -row[2])[:3]

print(f"\n{len(parsed)} files, {sum(row[1] for row in parsed)} definitions")
print("slowest:", ", ".join(f"{path.name} {seconds * 1000:.0f} ms" for path, _, seconds, _ in slowest))
print("files per worker:", dict(Counter(row[3] for row in parsed)))
print(f"{len(failed)} failed" + (f", {len(bad_source)} of them are not valid Python on purpose" if bad_source else ""))
for path, error in failed.items():
    if path not in bad_source:
        print(f"  {path}: {type(error).__name__}: {str(error).splitlines()[0]}")
        if isinstance(error, taskpool.TaskTimeoutError):
            print("    stuck at:", error.stack.strip().splitlines()[-1].strip())
