import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu.records import Records

_STAGE = "battery"
# Any exit code that pytest does not use.
_EXIT_CODE = 70


def pytest_addoption(parser: pytest.Parser) -> None:
    # A string, because pytest-xdist could not send a Path to its processes.
    parser.addoption("--results", help="the file that gets a record for each test (records.py)")


def _is_worker(config: pytest.Config) -> bool:
    """Whether this is one of pytest-xdist's processes."""
    return hasattr(config, "workerinput")


def pytest_configure(config: pytest.Config) -> None:
    if _is_worker(config):
        # There are as many processes as the oracle would have threads.
        torch.set_num_threads(1)
    # The option exists only if pytest was started with this folder.
    elif results := config.getoption("--results", default=None):
        config.pluginmanager.register(_Recorder(Records(Path(results))))


class _Recorder:
    """Writes a record for each test as soon as it is done."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            words = ""
            if report.skipped and isinstance(report.longrepr, tuple):
                words = report.longrepr[2].removeprefix("Skipped: ")
            elif report.failed:
                words = _reason(report.longreprtext)
            self._records.write(
                _STAGE,
                report.nodeid,
                result=report.outcome,
                words=words,
                seconds=round(report.duration, 3),
            )

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Record a file that cannot be collected, because no test of it will be reported."""
        if report.outcome != "passed":
            words = str(report.longrepr)
            if isinstance(report.longrepr, tuple):
                words = report.longrepr[2].removeprefix("Skipped: ")
            self._records.write(
                _STAGE, report.nodeid, result=report.outcome, words=_reason(words), seconds=0.0
            )


def _reason(text: str) -> str:
    """Return the first line of an exception, or the last line of another text."""
    lines = text.splitlines() or [""]
    raised = [line.removeprefix("E ") for line in lines if line.startswith("E ")]
    return (raised[0] if raised else lines[-1]).strip()[:300]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="not run: no GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """End the process after a test that left a CUDA error, because later tests would fail, too.

    pytest-xdist then names the test, and goes on in a new process.
    """
    num_failed = item.session.testsfailed
    result = yield
    if item.session.testsfailed > num_failed and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if _is_worker(item.config):
                os._exit(_EXIT_CODE)
            item.session.shouldstop = f"after {item.nodeid} the GPU takes no more work: {error}"
    return result
