"""What the subcommands print with."""

import sys


def report(line: str, *, is_last: bool) -> None:
    """Show the progress of a command: on a terminal in one line, elsewhere a line each."""
    if sys.stdout.isatty():
        print(f"\r\033[K{line}", end="\n" if is_last else "", flush=True)
    else:
        print(line, flush=True)


def fail(message: str) -> int:
    """Print what went wrong on stderr; return the exit code of a command that failed, 1."""
    print(f"megatron-adams: {message}", file=sys.stderr)
    return 1
