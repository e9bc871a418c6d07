"""What a user can put right, said in one sentence; and how every program here prints and ends."""

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path


class UserError(Exception):
    """Something the user can put right. The message is one sentence that names the file or flag and
    the way out."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which clusters and `kill` end a program: like Ctrl-C."""


def run(main):
    """Run a program's `main`. A UserError becomes one line on stderr and exit code 2; Ctrl-C ends
    with exit code 130, SIGTERM with 143."""
    with contextlib.redirect_stdout(Output(sys.stdout)) as output, sigterm_as_exception():
        try:
            main()
        except UserError as error:
            complain(error)
            sys.exit(2)
        except KeyboardInterrupt as stop:
            complain(str(stop) or "stopped.")
            sys.exit(143 if isinstance(stop, Terminated) else 130)
        finally:
            output.flush()


@contextlib.contextmanager
def sigterm_as_exception():
    """A block in which SIGTERM raises Terminated. (Python gives signals to the main thread
    only.)"""
    def terminate(number, frame):
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler_before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler_before)


class Output:
    """Standard output that never stops a program: results are in files.

    Where nobody reads any more (`| head -1`), or the disk is full, it falls silent. Signs that its
    encoding lacks are written as escapes.
    """

    def __init__(self, stream):
        self.stream = stream
        if stream is None:                                  # closed before we began
            self.stream = open(os.devnull, "w", encoding="utf8")
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError as error:
            self.fall_silent(error)

    def flush(self):
        try:
            self.stream.flush()
        except OSError as error:
            self.fall_silent(error)

    def fall_silent(self, error):
        """All that is still to be written, by Python's own last flush too, goes nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)
        if not isinstance(error, BrokenPipeError):
            complain(f"standard output cannot be written ({error.strerror}); going on without it.")

    def __getattr__(self, name):
        return getattr(self.stream, name)


def complain(message):
    """One line on stderr, on a line of its own where a progress line may stand before it."""
    program = Path(sys.argv[0]).name
    start = "\n" if sys.stdout.isatty() else ""
    print(f"{start}{program}: {message}", file=sys.stderr)
