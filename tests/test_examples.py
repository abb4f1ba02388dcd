"""Every example runs to its end, silently on standard error, and leaves no process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import ROOT, run_script

EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.name != "demo.py")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example: Path) -> None:
    """Each short example asserts its own outcome, with every warning an error."""
    ended = run_script("", command=("-W", "error", str(example)), timeout=40, env={"TASKPOOL_PROGRESS": "0"})
    assert (ended.code, ended.err) == (0, "")


@pytest.mark.timeout(240)
def test_demo_runs() -> None:
    """The main job ends well although some of its tasks do not."""
    ended = run_script("", command=(str(ROOT / "examples" / "demo.py"),), timeout=200)
    assert ended.code == 0, ended.out + ended.err
