"""What a scheduler's signal does to a run: the batch in hand is finished if that fits the grace, else it is dropped.

SIGTERM comes from a scheduler that takes the machine back, and from `kill`; SIGUSR2 from Slurm, some time before a job's
limit, where submitit has asked for it. Records are on the disk batch by batch, so nothing else has to be saved.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR2") if hasattr(signal, name))
SAME_S = 2.0  # a signal that comes again within this time is the same one, sent to a process group and by its leader


class Interrupted(SystemExit):
    """A run ended by a signal; the exit code is 128 + its number."""


class Dropped(Exception):
    """The batch in hand does not fit the grace."""


class Stopping:
    """Know whether a signal came, and whether the batch in hand may still be finished.

    grace_s: seconds from the signal to the end of the process. A batch is taken to last as long as the longest so far.
    """

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self.signals: list[int] = []
        self.before: dict[int, Any] = {}  # the handlers that were there
        self._since = self._longest = 0.0
        self._began: float | None = None

    @property
    def asked(self) -> bool:
        return bool(self.signals)

    @property
    def name(self) -> str:
        """Return the name of the first signal."""
        return signal.Signals(self.signals[0]).name

    def begin(self) -> None:
        """A batch begins."""
        self._began = time.monotonic()

    def end(self) -> None:
        """The batch in hand is on the disk."""
        if self._began is not None:
            self._longest = max(self._longest, time.monotonic() - self._began)
        self._began = None

    def check(self) -> None:
        """Raise Dropped if a signal came and the batch in hand does not fit the grace; called at every pass."""
        if not self.asked:
            return
        expected = self._began + self._longest if self._began is not None else 0.0
        if max(time.monotonic(), expected) > self._since + self.grace_s:
            raise Dropped

    def note(self, number: int, _frame: Any = None) -> None:
        """Handle a signal; a second one, later, ends the process at once."""
        if self.asked and time.monotonic() > self._since + SAME_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.asked:
            self._since = time.monotonic()
            text = f"{signal.Signals(number).name}: finishing the batch in hand, for at most {self.grace_s:g} s"
            os.write(2, f"{text} (a second signal ends at once)\n".encode())  # print may be what it interrupts
        self.signals.append(number)

    def leave(self) -> NoReturn:
        """End the process as the sender expects it: exit code 128 + signal, so that a scheduler starts it again.

        Under submitit its own handler of SIGUSR2 comes first: it saves the job and has Slurm put it into the queue again.
        """
        for number in self.signals:
            if number != signal.SIGTERM and callable(handler := self.before.get(number)):
                handler(number, None)
        raise Interrupted(128 + self.signals[0])


@contextlib.contextmanager
def listening(grace_s: float) -> Iterator[Stopping]:
    """Note SIGTERM and SIGUSR2 while images are made; outside the main thread, which alone gets signals, never any."""
    stop = Stopping(grace_s)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    for number in SIGNALS:
        stop.before[number] = signal.signal(number, stop.note)
    try:
        yield stop
    finally:
        for number, handler in stop.before.items():
            signal.signal(number, handler)
