"""MEGATRON_ADAMS_AUTOREGISTER in the workers of a real Ray cluster, on this machine."""

import tempfile
from pathlib import Path

import pytest

from tests.frameworks.conftest import installed
from tests.harness.environment import (
    make_environment_with_wheel,
    run_without_checkout,
    told_in,
)

MEGATRONS_ERROR = (
    "ImportError: emerging-optimizers package is required for optimizer='adams'. Install it with: "
    "pip install emerging-optimizers"
)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environment")
    return make_environment_with_wheel(folder, installed("ray"))


def train(python: Path, *actors: str, **variables: str) -> list[dict[str, object]]:
    """Train in some of ray_job.py's actors; the variables are the driver's."""
    variables = {
        # It writes a token into the home folder, and asks the network, otherwise.
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        # It would end workers where other processes fill the memory.
        "RAY_memory_monitor_refresh_ms": "0",
        **variables,
    }
    # Ray's sockets are below this folder, and an address has at most 108 bytes: tmp_path is longer.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        words = ("-m", "tests.frameworks.ray_job", folder, *actors)
        done = run_without_checkout(python, *words, **variables)
    found = told_in(done.stdout)
    assert len(found) == len(actors), (done.stdout + done.stderr)[-4000:]
    return found


def assert_trained(found: dict[str, object]) -> None:
    assert found["parts"] == ["AdamSDistributedOptimizer"]
    lines = found["lines"]
    assert isinstance(lines, list)
    (line,) = (line for line in lines if line.startswith("registered --optimizer adams"))
    assert "with megatron.core alone" in line and line.endswith("; by autoregister)")


def test_actor_has_adams_where_its_runtime_env_has_the_variable(python: Path) -> None:
    """And without it, what Megatron says to a name that it does not know."""
    without, with_variable = train(python, "plain", "with the variable")
    assert without == {"lines": [], "error": MEGATRONS_ERROR}
    assert_trained(with_variable)


def test_actor_has_adams_where_the_variable_is_there_before_ray_starts(python: Path) -> None:
    (found,) = train(python, "plain", MEGATRON_ADAMS_AUTOREGISTER="1")
    assert_trained(found)
