"""Retries: an attempt that fails, passes its limit or loses its worker is followed by another one."""

import os
import tempfile
from pathlib import Path

import tenacity

import taskpool


def fetch(counter: Path) -> str:
    attempt = taskpool.current_task().attempt
    counter.write_text(str(attempt))
    if attempt == 1:
        raise OSError("the network is down")
    if attempt == 2:
        os._exit(1)  # the process dies
    return f"fetched in attempt {attempt}"


with tempfile.TemporaryDirectory() as folder, taskpool.Executor(1, retry=3) as pool:
    counter = Path(folder) / "counter"
    print(pool.submit(fetch, counter).result())
    assert counter.read_text() == "3"

    # When, how often, how long to wait in between. Nobody sleeps meanwhile: the worker runs other tasks.
    careful = pool.options(retry=taskpool.retry(attempts=2, wait=0.1, on=(OSError, taskpool.WorkerCrashedError)))
    try:
        careful.submit(fetch, counter).result()
    except taskpool.WorkerCrashedError as error:
        print(error, *error.__notes__, sep="\n")
        assert "attempt 1: OSError: the network is down" in error.__notes__[0]

    # Any strategy of tenacity will do.
    patient = pool.options(retry=tenacity.stop_after_delay(30))
    assert patient.submit(fetch, counter).result() == "fetched in attempt 3"
