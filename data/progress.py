"""A progress line: redrawn in place on a terminal, a plain line now and then where the output goes
to a file."""

import sys
import time


class Progress:
    """Called with how much is done; shows rate and time left."""

    def __init__(self, total, unit="tokens"):
        self.total = total
        self.unit = unit
        self.on_terminal = sys.stdout.isatty()
        self.every = 0.5 if self.on_terminal else 10.0      # seconds between lines
        self.started = time.monotonic()
        self.done_at_start = None
        self.last_shown = 0.0
        self.ended = False

    def __call__(self, done, text="", last=False):
        """Show `done` of `total` and `text`; silent if the last line is younger than `every`
        seconds. The line ends where all is done, or where `last` says so."""
        now = time.monotonic()
        last = last or done >= self.total
        if self.ended:
            return
        self.ended = last
        if self.done_at_start is None:
            self.done_at_start = done                   # more than 0 for a resumed run
        if now - self.last_shown < self.every and not last:
            return
        self.last_shown = now
        rate = (done - self.done_at_start) / max(now - self.started, 1e-9)
        left = "" if last or rate == 0 else f"  {clock((self.total - done) / rate)} left"
        width = len(f"{self.total:,}")
        line = f"{done:>{width},}/{self.total:,} {self.unit}  {rate:,.0f}/s{left}  {text}"
        if self.on_terminal:
            print(f"\r\033[K{line}", end="\n" if last else "", flush=True)
        else:
            print(line, flush=True)


def clock(seconds):
    """61 -> "1:01"."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
