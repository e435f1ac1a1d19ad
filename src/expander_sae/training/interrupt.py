"""Signals while a step is in progress: it is finished first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """A signal ended the work at a place from which it can go on. A ``KeyboardInterrupt``, whichever signal it was.

    Attributes:
        signum: the signal's number; a program so ended exits with ``128 + signum`` by custom.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Deferred:
    """What :func:`deferred_signals` yields."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def raise_if_any(self) -> None:
        """Raise :class:`Stopped` if a signal has come."""
        if self.signum is not None:
            raise Stopped(self.signum)


@contextmanager
def deferred_signals() -> Iterator[Deferred]:
    """Ctrl-C, SIGTERM and SIGHUP are noted instead of breaking into a half-done step; a second one stops at once.

    A signal that was ignored before (``nohup``) stays ignored. Outside the main thread nothing changes: signals are the
    main thread's affair.
    """
    deferred = Deferred()
    if threading.current_thread() is not threading.main_thread():
        yield deferred
        return

    def note(signum: int, frame: Any) -> None:
        if deferred.signum is not None:
            raise Stopped(signum)
        deferred.signum = signum

    previous = {number: signal.getsignal(number) for number in _SIGNALS}
    caught = [number for number in _SIGNALS if previous[number] not in (signal.SIG_IGN, None)]
    for number in caught:
        signal.signal(number, note)
    try:
        yield deferred
    finally:
        for number in caught:
            signal.signal(number, previous[number])
