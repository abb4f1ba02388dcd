"""Progress: a bar on a terminal and in a notebook, a line every few seconds elsewhere."""

import time

import taskpool


def convert(page: int) -> int:
    time.sleep(0.005)
    if page % 100 == 99:
        raise ValueError(f"page {page} is blank")
    return page


# True shows it; a text is its label. It counts items, and those that failed.
outcomes = list(taskpool.outcomes(convert, range(300), progress="pages"))
assert len(outcomes) == 300
assert {outcome.item for outcome in outcomes if not outcome.ok} == {99, 199, 299}
