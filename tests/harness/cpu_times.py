"""A pytest plugin that says where the time goes: CPU seconds of each folder and of each file.

    make test ARGS="-p tests.harness.cpu_times"

CPU seconds are counted in the process of the tests and in all that it has started, ranks and
compilers included. They say more than a test's duration where several tests run at a time. What a
zygote does at its start is left out: several workers share it.
"""

import os
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.harness.cluster import Cluster

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PROPERTY = "cpu_s"


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Meter())


def cpu_seconds() -> float:
    """Of this process, of its descendants, of those of them that have ended, and of ranks."""
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # After the name, which may have spaces: state, parent, ...; see proc(5).
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended since
                continue
            parents[int(entry.name)] = int(fields[1])
            seconds[int(entry.name)] = sum(map(int, fields[11:15])) / _TICKS_PER_S
    return Cluster.cpu_s + sum(seconds[pid] for pid in seconds if _is_mine(pid, parents))


def _is_mine(pid: int, parents: dict[int, int]) -> bool:
    while pid in parents and pid not in Cluster.zygote_pids:
        if pid == os.getpid():
            return True
        pid = parents[pid]
    return False


class _Meter:
    """Counts in the process that runs a test, and adds up in the one that reports them all."""

    def __init__(self) -> None:
        self._of_files: defaultdict[str, float] = defaultdict(float)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, None, None]:
        yield from self._counted(item)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, None, None]:
        yield from self._counted(item)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, None, None]:
        yield from self._counted(item)

    def _counted(self, item: pytest.Item) -> Generator[None, None, None]:
        start = cpu_seconds()
        try:
            yield
        finally:
            item.user_properties.append((_PROPERTY, cpu_seconds() - start))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":  # it has the properties of all three
            file = report.nodeid.partition("::")[0]
            for name, value in report.user_properties:
                if name == _PROPERTY:
                    assert isinstance(value, float)
                    self._of_files[file] += value

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        folders: defaultdict[str, float] = defaultdict(float)
        for file, seconds in self._of_files.items():
            folders[str(Path(file).parent)] += seconds
        terminalreporter.section("CPU seconds")
        for counted in (folders, self._of_files):
            for name, seconds in sorted(counted.items(), key=lambda each: -each[1]):
                terminalreporter.write_line(f"{seconds:8.1f}  {name}")
