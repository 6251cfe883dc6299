"""How the subcommands print."""

import sys
from typing import TextIO


def report(line: str, *, is_last: bool, file: TextIO | None = None) -> None:
    """Show progress: on a terminal always in the same line, elsewhere one line per call.

    Args:
        file: where to; None: stdout.
    """
    file = sys.stdout if file is None else file
    if file.isatty():
        print(f"\r\033[K{line}", end="\n" if is_last else "", file=file, flush=True)
    else:
        print(line, file=file, flush=True)


def is_last(line: str) -> bool:
    """Whether a line such as "[3/3] name" is the last one."""
    number, _, total = line[1:].partition("]")[0].partition("/")
    return number == total


def fail(message: str) -> int:
    """Print an error on stderr; return 1, the exit code of a command that failed."""
    print(f"megatron-adams: {message}", file=sys.stderr)
    return 1
