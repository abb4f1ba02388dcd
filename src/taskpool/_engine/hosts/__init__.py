"""Who starts the processes: the only thing that differs between the hosted backends.

A host starts a process that calls `worker.main` on the worker's end of a channel, tells its pid where it knows it, and
its exit code where it learns it. Everything else goes over the channel, and is the same for all.
"""
