"""The tests that CPython has for its own executors."""
