"""Program output: any encoding, closed pipes, errors in one line."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

BROKEN_PIPE = 141  # 128 + SIGPIPE, a shell's exit code for a closed pipe


def print_in_any_encoding() -> None:
    r"""Escape characters that standard output and error cannot encode, as \u2192; replace invalid input."""
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace"), (sys.stdin, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


@contextmanager
def run_program() -> Iterator[None]:
    """Run the block as a program.

    ValueError and OSError end it with one line and exit code 1, a closed pipe silently with 141, Ctrl-C with 130.
    """
    print_in_any_encoding()
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes again at exit and would report the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
