"""How far preprocessing is: a bar on a terminal, log lines elsewhere."""

import logging
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 1.0
TOKEN_BYTES = 4


class Progress:
    """Rows and tokens done so far, shown while they come."""

    def __init__(self, log_interval: int, total: int | None = None) -> None:
        """Args:
        log_interval: rows between two log lines, which are never closer than a second.
        total: rows there will be, about; with it the time left is told.
        """
        self.total = total
        self.log_interval = log_interval
        self.rows = 0
        self.tokens = 0
        self.begin = time.monotonic()
        self.last_rows = 0
        self.last_time = self.begin
        self.on_terminal = sys.stderr.isatty()
        self.bar = self._bar() if self.on_terminal else None

    def update(self, rows: int, tokens: int) -> None:
        """Count rows and tokens that are written."""
        self.rows += rows
        self.tokens += tokens
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(rows)
            self.bar.set_postfix_str(f"{self.tokens / max(now - self.begin, 1e-9):,.0f} tokens/s", refresh=False)
        elif self.rows - self.last_rows >= self.log_interval and now - self.last_time >= SECONDS_BETWEEN_LINES:
            self._line(now)

    def _bar(self) -> "tqdm":
        from tqdm import tqdm  # a tenth of the start of a short run, and needed on terminals alone

        return tqdm(total=self.total, unit=" rows", unit_scale=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        """Finish the bar and log the total."""
        if self.bar is not None:
            self.bar.close()
        self._line(time.monotonic())

    def _line(self, now: float) -> None:
        self.last_rows, self.last_time = self.rows, now
        seconds = max(now - self.begin, 1e-9)
        megabytes = self.tokens * TOKEN_BYTES / 2**20
        left = ""
        if self.total is not None and 0 < self.rows < self.total:
            left = f", {(self.total - self.rows) * seconds / self.rows:.0f} s left"
        log.info(
            "Processed %s documents (%.1f docs/s, %.2f MB/s). %.0f tokens/s%s",
            self.rows, self.rows / seconds, megabytes / seconds, self.tokens / seconds, left,
        )  # fmt: skip
