"""What a user can put right, said in one sentence; and how every program here ends."""

import sys
from pathlib import Path


class UserError(Exception):
    """Something the user can put right. The message is one sentence that names the file or flag and
    the way out."""


def run(main):
    """Run a program's `main`. A UserError becomes one line on stderr and exit code 2, Ctrl-C exit
    code 130."""
    try:
        main()
    except UserError as error:
        complain(error)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        complain(str(stop) or "stopped.")
        sys.exit(130)


def complain(message):
    """One line on stderr, on a line of its own where a progress line may stand before it."""
    program = Path(sys.argv[0]).name
    start = "\n" if sys.stdout.isatty() else ""
    print(f"{start}{program}: {message}", file=sys.stderr)
