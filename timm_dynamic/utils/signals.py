"""Ctrl-C and SIGTERM as a request to stop at the next good place."""
import signal
import threading
from typing import Any


class StopRequest:
    """Context in which SIGINT and SIGTERM set `signum` and do nothing else. A second one is taken at its word."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.signum is not None

    def _handle(self, signum: int, frame: Any) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum

    def __enter__(self) -> 'StopRequest':
        if threading.current_thread() is threading.main_thread():  # signals can be handled in no other
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exc: Any) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)


class Stopped(Exception):
    """Training was stopped by a signal, its state saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
