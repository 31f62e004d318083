"""Turns of test processes that run side by side: a test that measures time has the machine for itself."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Turns:
    """What the processes of one test run share: many tests at once, or one alone.

    Locks on two files, which end with the process that holds them. Whoever begins a test passes `gate`; one that is to
    be alone keeps it shut while those under way in `room` end, so that it need not wait for a moment without any.

    Args:
        name: of the test run, the same in its processes.
    """

    def __init__(self, name: str) -> None:
        folder = Path(tempfile.gettempdir())
        self.paths = [folder / f"mindspeed_llm_{kind}_{name}" for kind in ("gate", "room")]
        self.gate, self.room = (os.open(path, os.O_RDWR | os.O_CREAT, 0o600) for path in self.paths)

    @contextmanager
    def turn(self, alone: bool) -> Iterator[None]:
        """For the length of a test."""
        fcntl.flock(self.gate, fcntl.LOCK_EX)
        try:
            fcntl.flock(self.room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        finally:
            fcntl.flock(self.gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(self.room, fcntl.LOCK_UN)

    def close(self) -> None:
        """Leave; the last one's files stay behind empty if its process is killed."""
        for descriptor in (self.gate, self.room):
            os.close(descriptor)
        for path in self.paths:
            path.unlink(missing_ok=True)
