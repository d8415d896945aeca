"""Threads for sync handlers."""

import queue
import threading
from collections.abc import Callable


class HandlerThreads:
    """At most `threads_max` threads, started as they are needed, that run jobs in the order of `submit`.

    Unlike those of `concurrent.futures` they are daemons: the interpreter does not wait at its end for a
    handler that never returns. A job must not raise.
    """

    def __init__(self, threads_max: int) -> None:
        self._threads_max = threads_max
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._threads: list[threading.Thread] = []

    def submit(self, job: Callable[[], None]) -> None:
        """Runs `job` in a thread as soon as one is free."""
        if not self._idle.acquire(blocking=False) and len(self._threads) < self._threads_max:
            thread = threading.Thread(target=self._run, name=f"handler-{len(self._threads) + 1}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._jobs.put(job)

    def close(self) -> None:
        """Ends each thread after what it runs; does not wait for it."""
        for _ in self._threads:
            self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            # Not holding on to the last job's body until the next one comes.
            del job
            self._idle.release()
