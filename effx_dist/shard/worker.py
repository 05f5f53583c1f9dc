"""A thread that runs calls one after another, and does not keep the interpreter from ending."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
Call = tuple["Future[Any]", Callable[..., Any], tuple[Any, ...]]


class Worker:
    """A daemon thread: a call that never returns holds up no exit of the interpreter, as the
    threads of a ThreadPoolExecutor would."""

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._thread = threading.Thread(target=_run, args=(self._calls,), daemon=True, name=name)
        self._thread.start()

    def submit(self, body: Callable[..., T], *args: Any) -> Future[T]:
        """Run ``body(*args)`` after all that was submitted before."""
        future: Future[T] = Future()
        self._calls.put((future, body, args))
        return future

    def close(self) -> None:
        """End the thread once it has run what was submitted. Does not wait for that."""
        self._calls.put(None)

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for the end of a closed thread, ``timeout_s`` seconds at most."""
        self._thread.join(timeout_s)

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in the call that runs, as soon as it is back from native code."""
        ident = ctypes.c_ulong(self._thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(KeyboardInterrupt))


def _run(calls: SimpleQueue[Call | None]) -> None:
    with suppress(KeyboardInterrupt):  # one that came too late for its call
        while (call := calls.get()) is not None:
            future, body, args = call
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(body(*args))
            except BaseException as error:
                future.set_exception(error)
            del call, future, body, args  # nothing of a call is kept alive until the next one
