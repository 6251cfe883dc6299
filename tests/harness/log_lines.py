"""What the package logs in a process, for the test that started it."""

import logging


def collect_log_lines() -> list[str]:
    """Return a list that from now on gets each line that the package's loggers write."""
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger = logging.getLogger("megatron_adams")
    logger.addHandler(Lines())
    logger.setLevel(logging.INFO)
    return lines
