"""Every Python block of the README and of the docs runs, and prints what stands below it."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from tests.helpers import ROOT, run_script

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FILE = re.compile(r"`((?:tests|examples|docs)/[\w./-]+)`")
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SNIPPET = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)


class Block(NamedTuple):
    """A Python block of a page, and the text block that follows it directly, if any."""

    place: str
    code: str
    output: str | None


def blocks() -> list[Block]:
    """Return the Python blocks of all pages."""
    found = []
    for page in PAGES:
        text = page.read_text()
        fences = list(FENCE.finditer(text))
        for fence, following in zip(fences, [*fences[1:], None], strict=False):
            if fence[1] == "python":
                place = f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, fence.start()) + 1}"
                adjacent = following and following[1] == "text" and not text[fence.end() : following.start()].strip()
                found.append(Block(place, fence[2], following[2] if following and adjacent else None))
    return found


BLOCKS = blocks()


def test_pages_have_blocks() -> None:
    """The pattern above finds what it should."""
    assert {"README.md", "docs/index.md", "docs/getting-started.md"} <= {block.place.split(":")[0] for block in BLOCKS}


def test_files_that_pages_name_exist() -> None:
    """A page points at no file that was moved."""
    named = {(page.name, name) for page in PAGES for name in FILE.findall(page.read_text())}
    assert not [(page, name) for page, name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_block_runs(block: Block) -> None:
    """A block runs as a script of its own, with what it includes from the examples."""
    code = SNIPPET.sub(lambda include: (ROOT / include[1]).read_text(), block.code)
    ended = run_script(code, timeout=40, env={"TASKPOOL_PROGRESS": "0"})
    assert (ended.code, ended.err) == (0, "")
    assert block.output in (None, ended.out)
