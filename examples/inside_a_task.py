"""Inside a task: what it can ask about itself, and how it tells how far it is."""

import time

import taskpool


def convert(pages: int) -> str:
    task = taskpool.current_task()
    for page in range(pages):
        if task.remaining() < 0.1:
            return f"{task.name}: {page} of {pages} pages, then time was short"
        time.sleep(0.05)
        task.report(page + 1, pages)
    return f"{task.name}: all pages"


with taskpool.Executor(1, task_timeout=1, name="docs") as pool:
    future = pool.options(name="report.pdf").submit(convert, 100)
    while not future.done():
        time.sleep(0.2)
        print("progress:", future.progress)
    print(future.result())

assert taskpool.current_task() is None  # outside of tasks there is none
assert future.result().startswith("report.pdf: ")
