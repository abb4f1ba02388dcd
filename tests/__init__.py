"""The test suite. It is a package so that the processes that tests start can import `tests.tasks`."""
