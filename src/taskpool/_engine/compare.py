"""Compares memory by the C library. Apart, since it needs ctypes, which takes long to import."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class _Buffer(ctypes.Structure):
    """`Py_buffer`, of which the beginning matters here; its layout is part of Python's stable ABI."""

    _fields_ = [("address", ctypes.c_void_p), ("rest", ctypes.c_byte * 120)]


@contextlib.contextmanager
def _address(value: object) -> Iterator[int]:
    """Hold an object's memory where it is, and say where that is."""
    buffer = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(value), ctypes.byref(buffer), 0)
    try:
        yield buffer.address
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))


def are_equal(one: bytes | bytearray | memoryview, other: bytes | bytearray | memoryview) -> bool:
    """Whether two buffers of the same length hold the same bytes."""
    with _address(one) as here, _address(other) as there:
        return not _memcmp(here, there, len(one))
