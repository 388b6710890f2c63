"""What a program prints: in any encoding, to a reader that may stop reading, its errors in one line."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

BROKEN_PIPE = 141  # 128 + SIGPIPE, what a shell says of any program that ends this way


def print_in_any_encoding() -> None:
    r"""Print what standard output and error cannot hold as \u2192; read from standard input what it should not hold."""
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace"), (sys.stdin, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


@contextmanager
def run_program() -> Iterator[None]:
    """Be a program: what the user can mend is one line and exit code 1; without a reader it ends in silence."""
    print_in_any_encoding()
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
