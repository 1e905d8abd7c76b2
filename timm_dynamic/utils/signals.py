"""Handling of Ctrl-C and SIGTERM: a run stops after it has saved its state."""
import signal
import threading
from typing import Any


class StopRequest:
    """Context manager. The first SIGINT or SIGTERM only sets `signum`; the next one raises KeyboardInterrupt.

    It is true once a signal has arrived.
    """

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
        if threading.current_thread() is threading.main_thread():  # other threads cannot set signal handlers
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exc: Any) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)


class Stopped(Exception):
    """A signal stopped the run. Its state is saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
