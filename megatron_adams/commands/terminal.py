"""How the subcommands print."""

import sys


def report(line: str, *, is_last: bool) -> None:
    """Show progress: on a terminal always in the same line, elsewhere one line per call."""
    if sys.stdout.isatty():
        print(f"\r\033[K{line}", end="\n" if is_last else "", flush=True)
    else:
        print(line, flush=True)


def fail(message: str) -> int:
    """Print an error on stderr; return 1, the exit code of a command that failed."""
    print(f"megatron-adams: {message}", file=sys.stderr)
    return 1
