"""A lock that objects can hold which are pickled or copied."""

from __future__ import annotations

import threading


class PicklableLock:
    """A reentrant lock between threads; a pickled or copied one is a new lock."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[PicklableLock], tuple[()]]:
        return PicklableLock, ()
