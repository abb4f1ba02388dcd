"""Texts for errors about objects that may be of any size, and whose own `__repr__` may fail."""

from __future__ import annotations

import reprlib


def short_repr(value: object, limit: int = 80) -> str:
    """Return `repr(value)` in one line of at most `limit` characters, whatever the object's own `__repr__` does."""
    maker = reprlib.Repr()
    maker.maxstring = maker.maxother = limit
    try:
        text = " ".join(maker.repr(value).split())
    except Exception as error:
        return f"<{type(value).__name__} whose repr raised {type(error).__name__}>"
    return text if len(text) <= limit else text[: limit - 3] + "..."
