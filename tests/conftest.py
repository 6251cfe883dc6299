"""What holds for every folder: which tests run by default, and how two processes share them."""

import os
from pathlib import Path

import pytest

LONG_FILES_FIRST = {"distributed": 0, "kernels": 1}
# It waits for the time limits of jobs, and needs a core for little of that time.
WAITING_FILE = "slurm/test_jobs.py"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        help="also run the tests marked `full`, which the others cover in part (tests/README.md)",
    )
    parser.addoption(
        "--only-full", action="store_true", help="run those marked `full`, and no other"
    )


def is_worker(config: pytest.Config) -> bool:
    """Whether this is one of pytest-xdist's processes."""
    return hasattr(config, "workerinput")


def pytest_configure(config: pytest.Config) -> None:
    # Not in pyproject.toml, which the run of tests/gpu leaves out.
    config.addinivalue_line(
        "markers", "full: left out by default, as other cases cover it in part; --full runs it, too"
    )
    if is_worker(config):
        # There are more processes than cores. Read when torch is imported, here and in processes
        # that tests start.
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Have one process more than cores: ranks wait for each other, and so do their tests."""
    if os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS"):
        return None  # xdist reads it
    return len(os.sched_getaffinity(0)) + 1


@pytest.fixture(scope="session")
def shared_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for all processes of this run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if is_worker(request.config) else base


@pytest.fixture(scope="session")
def kernel_cache(shared_folder: Path) -> Path:
    """Compiled kernels: each is compiled once."""
    folder = shared_folder / "kernels"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def zygotes(shared_folder: Path) -> Path:
    """The processes that ranks are forked from: one for each world (harness/cluster.py)."""
    folder = shared_folder / "zygotes"
    folder.mkdir(exist_ok=True)
    return folder


def start_order(item: pytest.Item) -> int:
    """What a test's file starts after: the file that waits comes first, then the long ones."""
    if item.path.as_posix().endswith(WAITING_FILE):
        return -1
    return LONG_FILES_FIRST.get(item.path.parent.name, len(LONG_FILES_FIRST))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Start with the long files; leave out what is marked `full`, unless it is asked for.

    It is asked for by --full, by --only-full, or by its own name.
    """
    # Processes take the next file each: with the short ones last, they end at about one time.
    items.sort(key=start_order)
    if config.getoption("--full"):
        return
    named = {argument for argument in config.args if "::" in argument}
    only_full = config.getoption("--only-full")
    left_out = [
        item
        for item in items
        if (item.get_closest_marker("full") is None) == only_full
        and not named & {item.nodeid, item.nodeid.split("[")[0]}
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]
